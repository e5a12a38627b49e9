"""One execution of a target with its limits."""

from __future__ import annotations

import resource
import time

from tests.fuzz.targets import Target

__all__ = ["MEMORY_BYTES", "Finding", "Harness"]

SECONDS = 1.0
"""Of the processor's time for one input: a request that takes longer holds up every other client."""
MEMORY_BYTES = 256 << 20
"""That a process may grow while it is fuzzed; the largest that one input may ask for is the limit of decompression."""


class Finding(AssertionError):
    """What an input did that none may; `data` is the input."""

    def __init__(self, what: str, data: bytes) -> None:
        super().__init__(f"{what}; the input is {data[:200].hex()}" + ("..." if len(data) > 200 else ""))
        self.data = data


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Harness:
    """Runs inputs and keeps the worst that was seen."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.executions = 0
        self.refused = 0
        self.slowest = 0.0
        self._began_with = 0

    @property
    def grown_bytes(self) -> int:
        return max(_peak_bytes() - self._began_with, 0) if self._began_with else 0

    def __call__(self, data: bytes) -> None:
        """Raises `Finding`, and nothing else."""
        began = time.process_time()
        try:
            self.target.run(data)
        except self.target.refusals:
            self.refused += 1
        except BaseException as problem:
            raise Finding(f"{self.target.name}: {type(problem).__name__}: {problem}", data) from problem
        seconds = time.process_time() - began
        self.slowest = max(self.slowest, seconds)
        self.executions += 1
        if seconds > SECONDS:
            raise Finding(f"{self.target.name}: {seconds:.1f} s of the processor's time", data)
        if self.executions == 100:
            self._began_with = _peak_bytes()  # What is loaded on first use is loaded.
        if self.grown_bytes > MEMORY_BYTES:
            raise Finding(f"{self.target.name}: the process grew by {self.grown_bytes >> 20} MiB", data)
