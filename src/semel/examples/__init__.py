"""Example apps that ship with Semel; `examples/shop` in the repository is this folder."""
