"""The log of one partition: offsets, producers, transactions, and the files that hold them."""
