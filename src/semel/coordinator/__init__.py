"""The broker's two coordinators as sans-IO machines: transactions and consumer groups.

Both change in two steps: a call computes what should become true, the shell makes it durable, then it is applied.
Nothing here reads a clock, opens a file or waits; times come in as milliseconds since 1970.
"""
