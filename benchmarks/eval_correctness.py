"""Count which evaluations return what one process returns: ddparity, Accelerate, the recipe of 2020 and Lightning.

python benchmarks/eval_correctness.py [--nproc 1 2 3 4] [--quick]
python benchmarks/eval_correctness.py --ours  # ddparity alone, on every batch size from 1 to 16

Each contender runs each case (data-set size, batch size, number of processes, kind of output; samples repeat in the
data). The result on rank 0 is compared, sample by sample, with that of a plain loop in one process. A case is right,
wrong (another result without an error), refused (an exception, or a process that aborts) or hung. If ddparity is wrong
or hangs, the exit code is 1. `--quick` checks that everything runs, and writes nothing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import pytorch_lightning as lightning
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

import ddparity as dp
from predict import SequentialDistributedSampler, distributed_concat, nested_concat
from results import machine, table, write_section

HANG_S = 30  # a case takes a tenth of a second; without news for this time it counts as hung
POLL_S = 0.01  # between two checks whether another rank's child has ended
BEGIN = "begin"
WORST_FIRST = ("hung", "refused", "wrong", "right")
ELSEWHERE = "another rank failed"


@dataclass(frozen=True)
class Case:
    kind: str
    size: int
    batch_size: int


@dataclass(frozen=True)
class Verdict:
    """The result of a case. `what`: one of WORST_FIRST. `why`: the reason in words, empty for "right"."""

    what: str
    why: str = ""


# Kinds of output


def rows_of_tensor(x: Tensor) -> Tensor:
    return torch.stack([x, x * x, -x], 1) / 8


def two_tensors(x: Tensor) -> tuple[Tensor, Tensor]:
    return rows_of_tensor(x), x % 3


def scores_and_names(x: Tensor) -> dict[str, Any]:
    return {"scores": rows_of_tensor(x), "name": [f"sample {value}" for value in x.tolist()]}


def ragged_list(x: Tensor) -> list[Tensor]:
    return [torch.full((1 + value % 4,), value) for value in x.tolist()]


def padded_to_the_longest(x: Tensor) -> Tensor:
    return pad_sequence([sequence + 1 for sequence in ragged_list(x)], batch_first=True)


def masks_and_classes(x: Tensor) -> tuple[list[Tensor], Tensor]:
    return [torch.ones(1 + value % 2, 1 + value % 3, dtype=torch.bool) for value in x.tolist()], x % 5


def two_rows_listed(x: Tensor) -> list[Tensor]:
    return list(two_rows(x).split(2))


def two_rows(x: Tensor) -> Tensor:
    return torch.stack([x, x + 0.5], 1).view(-1, 1)


def values(x: Tensor) -> Tensor:
    return x.float()


@dataclass(frozen=True)
class Kind:
    """A model, and `rows`, which turns its output for a batch or the whole data set into a list of one entry a sample.

    A regular result may be one tensor or a list of its rows: `rows` returns the same for both. `objects`: outputs do
    not stack, so Accelerate needs `use_gather_object`, as its documentation says.
    """

    model: Callable[[Tensor], Any]
    rows: Callable[[Any], list[Any]] = list
    objects: bool = False


def _zipped(output: tuple[Any, Any]) -> list[Any]:
    first, second = output
    return list(zip(first, second, strict=True))


def _unpadded(output: Any) -> list[Tensor]:
    """Return rows without padding, because its length depends on a contender's batches, and is no fault."""
    return [row[row != 0] for row in output]


MEAN = "mean over the data set"
REFUSED = "two rows an input (one tensor)"
KINDS = {
    "one tensor": Kind(rows_of_tensor),
    "tuple of two tensors": Kind(two_tensors, _zipped),
    "dict of a tensor and strings": Kind(scores_and_names, lambda o: _zipped((o["scores"], o["name"])), objects=True),
    "ragged list of tensors": Kind(ragged_list, objects=True),
    "tensor whose width differs by batch": Kind(padded_to_the_longest, _unpadded, objects=True),
    "tuple of ragged masks and classes": Kind(masks_and_classes, _zipped, objects=True),
    "two rows an input (list)": Kind(two_rows_listed, objects=True),
    REFUSED: Kind(two_rows, lambda output: list(output.split(2))),
    MEAN: Kind(values),
}


# Contenders: each returns a list of the results that its user has on rank 0; for a mean, a list of the number


def ddparity(data: Tensor, batch_size: int, kind: Kind, mean: bool) -> list[Any]:
    if mean:
        return [dp.predict(kind.model, data, batch_size, metric=MeanMetric(), targets=torch.ones_like)]
    result = dp.predict(kind.model, data, batch_size)
    return [] if result is None or len(data) == 0 else [result]


@functools.cache
def _accelerator() -> Accelerator:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world_size(), "Accelerate did not join the group"
    return accelerator


def accelerate(data: Tensor, batch_size: int, kind: Kind, mean: bool) -> list[Any]:
    """Evaluate as documented: the whole output to `gather_for_metrics`; a loss as in the examples of transformers."""
    accelerator = _accelerator()
    loader = accelerator.prepare(DataLoader(data, batch_size))
    if mean:
        losses = [accelerator.gather_for_metrics(kind.model(x).mean().repeat(batch_size)) for x in loader]
        return [torch.cat(losses).mean() if losses else math.nan]
    return [accelerator.gather_for_metrics(kind.model(x), use_gather_object=kind.objects) for x in loader]


def recipe(data: Tensor, batch_size: int, kind: Kind, mean: bool) -> list[Any]:
    """Evaluate as Trainer.predict of transformers 3 did in 2020; in one process nothing is gathered."""
    outputs: Any = None
    losses = []
    several = dist.is_initialized()
    for x in DataLoader(data, batch_size, sampler=SequentialDistributedSampler(len(data)) if several else None):
        output = kind.model(x)
        if mean:
            losses.append(output.mean().item())
        else:
            outputs = output if outputs is None else nested_concat(outputs, output)
    if mean:
        means = torch.tensor(losses)
        return [(distributed_concat(means, len(data)) if several and losses else means).mean()]
    if outputs is None:
        return []
    return [distributed_concat(outputs, len(data)) if several else outputs]


class Predicting(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.kind = KINDS[MEAN]

    def predict_step(self, x: Tensor) -> Any:
        return self.kind.model(x)

    def validation_step(self, x: Tensor) -> None:
        self.log("mean", self.kind.model(x).mean(), batch_size=len(x), sync_dist=True)


@functools.cache
def _trainer() -> lightning.Trainer:
    ranks = world_size()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", **quiet)
    assert trainer.world_size == ranks, "Lightning did not join the group"
    return trainer


def lightnings(data: Tensor, batch_size: int, kind: Kind, mean: bool) -> list[Any]:
    """Evaluate with `Trainer.predict`, and with `Trainer.validate` for the mean of a logged value."""
    trainer, module, loader = _trainer(), Predicting(), DataLoader(data, batch_size)
    module.kind = kind
    if mean:
        trainer.validate(module, loader, verbose=False)
        return [trainer.callback_metrics.get("mean", math.nan)]
    return trainer.predict(module, loader) or []


OURS = "ddparity"
CONTENDERS = {OURS: ddparity, "Accelerate": accelerate, "recipe of 2020": recipe, "Lightning": lightnings}


# One case


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def judge(name: str, case: Case) -> Verdict:
    """Run a case, compare its result, and return the verdict. The caller handles exceptions."""
    kind, mean = KINDS[case.kind], case.kind == MEAN
    # About two thirds of the samples are equal to another one.
    data = torch.randint(0, 1 + case.size, (case.size,), generator=torch.Generator().manual_seed(case.size))
    parts = CONTENDERS[name](data, case.batch_size, kind, mean)
    if dist.is_initialized() and dist.get_rank() > 0:
        return Verdict("right")
    if mean:
        expected, given = kind.model(data).mean().item(), math.nan if parts[0] is None else float(parts[0])
        near = math.isclose(given, expected, rel_tol=1e-5) or (math.isnan(given) and math.isnan(expected))
        return Verdict("right") if near else Verdict("wrong", f"{given:.4g}, not {expected:.4g}")
    wanted = [row for x in data.split(case.batch_size) if len(x) for row in kind.rows(kind.model(x))]
    try:
        got = [row for part in parts for row in kind.rows(part)]
    except Exception:  # the structure is another; its user may notice when the result is used
        return Verdict("wrong", f"another structure: {_short(parts[-1])}")
    if len(got) != len(wanted):
        return Verdict("wrong", f"{len(got)} entries, not {len(wanted)}")
    for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if not _same(a, b):
            return Verdict("wrong", f"entry {number} is {_short(a)}, not {_short(b)}")
    return Verdict("right")


def _same(a: Any, b: Any) -> bool:
    if isinstance(b, Tensor):
        return isinstance(a, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(b, tuple):
        return isinstance(a, tuple) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


def _short(value: Any, limit: int = 90) -> str:
    return _cut(repr(value), limit)


def _cut(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]} …"


# Many cases on the ranks of one launch


def run_all(names: Sequence[str], cases: list[Case]) -> dict[str, list[Verdict]]:
    """Return this rank's verdicts: of each contender, one for each case. Every rank calls it.

    The cases of a contender share one process group, in a child of this process. A case that fails on one rank makes
    the group unusable, or ends the process (Gloo aborts if sizes differ). Then the child of each rank ends, and new
    children continue with the next case. A forked child has imported everything; a launch takes seconds for it.
    """
    torch.set_num_threads(1)
    gc.freeze()
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    every: dict[str, list[Verdict]] = {name: [] for name in names}
    stretches = 0
    for name, verdicts in every.items():
        while len(verdicts) < len(cases):
            stretches += 1
            shared = dist.PrefixStore(f"stretch{stretches}", store)
            verdicts += _stretch(name, cases[len(verdicts) :], stretches, shared)
    return every


def _stretch(name: str, cases: list[Case], number: int, store: dist.Store) -> list[Verdict]:
    """Return this rank's verdicts up to the first case that fails on any rank, including that case."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _child(name, cases, number, writer)
    os.close(writer)
    output, last_news, end = b"", time.monotonic(), None
    while True:
        if select.select([reader], [], [], POLL_S)[0]:
            news, last_news = os.read(reader, 2**16), time.monotonic()
            if not news:
                break
            output += news
        elif end is None:
            if store.check(["down"]):
                end = Verdict("refused", ELSEWHERE)
            elif time.monotonic() - last_news > HANG_S:
                end = Verdict("hung", f"no news for {HANG_S} s")
            if end is not None:
                os.kill(child, signal.SIGKILL)
    os.close(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        store.set("down", "")
        end = end or Verdict("refused", f"the process ends by {signal.Signals(-code).name}" if code < 0 else "")
    lines = output.decode().splitlines()
    verdicts = [Verdict(*json.loads(line)) for line in lines if line != BEGIN]
    # There is a barrier between two cases, so no rank is past the failed case, and each has verdicts of those before.
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store.set(f"begun/{rank}", str(lines.count(BEGIN)))
    store.wait([f"begun/{other}" for other in range(ranks)], timedelta(seconds=2 * HANG_S))
    reached = max(int(store.get(f"begun/{other}")) for other in range(ranks))
    if reached == 0:
        raise RuntimeError(f"{name}: no rank began a case ({end})")
    if len(verdicts) < reached:
        assert end is not None and len(verdicts) == reached - 1, f"{name}: {len(verdicts)} verdicts of {reached} cases"
        verdicts.append(end)
    return verdicts


def _child(name: str, cases: list[Case], number: int, writer: int) -> NoReturn:
    code = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)  # the other libraries write thousands of lines
        os.dup2(silent, sys.stdout.fileno())
        os.dup2(silent, sys.stderr.fileno())
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(
            number
        )  # keys of earlier children are still in the agent's store
        if os.environ["WORLD_SIZE"] == "1":
            # One process is a plain `python evaluate.py`, without a process group.
            for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR"):
                os.environ.pop(variable, None)
        # Collectives wait for longer than HANG_S, so that a hung case is not counted as refused.
        with dp.world(backend="gloo", device="cpu", timeout=2 * HANG_S):
            for case in cases:
                os.write(writer, f"{BEGIN}\n".encode())
                try:
                    verdict = judge(name, case)
                except Exception as error:
                    verdict = Verdict("refused", _reason(error))
                os.write(writer, json.dumps([verdict.what, verdict.why]).encode() + b"\n")
                if verdict.what == "refused":
                    os._exit(code)  # as if the exception had ended the process
                if dist.is_initialized():
                    dist.barrier()
        code = 0
    finally:
        os._exit(code)


def _reason(error: Exception) -> str:
    text = str(error)
    if any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer")):
        return ELSEWHERE
    return f"{type(error).__name__}: {text}".rstrip(": ")


def merged(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the worst verdict of all ranks, with the reason of the rank that failed first."""
    worst = min((verdict.what for verdict in verdicts), key=WORST_FIRST.index)
    such = [verdict for verdict in verdicts if verdict.what == worst]
    return min(such, key=lambda verdict: verdict.why in ("", ELSEWHERE))


# The report


def report_ours(facts: str, cases: list[Case], found: dict[int, dict[str, list[Verdict]]]) -> str:
    counts: Counter[tuple[str, int, str]] = Counter()
    for ranks, every in found.items():
        for case, verdict in zip(cases, every[OURS], strict=True):
            counts[OURS if case.kind != REFUSED else REFUSED, ranks, verdict.what] += 1
    rows = [[str(ranks), _cell(counts, OURS, ranks), _cell(counts, REFUSED, ranks)] for ranks in found]
    return "\n\n".join(
        [
            "### ddparity on every batch size from 1 to 16",
            facts,
            "The same cases for ddparity alone: right / **wrong** / refused. Refused: two rows for one input.",
            table(["processes", "outputs of one row an input, or a mean", REFUSED], rows),
        ]
    )


def report(facts: str, cases: list[Case], found: dict[int, dict[str, list[Verdict]]]) -> str:
    by_kind: Counter[tuple[str, str, str]] = Counter()
    by_ranks: Counter[tuple[str, int, str]] = Counter()
    first: dict[tuple[str, str, str], str] = {}  # by contender, verdict and kind: the first case
    for ranks, every in found.items():
        for name, verdicts in every.items():
            for case, verdict in zip(cases, verdicts, strict=True):
                by_kind[name, case.kind, verdict.what] += 1
                by_ranks[name, ranks, verdict.what] += 1
                where = f"size {case.size}, batch size {case.batch_size}, {ranks} process{'es' * (ranks > 1)}"
                first.setdefault((name, verdict.what, case.kind), f"{where}: {verdict.why}")
    names = list(CONTENDERS)

    def row(title: str, counts: Counter[Any], key: Any) -> list[str]:
        total = sum(counts[names[0], key, what] for what in WORST_FIRST)
        return [title, f"{total:,}", *(_cell(counts, name, key) for name in names)]

    def examples(what: str) -> str:
        kinds: dict[tuple[str, str], list[str]] = {}
        for (name, verdict, kind), text in first.items():
            if verdict == what:
                kinds.setdefault((name, text), []).append(kind)
        lines = (f"- {name}; {', '.join(alike)}; {_cut(text, 240)}" for (name, text), alike in kinds.items())
        return f"{what.capitalize()}, the first case of each kind:\n\n" + "\n".join(lines) if kinds else ""

    sizes, batches = sorted({case.size for case in cases}), sorted({case.batch_size for case in cases})
    return "\n\n".join(
        [
            "## Results of distributed evaluation",
            facts,
            f"`eval_correctness.py`: data sets of {sizes[0]} to {sizes[-1]} samples, about two thirds of which equal "
            f"another, batch sizes {', '.join(map(str, batches))}, on {', '.join(map(str, found))} processes over "
            f"Gloo. The result on rank 0 is compared with that of a plain loop in one process, sample by sample. Right "
            f"/ **wrong** (other values, order, number or structure, without an error) / refused (an exception, or an "
            f"abort) / hung, only if there are any. Accelerate gets each whole output in `gather_for_metrics`, with "
            f"`use_gather_object` if an output does not stack, and a mean loss as in the examples of transformers. The "
            f"recipe of 2020: a sampler that pads, concatenation, all-gather, truncation. Lightning: "
            f"`Trainer.predict`, and `Trainer.validate` for the mean. Not counted as wrong: a tensor instead of a list "
            f"of its rows, or the reverse; the length of the padding of rows.",
            table(["output", "cases", *names], [row(kind, by_kind, kind) for kind in KINDS]),
            table(["processes", "cases", *names], [row(str(ranks), by_ranks, ranks) for ranks in found]),
            *filter(None, map(examples, ("wrong", "refused", "hung"))),
        ]
    )


def _cell(counts: Counter[Any], name: str, key: Any) -> str:
    right, wrong, refused, hung = (counts[name, key, what] for what in ("right", "wrong", "refused", "hung"))
    figures = [f"{right:,}", f"**{wrong:,}**" if wrong else "0", f"{refused:,}", *([f"{hung:,} hung"] if hung else [])]
    return " / ".join(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--quick", action="store_true", help="run few sizes, and print the results only")
    parser.add_argument("--ours", action="store_true", help="run ddparity alone, on each batch size")
    options = parser.parse_args()
    sizes = [0, 1, 3, 7, 14] if options.quick else range(68)
    batch_sizes = [1, 4] if options.quick else range(1, 17) if options.ours else [1, 4, 16]
    names = [OURS] if options.ours else list(CONTENDERS)
    cases = [Case(kind, size, batch_size) for kind in KINDS for batch_size in batch_sizes for size in sizes]
    facts, start = machine("accelerate", "pytorch-lightning"), time.monotonic()
    found = {}
    for nproc in options.nproc:
        of_ranks = dp.launch(run_all, names, cases, nproc=nproc)
        found[nproc] = {
            name: [merged(verdicts) for verdicts in zip(*(every[name] for every in of_ranks), strict=True)]
            for name in names
        }
    text = (report_ours if options.ours else report)(facts, cases, found)
    print(text)
    print(f"\n{time.monotonic() - start:.0f} s")
    if not options.quick:
        write_section("eval_correctness_ours" if options.ours else "eval_correctness", text)
    ours = Counter(verdict.what for every in found.values() for verdict in every[OURS])
    if ours["wrong"] or ours["hung"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
