"""The aggregator: it adds what silos send, decides by a pure table, and keeps the record."""
