"""The likely cause of a divergence, in a sentence that is also on a page of docs/."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A likely cause. `sentence` is on `page`, word for word."""

    sentence: str
    page: str

    def __str__(self) -> str:
        return f"{self.sentence} ({self.page})"


INITIAL_WEIGHTS = Cause(
    "`model()` is called with equal random streams on every rank, and must return equal weights on every rank. DDP "
    "broadcasts parameters and buffers alone: any other tensor keeps the rank's own values.",
    "docs/tasks.md",
)
SAMPLES = Cause(
    "A data set or collate function uses the rank, keeps its own random streams, or repeats or drops samples. Then a "
    "step differs from the plan's.",
    "docs/data.md",
)
DATA = Cause(
    "Generators of your own (a `numpy.random.Generator`, a `torch.Generator`, an augmentation library's) are not "
    "seeded by the loader. Seed them in `__getitem__` from `sample_seed()`, which is different for each sample and "
    "epoch, and the same on any number of processes and workers and for any sizes of batches.",
    "docs/data.md",
)
STREAMS = Cause(
    "A forward seeds the global streams, or the count of numbers that it draws depends on the rank or the process. "
    "Then the streams no longer follow the micro-batch's key.",
    "docs/data.md",
)
FORWARD = Cause(
    "A forward draws from its own generator, or uses the rank, the world size or an earlier micro-batch. Then it is "
    "not a function of the micro-batch.",
    "docs/data.md",
)
SCALE = Cause(
    "The weight is the share times the number of ranks, because gradients are averaged over the ranks, as DDP does. Do "
    "not divide or multiply the loss by the world size.",
    "docs/accumulation.md",
)
GRADIENTS = Cause(
    "After the loop, a gradient is that of the mean loss over the whole global batch. A hook or a custom backward that "
    "changes gradients on one rank, or before they are summed, changes this.",
    "docs/accumulation.md",
)
UNREDUCED = Cause(
    "Gradients that differ between ranks after the loop were not reduced: a backward ran after the loop, or the loop "
    "was left early.",
    "docs/accumulation.md",
)
UPDATE = Cause(
    "An optimizer whose settings depend on the rank or the world size, or that draws random numbers, computes another "
    "update from equal gradients.",
    "docs/accumulation.md",
)
BUFFERS = Cause(
    "Buffers that the forward of another module changes are those of rank 0, as in DDP, so they depend on the number "
    "of processes.",
    "docs/strict.md",
)
ROUNDING = Cause(
    "The bits that a kernel computes may depend on the number of threads and on the memory that it gets. A kernel that "
    "is not deterministic has no strict mode.",
    "docs/strict.md",
)
FUNCTION = Cause(
    "Of a function only the model that it returns is compared. A Task with the same parts has all stages compared, and "
    "the first that differs is named.",
    "docs/verify.md",
)
CAUSES = {name: value for name, value in vars().items() if isinstance(value, Cause)}
