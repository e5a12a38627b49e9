"""The way in: HTTP requests become records, once per Idempotency-Key, and their answers come back from the log."""
