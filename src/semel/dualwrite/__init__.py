"""The atomic dual write (KIP-939): prepare in Kafka, decide in the database, complete in Kafka."""
