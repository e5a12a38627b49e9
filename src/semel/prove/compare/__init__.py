"""The same work and the same faults on loops over other libraries, judged by the same rules.

The loops are in `loops/`, one readable script for each library. This file stays empty: every loop imports it.
"""
