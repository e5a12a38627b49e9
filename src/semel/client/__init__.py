"""Semel's Kafka client: connections, cluster metadata, producers, admin calls, and the seam to librdkafka's consumer."""
