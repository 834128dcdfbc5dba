"""Define the errors of a run. A mistake in the user's own arguments is a `ValueError` or `TypeError`."""

from __future__ import annotations


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
