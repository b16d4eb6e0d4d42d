"""One way to turn a value into bytes, so that two sides that agree on a value agree on its digest."""

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON, sorted keys, no white space. Floats by Python's shortest repr; NaN and infinity are refused (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def frame(*parts: bytes) -> bytes:
    """The `|` of secure-sum.md: each part behind its length as a big-endian u32, so that no two lists of parts collide."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def sha256(data: bytes) -> bytes:
    """32 bytes."""
    return hashlib.sha256(data).digest()


def digest_name(digest: bytes) -> str:
    """A digest as people write it: `sha256:` and 64 hex digits."""
    return "sha256:" + digest.hex()
