"""The errors of a run. A user's own mistakes are `ValueError` or `TypeError`."""

from __future__ import annotations


class DDParityError(RuntimeError):
    """Base of the failures of a run."""


class RendezvousError(DDParityError):
    """The processes did not come together; says which address, port and interface were tried."""


class RankFailure(DDParityError):
    """Another rank failed; this one raises too, so that nobody waits for it.

    `rank` is the first rank that failed. Its traceback, where it left one, is a note of this exception.
    """

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank


class SampleError(DDParityError):
    """A data set failed to give a sample; names its data-set index."""


class ParityError(DDParityError):
    """Runs of one Task on different numbers of processes diverge. `comparison`: the result of `verify`."""

    def __init__(self, message: str, comparison: object = None) -> None:
        super().__init__(message)
        self.comparison = comparison
