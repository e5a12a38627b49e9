"""How the log refuses."""

from __future__ import annotations

from semel.errors import ErrorCode, SemelError

__all__ = ["LogError", "storage_error"]


class LogError(SemelError):
    """An append or a read was refused and changed nothing. `code` is what Kafka answers in this case.

    `records` are the indexes, in the batch, of the records that are at fault; empty when the whole batch is.
    """

    code: ErrorCode

    def __init__(self, code: ErrorCode, message: str, records: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.records = records


def storage_error(what: str, problem: BaseException) -> LogError:
    """The refusal when a file cannot be read or written."""
    return LogError(ErrorCode.KAFKA_STORAGE_ERROR, f"{what}: {problem}")
