"""Apps that tests prove, and one that they refute."""
