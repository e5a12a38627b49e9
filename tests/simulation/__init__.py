"""The whole broker and several of our clients in one seeded event loop; see docs/simulation.md."""
