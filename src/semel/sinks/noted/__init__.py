"""What the sinks share whose handlers note effects instead of doing them (Valkey, OpenSearch)."""
