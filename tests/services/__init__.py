"""Real components for tests, started without Docker from what package registries carry."""
