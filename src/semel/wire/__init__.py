"""The Kafka protocol as bytes and values, without any I/O: frames, messages, record batches, compression."""

import sys


def _import_kio_alone() -> None:
    """Import kio's base without hypothesis, which it takes along wherever that is installed: a third of a start."""
    if "hypothesis" in sys.modules:
        return
    sys.modules["hypothesis"] = None  # type: ignore[assignment]
    try:
        import kio.static._phantom  # noqa: F401
    finally:
        del sys.modules["hypothesis"]


_import_kio_alone()
