"""Every bound of an HTTP instance, with its reason."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    body_bytes: int = 512 * 1024
    """A request is one record: half of Kafka's default max.message.bytes, so that key and headers always fit."""
    header_bytes: int = 16 * 1024
    """Request line and headers together; nginx takes 8 KiB a line, node 16 KiB in all."""
    header_count: int = 100
    """As Apache httpd's LimitRequestFields."""
    header_seconds: float = 10.0
    """From the first byte of a request (or the connection's opening) to the end of its headers, however it trickles."""
    body_seconds: float = 20.0
    """From the end of the headers to the end of the body: 512 KiB at 26 KiB/s."""
    in_flight: int = 1024
    """Requests that wait for the log; above it new ones get 503. A second's work at the rate one instance reaches."""
    held_bytes: int = 128 * 1024 * 1024
    """Bodies in memory, arriving or waiting for the log; above it new requests get 503."""
    connections: int = 4096
    """Open connections; above it a new one is closed at once. Below the common 1024*n file limits of services."""
    keep_alive_seconds: float = 65.0
    """An idle connection is closed after this; longer than the 60 s of common load balancers, so they close first."""
    start_seconds: float = 10.0
    """How long start-up waits for the log before it goes on in the background, not ready."""
