"""The outbox: records written with the rows that they tell of, and the relay that brings them into Kafka once."""
