"""Tests of the examples, as their users would write them."""
