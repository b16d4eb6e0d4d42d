"""The contract: what silo and aggregator must agree on byte for byte, and the offline CLI."""

PROTOCOL = 1  # the newest protocol this software speaks; ../docs/data_path.md says what a protocol freezes
PROTOCOL_OLDEST = 1
VERSION = "0.1.0"
