"""Valkey and Redis: the connection, and commands that become one script."""
