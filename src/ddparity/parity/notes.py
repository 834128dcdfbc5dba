"""What one process of a run notes down, and the notes of all its processes together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import default_collate


@dataclass
class MicroNote:
    """One micro-batch: the data-set indices, digests of the data, of the streams before and after the forward, of the
    model's outputs and the loss, the loss and its weight. Of joined micro-batches the loss is that of all of them."""

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
    """One step on one rank. By parameter or buffer: digests, norms of gradients, differences from the reference."""

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
class Notes:
    """A run on one rank. `built`: digests of what the Task's model() gave; `units`: what a quantity's last place is
    worth."""

    rank: int
    device: str
    synchronised: bool
    built: dict[str, str]
    units: dict[str, float]
    fingerprint: str = ""
    steps: list[StepNote] = field(default_factory=list)


@dataclass
class Run:
    """The notes of all ranks of a run, by rank."""

    ranks: list[Notes]

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    def steps(self) -> Iterator[tuple[StepNote, ...]]:
        """The ranks' notes, step by step."""
        return zip(*(notes.steps for notes in self.ranks), strict=True)


def write_notes(notes: Notes, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank{notes.rank}.json").write_text(json.dumps(asdict(notes)))


def read_run(folder: Path, world_size: int) -> Run:
    return Run([_read(folder / f"rank{rank}.json") for rank in range(world_size)])


def _read(path: Path) -> Notes:
    values = json.loads(path.read_text())
    values["steps"] = [
        StepNote(**{**step, "micros": [MicroNote(**micro) for micro in step["micros"]]}) for step in values["steps"]
    ]
    return Notes(**values)


def checked_steps(steps: int) -> list[int]:
    """The steps after which weights are compared: the first 20, then ever fewer, and the last; 31 of 1,000."""
    checked = list(range(1, min(steps, 20) + 1))
    while checked and checked[-1] < steps:
        checked.append(min(steps, checked[-1] * 3 // 2))
    return checked


class Tagged:
    """A data set whose samples carry their indices, so that what was loaded is noted, and not what was asked for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class TaggedTogether(Tagged):
    """The same for a data set that gives several samples at once."""

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        items = self.dataset.__getitems__(indices)
        return list(zip(indices, items, strict=True))


def tagged(dataset: Any) -> Tagged:
    return TaggedTogether(dataset) if hasattr(dataset, "__getitems__") else Tagged(dataset)


class TaggedCollate:
    """Collates tagged samples: their indices, and what the Task's own function makes of them."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any] | None) -> None:
        self._collate = collate_fn or default_collate

    def __call__(self, samples: list[tuple[int, Any]]) -> tuple[list[int], Any]:
        return [index for index, _ in samples], self._collate([item for _, item in samples])
