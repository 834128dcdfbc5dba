"""The notes that each rank of a run writes to a file, and the run that is read from these files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class MicroNote:
    """What one micro-batch had.

    `samples`: data-set indices. `data`: a digest. `before` and `after`: digests of the random streams before and after
    the forward. `forward`: a digest of the model's outputs and the loss. If micro-batches were joined into one batch,
    `before`, `after`, `forward` and `loss` are those of the joined batch.
    """

    index: int
    samples: list[int]
    data: str
    before: str = ""
    after: str = ""
    forward: str = ""
    loss: float = 0.0
    weight: float = 0.0


@dataclass
class StepNote:
    """What one step had on one rank.

    The dicts are by name of parameter or buffer. `gradients`, `weights`, `buffers`: digests. `norms`: of gradients.
    `differences`: of weights and buffers from the reference run. `optimizer`: a digest of its state. Only checked
    steps have more than `micros`.
    """

    step: int
    micros: list[MicroNote] = field(default_factory=list)
    checked: bool = False
    gradients: dict[str, str] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    optimizer: str = ""
    differences: dict[str, float] = field(default_factory=dict)


@dataclass
class RankNotes:
    """All notes of one rank.

    `built`: digests of the parameters and buffers that the Task's `model()` returned. `units`: the relative size of one
    unit in the last place, by quantity.
    """

    rank: int
    device: str
    synchronised: bool
    built: dict[str, str]
    units: dict[str, float]
    fingerprint: str = ""
    steps: list[StepNote] = field(default_factory=list)


@dataclass
class Run:
    """The notes of all ranks of one run, in rank order."""

    ranks: list[RankNotes]

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    def steps(self) -> Iterator[tuple[StepNote, ...]]:
        """Yield the notes of each step, one for each rank."""
        return zip(*(notes.steps for notes in self.ranks), strict=True)


def write_notes(notes: RankNotes, folder: Path) -> None:
    """Write the notes of one rank to a JSON file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank{notes.rank}.json").write_text(json.dumps(asdict(notes)))


def read_run(folder: Path, world_size: int) -> Run:
    """Read the notes that `world_size` ranks wrote to `folder`."""
    return Run([_read(folder / f"rank{rank}.json") for rank in range(world_size)])


def _read(path: Path) -> RankNotes:
    values = json.loads(path.read_text())
    values["steps"] = [
        StepNote(**{**step, "micros": [MicroNote(**micro) for micro in step["micros"]]}) for step in values["steps"]
    ]
    return RankNotes(**values)


def checked_steps(steps: int) -> list[int]:
    """Return the steps after which a run of `steps` steps is checked.

    These are the first 20, then fewer and fewer, and the last: 30 of 1,000.
    """
    checked = list(range(1, min(steps, 20) + 1))
    while checked and checked[-1] < steps:
        checked.append(min(steps, checked[-1] * 3 // 2))
    return checked
