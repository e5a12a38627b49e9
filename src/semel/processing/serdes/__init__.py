"""Values in other forms than plain JSON: Avro, Protobuf and JSON Schema with a schema registry, CloudEvents."""
