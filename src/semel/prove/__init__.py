"""Proof: real input, faults on purpose, and a checker that compares what should be with what is."""
