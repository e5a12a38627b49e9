"""Sinks: where effects leave Kafka, each exactly once."""
