"""The codes of findings: one table. docs/audit.md has a section for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
Certainty = Literal["proved", "likely"]


@dataclass(frozen=True)
class Code:
    """A kind of finding. `cost` orders the report: what costs the model most comes first."""

    code: str
    title: str
    severity: Severity
    cost: int


@dataclass(frozen=True)
class Finding:
    """One fault of a script, with its evidence.

    `file` and `line`: where it shows. `cause_file` and `cause_line`: where it comes from, such as the line that makes
    the loader. `message`: the evidence, in one sentence. `fix`: the repair. `page`: what explains it.
    """

    code: str
    severity: Severity
    certainty: Certainty
    ranks: tuple[int, ...]
    file: str
    line: int
    cause_file: str
    cause_line: int
    message: str
    fix: str

    @property
    def rank(self) -> int:
        """The first of the ranks."""
        return self.ranks[0]

    @property
    def title(self) -> str:
        return CATALOGUE[self.code].title

    @property
    def page(self) -> str:
        return f"docs/audit.md#{self.code.lower()}"


_ROWS: tuple[tuple[str, str, Severity], ...] = (
    ("DDP301", "an optimizer step on unreduced gradients", "error"),
    ("DDP201", "parameters trained without reduction", "error"),
    ("DDP202", "parameters differ between ranks, gradients do not", "error"),
    ("DDP203", "a model without DDP differs between ranks", "error"),
    ("DDP204", "an optimizer that has other parameters than the model", "error"),
    ("DDP101", "the same samples on all ranks", "error"),
    ("DDP104", "the data set differs between ranks", "error"),
    ("DDP102", "shards overlap, and samples are lost", "error"),
    ("DDP109", "workers repeat a stream", "error"),
    ("DDP105", "unequal numbers of batches", "error"),
    ("DDP503", "collectives do not match", "error"),
    ("DDP103", "the same order in each epoch", "error"),
    ("DDP306", "gradients clipped before they are reduced", "error"),
    ("DDP308", "gradients clipped before unscale_", "error"),
    ("DDP307", "gradients reduced twice, or scaled by the world size", "error"),
    ("DDP309", "gradients thrown away", "warning"),
    ("DDP303", "a window's length is not its divisor", "warning"),
    ("DDP305", "means over unequal counts with equal weights", "warning"),
    ("DDP213", "buffers differ between ranks where a model is evaluated", "error"),
    ("DDP112", "workers draw the same random numbers on all ranks", "error"),
    ("DDP113", "the data draws the same random numbers in each epoch", "error"),
    ("DDP111", "the data draws the same random numbers on all ranks", "warning"),
    ("DDP501", "several ranks write one file", "error"),
    ("DDP502", "a file is read and written without an order", "error"),
    ("DDP401", "the evaluation counts padding", "warning"),
    ("DDP402", "the metric of a shard is taken for the whole", "warning"),
    ("DDP403", "outputs are joined by rank, labels by order", "warning"),
    ("DDP405", "a mean of means over unequal shards", "warning"),
    ("DDP304", "the loss is not divided by the micro-batches", "warning"),
    ("DDP106", "samples are dropped", "warning"),
    ("DDP211", "batch norm over few samples a rank", "warning"),
    ("DDP212", "a batch norm that the conversion does not cover", "warning"),
    ("DDP302", "several reductions a step", "warning"),
    ("DDP701", "find_unused_parameters without need", "warning"),
    ("DDP107", "never shuffled", "note"),
    ("DDP108", "padding in the training", "note"),
    ("DDP114", "the same dropout on all ranks", "note"),
    ("DDP310", "parameters are averaged, not gradients", "note"),
    ("DDP404", "all ranks evaluate everything", "note"),
    ("DDP505", "destroy_process_group is missing", "note"),
    ("DDP601", "lines are printed by all ranks", "note"),
    ("DDP602", "progress bars are shown by several ranks", "note"),
    ("DDP603", "trackers are started by several ranks", "note"),
    ("DDP702", "the ranks wait for one of them", "note"),
    ("DDP703", "constant buffers are broadcast", "note"),
    ("DDP704", "a value is read in each micro-batch", "note"),
)
CATALOGUE = {code: Code(code, title, severity, cost) for cost, (code, title, severity) in enumerate(_ROWS)}


def finding(
    code: str,
    ranks: list[int] | tuple[int, ...] | range,
    site: str | None,
    cause: str | None,
    message: str,
    fix: str,
    certainty: Certainty = "proved",
    severity: Severity | None = None,
) -> Finding:
    """Return a finding at `site`, file:line, with its cause at another. What is only likely is at most a warning."""
    file, _, line = (site or cause or "").rpartition(":")
    cause_file, _, cause_line = (cause or site or "").rpartition(":")
    level = severity or CATALOGUE[code].severity
    if certainty == "likely" and level == "error":
        level = "warning"
    return Finding(
        code,
        level,
        certainty,
        tuple(ranks),
        file,
        int(line or 0),
        cause_file,
        int(cause_line or 0),
        " ".join(message.split()),
        " ".join(fix.split()),
    )


def counted(count: int, word: str) -> str:
    """Return a number with its word, in the plural where it is not one."""
    return f"{count} {word}{'' if count == 1 else 'es' if word.endswith('s') else 's'}"


def listed(values: Iterable[object]) -> str:
    """Return values in a sentence, with commas."""
    return ", ".join(map(str, values))
