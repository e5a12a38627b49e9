"""Effects outside Kafka: each batch of records and the position behind it become visible together, or not at all."""
