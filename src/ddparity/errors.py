"""Define the errors of a run. A mistake in the user's own arguments is a `ValueError` or `TypeError`."""

from __future__ import annotations

from typing import Any


class DDParityError(RuntimeError):
    """The base class of the errors of a run."""


class RendezvousError(DDParityError):
    """The processes of a job did not find each other; the message says which address, port and interface were tried."""


class RankFailure(DDParityError):
    """Another rank failed; this rank raises too, so that no rank waits for it.

    `rank` is the first rank that failed. If it reported a traceback, that is a note of this exception.
    """

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank


class SampleError(DDParityError):
    """A data set raised an error for a sample; the message gives the sample's index in the data set."""


class ParityError(DDParityError):
    """Runs of one Task on different numbers of processes diverge. `comparison`: the result of `verify`."""

    def __init__(self, message: str, comparison: object = None) -> None:
        super().__init__(message)
        self.comparison = comparison


class WrongArithmetic(DDParityError):
    """A device computed other numbers than the other ranks' devices did for the same micro-batch.

    `rank`: the rank of the device; -1 if several could be. `ranks`: all that could be. `host`, `device`: where it is.
    `record`: these and what was compared, in values that JSON has. `exit_code`: of a process that this error ends.
    """

    exit_code = 123

    def __init__(self, message: str, record: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.record = record or {}
        self.ranks: list[int] = self.record.get("ranks", [])
        self.rank: int = self.ranks[0] if len(self.ranks) == 1 else -1
        self.host: str = self.record.get("host", "")
        self.device: str = self.record.get("device", "")
