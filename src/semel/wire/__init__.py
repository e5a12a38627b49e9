"""The Kafka protocol as bytes and values, without any I/O: frames, messages, record batches, compression."""
