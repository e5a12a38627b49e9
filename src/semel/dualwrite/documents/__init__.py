"""The dual write with a document store that speaks MongoDB's protocol: unique inserts, and nothing else."""
