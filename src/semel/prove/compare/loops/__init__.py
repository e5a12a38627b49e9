"""The same work as loops over each library: one script each, started by `semel prove --compare`, readable on its own.

Each takes its settings from the environment (see `work.py`), reads `orders` and writes one record an item to `items`.
"""
