"""The same work by everyone: read an order, mark it as seen, write it on, commit every 100 ms.

Each loop is a process that reads BOOTSTRAP, SOURCE, TARGET, GROUP, INTERVAL_MS and DELIVERY from its environment and
ends at SIGTERM. Ours is `semel_loop.py`; the others are written as their documentation has it, with settings that
favour throughput.
"""
