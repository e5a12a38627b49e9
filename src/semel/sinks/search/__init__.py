"""The search sink (OpenSearch): documents with versions, then the position."""
