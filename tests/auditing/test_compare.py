"""The comparison of ranks by their records, written here by hand: no process is started."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from ddparity.auditing.catalogue import Finding
from ddparity.auditing.data import check_data
from ddparity.auditing.evaluation import check_evaluation
from ddparity.auditing.gradients import check_gradients
from ddparity.auditing.model import check_model
from ddparity.auditing.records import Rank, Record, Run

SCRIPT = Path("train.py")


def make_run(*ranks: list[Record], exit_code: int = 0) -> Run:
    return Run(SCRIPT, [Rank(n, {"pid": n}, list(map(dict, rows))) for n, rows in enumerate(ranks)], exit_code)


def told(found: Any) -> dict[str, Finding]:
    return {one.code: one for one in found}


def event(kind: str, line: int, **values: Any) -> Record:
    return {"k": kind, "site": f"train.py:{line}", **values}


def loader(number: int, key: int, length: int = 8, **values: Any) -> Record:
    plain = dict.fromkeys(("subset", "subset_digest", "subset_site", "sampler_site", "shuffles", "chosen"))
    plain |= dict.fromkeys(("stream", "sampler_drops", "repeats", "drop_last"), False)
    own = {"id": number, "key": key, "own": key, "length": length, "base_length": length, "batch": 2}
    kinds = {"dataset": "train.Own", "sampler": "torch.utils.data.distributed.DistributedSampler"}
    return event("loader", 2, **(plain | own | kinds | values))


NUMBERS = itertools.count(1)
DDP = event("ddp", 1, id=1, norms=[], large=[], ranks=[0, 1], broadcasts=True, unused=False, type="Linear")


def epoch(number: int, rows: list[list[int]], digests: list[int], how: str = "exhausted", **end: Any) -> list[Record]:
    """Return the records of a pass over a loader, with an optimizer's step at its end."""
    it = next(NUMBERS)
    return [
        event("iter", 3, it=it, loader=number, n=0, planned=len(rows), epoch=0),
        event("draw", 3, it=it, rows=rows, complete=True),
        *(event("batch", 3, it=it, n=n, d=d, given=n + 1) for n, d in enumerate(digests)),
        *step(0),
        event("end", 3, it=it, given=len(digests), how=how, **end),
    ]


def step(n: int, opt: int = 1, **values: Any) -> list[Record]:
    return [backward(5), event("step", 6, opt=opt, n=n, norm=None, **values)]


def backward(line: int, **values: Any) -> Record:
    plain = {
        "chain": line,
        "scale": 1.0,
        "factors": [],
        "node": "NllLossBackward0",
        "units": None,
        "norm": None,
        "inside": False,
    }
    return event("backward", line, **(plain | {"given": 1, "batch": None} | values))


def items(key: int, stored: list[int], drawn: bool = False) -> Record:
    return {"k": "items", "key": key, "places": [], "digests": [], "stored": stored, "samples": stored, "drawn": drawn}


@pytest.mark.parametrize(("stored", "codes"), [((7, 7), {"DDP103"}), ((7, 8), set()), ((0, 0), set())])
def test_a_data_set_that_is_made_again_is_known_by_what_it_keeps(stored: tuple[int, int], codes: set[str]) -> None:
    """Its batches differ by an augmentation, or by the samples: new ones in each round are no fault."""
    kept = [[one] if one else [] for one in stored]
    rows = [
        [
            loader(1, key=10),
            *epoch(1, [[4 + rank, 2 + rank], [rank, 6 + rank]], [rank, 2 + rank]),
            loader(2, key=20),
            *epoch(2, [[4 + rank, 2 + rank], [rank, 6 + rank]], [4 + rank, 6 + rank]),
            items(10, kept[0]),
            items(20, kept[1]),
        ]
        for rank in range(2)
    ]
    assert told(check_data(make_run(*rows))).keys() == codes


@pytest.mark.parametrize("same", [True, False])
def test_samples_that_are_drawn_at_each_access_are_known_by_their_batches(same: bool) -> None:
    rows = [
        [
            loader(1, key=10, length=4),
            *epoch(1, [[0, 1], [2, 3]], [5, 6] if same else [rank, 2 + rank]),
            items(10, [], drawn=True),
        ]
        for rank in range(2)
    ]
    assert ("DDP101" in told(check_data(make_run(*rows)))) is same


def unequal(how: str, handled: bool = False) -> list[list[Record]]:
    batches = ([[0], [2], [4], [6]], [[1], [3]])
    return [[DDP, loader(1, key=10), *epoch(1, batches[rank], [rank], how, handled=handled)] for rank in range(2)]


@pytest.mark.parametrize(
    ("how", "handled", "exit_code", "certainty"),
    [
        ("exhausted", False, 1, "proved"),
        ("exhausted", False, 0, None),  # equally many steps, and no rank waits
        ("cut", False, 0, "proved"),  # by the audit: the rest of the loop would not have ended
        ("cut", True, 0, "likely"),  # as by an iterator that begins again
    ],
)
def test_unequal_numbers_of_batches(how: str, handled: bool, exit_code: int, certainty: str | None) -> None:
    found = told(check_data(make_run(*unequal(how, handled), exit_code=exit_code))).get("DDP105")
    assert (found and found.certainty) == certainty


def test_two_forwards_of_the_only_micro_batch_of_a_tail_are_no_tasks_of_one_batch() -> None:
    """Two views in each micro-batch, and a loss that is divided by a constant."""
    rows = [event("optimizer", 1, id=1, late=False), event("parameters", 1, opt=1, params=[[1, "w", False, False]])]
    for n, many in enumerate((2, 1, 2)):
        for i in range(many):
            rows += [
                event(
                    "forward",
                    4,
                    ddp=1,
                    n=8,
                    x=10 * n + 2 * i + view,
                    grad=True,
                    train=True,
                    given=1,
                    sync=i == many - 1,
                )
                for view in range(2)
            ]
            rows.append(backward(5, scale=0.5, factors=[0.5], given=2 * n + i + 1, batch=8))
        rows.append(event("step", 6, opt=1, n=n, norm=None))
    found = told(check_gradients(make_run([DDP, *rows], [DDP, *rows])))
    assert "Step 1 follows 1 micro-batch," in found["DDP303"].message


@pytest.mark.parametrize(
    ("factors", "lengths", "certainty"),
    [
        ([0.5, 0.5], (2, 2), None),  # one is a weight, as of two losses
        ([0.5, 0.5], (2, 2, 1), "proved"),
        ([0.25], (2, 2), "likely"),  # 4 micro-batches were meant, or 2 and a weight
        ([0.25], (4, 2), "proved"),
        ([0.5], (2, 2), None),
        ([0.3], (2, 2), None),
    ],
)
def test_a_constant_that_divides_the_losses(
    factors: list[float], lengths: tuple[int, ...], certainty: str | None
) -> None:
    rows = [event("optimizer", 1, id=1, late=False)]
    for n, many in enumerate(lengths):
        for i in range(many):
            rows.append(
                event("forward", 4, ddp=1, n=8, x=10 * n + i, grad=True, train=True, given=1, sync=i == many - 1)
            )
            rows.append(backward(5, scale=math.prod(factors), factors=factors))
        rows.append(event("step", 6, opt=1, n=n, norm=None))
    found = told(check_gradients(make_run([DDP, *rows], [DDP, *rows]))).get("DDP303")
    assert (found and found.certainty) == certainty


@pytest.mark.parametrize("begin", ["equal", "own"])
def test_parameters_that_ddp_is_told_to_leave_out(begin: str) -> None:
    """A rank's own part, such as an expert, begins with its own values. A copy that drifts is told, as likely."""
    rows = []
    for rank in range(2):
        before = 0 if begin == "equal" else rank
        params = [[1, "w", False, False], [0, "parameter 1 (2,)", False, "ignored"]]
        values = {"grads": [5, 6 + rank], "before": [1, before], "after": [2, 3 + rank], "lr": [0.1]}
        start = [event("optimizer", 1, id=1, late=False), event("parameters", 1, opt=1, params=params)]
        rows.append([DDP, *start, *step(0, **values)])
    found = told(check_model(make_run(*rows)))
    assert found.keys() == ({"DDP201"} if begin == "equal" else set())
    assert all(one.certainty == "likely" for one in found.values())


@pytest.mark.parametrize(
    ("frozen", "looks", "codes"),
    [
        (True, [(1, 2), (1, 2)], {"DDP203"}),  # a teacher that each rank has made itself
        (False, [(1, 2), (3, 4)], {"DDP203"}),  # an average by hand
        (False, [(1, 2), (1, 2)], set()),  # nothing uses it
        (True, [(1, 1), (1, 1)], set()),
        (False, [(1, 2), (3, 3)], set()),  # made equal in between
        (True, [(1, 2)], set()),
    ],
)
def test_models_beside_the_training(frozen: bool, looks: list[tuple[int, int]], codes: set[str]) -> None:
    rows = [
        [
            event("beside", 6, type="Teacher", size=4, frozen=frozen, parameters=look[rank], steps=n)
            for n, look in enumerate(looks)
        ]
        for rank in range(2)
    ]
    found = told(check_model(make_run(*rows)))
    assert found.keys() == codes
    assert all(one.certainty == "likely" for one in found.values())


EVALUATION = """
def evaluate(model, loader):
    hits = 0
    for x, y in loader:
        hits += (model(x).argmax(1) == y).sum()
    return hits / len(loader)
def main():
    for epoch in range(2):
        scores[name] = evaluate(model, held_out)
        print(name, epoch, time.time() - start)
        print(name, scores[name])
        mean = torch.tensor(scores[name])
        dist.all_reduce(mean)
        mean /= world
        dist.all_reduce(loss)
"""


def evaluated(folder: Path, length: int, *after: Record) -> Run:
    path = folder / "train.py"
    path.write_text(EVALUATION.strip())
    rows = []
    for rank in range(2):
        rows.append(
            [
                {"k": "step", "opt": 1, "n": 0, "site": "train.py:1"},
                loader(1, key=10, length=length),
                event("iter", 3, it=1, loader=1, n=0, planned=2, epoch=None),
                event("draw", 3, it=1, rows=[[rank, 2 + rank], [4 + rank, (6 + rank) % length]], complete=True),
                event("end", 3, it=1, given=2, how="exhausted"),
                *after,
            ]
        )
        rows[-1] = [{**one, "site": one["site"].replace("train.py", str(path))} for one in rows[-1]]
    return make_run(*rows)


def reduced(line: int) -> Record:
    return event("collective", line, name="all_reduce", op="SUM", values=[0.5], shape=[1], dtype="float32")


def test_a_mean_after_an_evaluation_of_padded_shards(tmp_path: Path) -> None:
    """The number of samples is in no reduction, but the shards have more than the data set."""
    found = told(check_evaluation(evaluated(tmp_path, 7, reduced(12))))
    assert found.keys() == {"DDP401"} and found["DDP401"].certainty == "likely" and found["DDP401"].line == 12
    assert not told(check_evaluation(evaluated(tmp_path, 8, reduced(12))))
    assert "DDP401" not in told(check_evaluation(evaluated(tmp_path, 7, reduced(14))))  # of the training


def test_lines_that_show_nothing_of_an_evaluation(tmp_path: Path) -> None:
    timing, score = event("line", 9, text="clean 1 0.25"), event("line", 10, text="clean 0.75")
    assert not told(check_evaluation(evaluated(tmp_path, 8, timing)))
    found = told(check_evaluation(evaluated(tmp_path, 8, timing, score)))
    assert found.keys() == {"DDP402"} and found["DDP402"].line == 10


@pytest.mark.parametrize("trained", [True, False])
def test_a_batch_that_is_evaluated_in_between_is_no_training_but_one_that_is_labelled_first_is(trained: bool) -> None:
    begin, draw, batch, *_, end = epoch(1, [[0, 1]], [5])
    rows = [
        *(loader(1, key=10), begin, draw, batch),
        event("forward", 4, grad=False, train=False, given=1),
        event("forward", 4, grad=True, train=True, given=1 if trained else 2),  # the next batch of the other loader
        *step(0),
        end,
    ]
    assert make_run(rows).ranks[0].passes[0].training is trained
