"""Semel: every effect of a request happens exactly once, from HTTP through Kafka to the database."""
