"""Semel's Kafka client: connections, metadata, producers, admin calls, and the seam to librdkafka's consumer."""
