"""Ingress: requests enter by HTTP, each exactly once."""
