"""What the cause of a divergence probably is, in the words of the page about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """`sentence`: as it stands on `page`."""

    sentence: str
    page: str

    def __str__(self) -> str:
        return f"{self.sentence} ({self.page})"


INITIAL_WEIGHTS = Cause(
    "`model()` is called with equal random streams on every rank, and must give equal weights there: what DDP does not "
    "broadcast (a tensor that is no parameter and no buffer) stays the rank's own.",
    "docs/tasks.md",
)
SAMPLES = Cause(
    "A data set or collate function that looks at the rank, keeps random streams of its own, or repeats or drops "
    "samples, gives another step than the plan's.",
    "docs/data.md",
)
DATA = Cause(
    "Streams that are not global (a `numpy.random.Generator` that the data set keeps, an augmentation library's own "
    "state) are the user's: seed them inside `__getitem__` from `torch.initial_seed()`, which is the micro-batch's "
    "key.",
    "docs/data.md",
)
STREAMS = Cause(
    "A forward that seeds the global streams, or draws from them as often as its rank or process says, takes them away "
    "from the micro-batch's key.",
    "docs/data.md",
)
FORWARD = Cause(
    "A forward that draws from a generator of its own, or looks at the rank, the world size or an earlier micro-batch, "
    "is no function of the micro-batch.",
    "docs/data.md",
)
SCALE = Cause(
    "Weights sum to one over all ranks, since `replicate` sums gradients (a DDP communication hook) where DDP "
    "averages: a loss that is divided or multiplied by the world size is wrong.",
    "docs/accumulation.md",
)
GRADIENTS = Cause(
    "The gradient after the loop is that of the mean loss over the whole global batch: a hook or a custom backward "
    "that changes gradients on a rank, or before they are summed, changes it.",
    "docs/accumulation.md",
)
UNREDUCED = Cause(
    "Gradients that differ between ranks after the loop were not reduced: DDP does not see parameters that are added "
    "or made trainable after `replicate`.",
    "docs/accumulation.md",
)
UPDATE = Cause(
    "An optimizer whose settings look at the rank or the world size, or that draws random numbers, gives equal "
    "gradients another update.",
    "docs/accumulation.md",
)
BUFFERS = Cause(
    "Buffers of other modules that a forward changes are rank 0's, as in DDP, so they depend on the number of "
    "processes.",
    "docs/strict.md",
)
ROUNDING = Cause(
    "A kernel's bits may depend on how many threads run it, and on the memory that it finds: one that is not "
    "deterministic has no strict mode.",
    "docs/strict.md",
)
CAUSES = {name: value for name, value in vars().items() if isinstance(value, Cause)}
