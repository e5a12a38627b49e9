"""Arbitrary bytes where bytes come from outside: no crash, no hang, no memory that the bytes only announce.

targets   what is fuzzed: a function of bytes each, the errors that it may raise, and real bytes to begin with
mutate    our own mutations: for the short run of `make test`, and inside the coverage-guided one
harness   one execution with its limits of time and memory
guided    one target in a process of its own, guided by coverage (atheris)
__main__  `make fuzz`: all targets, two at a time, so many executions over all of them
"""
