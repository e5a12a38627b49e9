"""Semel's Kafka client: connections, metadata, producers, consumers, admin calls."""
