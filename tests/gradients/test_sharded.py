"""Training models of torch's `fully_shard`: exact on any number of processes."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import ProfilerActivity, profile

import ddparity as dp
from ddparity.compat import whole_tensor
from ddparity.gradients.sharded import sharded_of
from tests.ranks import outcomes, run_ranks

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this torch does not run on the CPU"
)
DATA = torch.randn(22, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EARLY = hasattr(FSDPModule, "set_reduce_scatter_unused_params")  # reductions in the last backward, torch 2.14 and later
DIVIDES = hasattr(FSDPModule, "set_gradient_divide_factor")
# Of two ranks, the first plan gives uneven shares; of three, it leaves one without a micro-batch in the last step.
PLANS = {"uneven": dp.BatchPlan(22, 9, 3, seed=0), "even": dp.BatchPlan(18, 18, 3, seed=0)}


class Net(nn.Module):
    """A layer that no input uses, one that some use, a tied weight and a batch norm; no size is even for 2 or 3."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7, bias=False)  # a bias before a batch norm has a gradient of rounding alone
        self.norm = nn.BatchNorm1d(7) if norm else nn.Identity()
        self.second = nn.Linear(7, 7)
        self.some = nn.Parameter(torch.ones(7))
        self.unused = nn.Parameter(torch.ones(3))
        self.last = nn.Linear(7, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.second(torch.tanh(self.norm(self.first(x))))
        if x[0, 0] > 0.5:
            h = h * self.some
        return self.last(torch.relu(h))


def _sharded(norm: bool = True, **options: Any) -> Net:
    net = Net(norm)
    if dist.is_initialized():
        for layer in (net.first, net.second, net.last):
            fully_shard(layer, **options)
        fully_shard(net, **options)
    return net


def loader_of(plan: str) -> dp.Loader:
    return dp.Loader(list(DATA[: PLANS[plan].num_samples]), PLANS[plan])


def _whole(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [*net.state_dict().values(), *(v for s in optimizer.state_dict()["state"].values() for v in s.values())]
    return [whole_tensor(value).detach().clone() for value in state]


def _train(plan: str, epochs: int = 2, **options: Any) -> Any:
    net = _sharded(**options)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    norms = []
    for _ in range(epochs):
        for step in loader_of(plan).epoch(0):
            for micro in dp.accumulate(net, step):
                (net(micro.data).square().mean() * micro.weight).backward()
            norms.append(float(whole_tensor(nn.utils.clip_grad_norm_(net.parameters(), 0.05))))
            optimizer.step()
            optimizer.zero_grad()
    return _whole(net, optimizer), norms, dp.fingerprint(net)


def _by_hand(plan: str, epochs: int = 2) -> Any:
    """The same in one process without ddparity's loop: micro-batches by hand, batch norms as they run."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    norms = []
    for _ in range(epochs):
        for step in loader_of(plan).epoch(0):
            for micro in step:
                (net(micro.data).square().mean() * micro.weight).backward()
            norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.05)))
            optimizer.step()
            optimizer.zero_grad()
    return _whole(net, optimizer), norms


def _train_all() -> dict[str, Any]:
    return {plan: _train(plan) for plan in PLANS}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_are_those_of_one_process(world_size: int) -> None:
    ranks = run_ranks(_train_all, world_size)
    tolerance = 1e-12 if EARLY else 1e-4  # older torch adds the 1e-6 of clip_grad_norm_ on each rank
    for plan in PLANS:
        expected = _by_hand(plan)
        for state, norms, _ in (found[plan] for found in ranks):
            torch.testing.assert_close((state, norms), expected, rtol=tolerance, atol=tolerance)
        assert len({found[plan][2] for found in ranks}) == 1


def _counts(micro_batches: int, uneven: bool) -> list[dict[str, int]]:
    net = _sharded(norm=False)
    batch = DATA[DATA[:, 0] > 0.5]  # one that uses every part
    counts = []
    for _ in range(3):
        own = micro_batches + (uneven and dist.get_rank())
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for micro in dp.accumulate(net, [batch] * own, equal_counts=not uneven):
                (net(micro.data).square().mean() * micro.weight).backward()
                if EARLY and own == 1:  # each part's gradients are gone as soon as they are reduced
                    assert not any(one is not None for one in sharded_of(net).shards.unreduced())
        counts.append({e.key: e.count for e in profiler.key_averages() if e.key.startswith("gloo:")})
        net.zero_grad()
    return counts


@pytest.mark.parametrize(
    ("micro_batches", "uneven", "expected"),
    [
        # Each of 4 parts is gathered once a forward, and once a backward except for the outermost. One reduction each,
        # which Gloo does by an all-reduce.
        (1, False, {"gloo:all_gather": 4 + 3, "gloo:all_reduce": 4, "gloo:all_to_all": 1}),
        (3, False, {"gloo:all_gather": 3 * 7, "gloo:all_reduce": 4, "gloo:all_to_all": 1}),
        # Each is gathered once a step; one exchange more for the weights.
        (3, True, {"gloo:all_gather": 4, "gloo:all_reduce": 4, "gloo:all_to_all": 2}),
    ],
)
def test_one_reduction_a_step(micro_batches: int, uneven: bool, expected: dict[str, int]) -> None:
    first = {**expected, "gloo:all_gather": expected["gloo:all_gather"] + 4 * (EARLY and micro_batches == 1)}
    assert run_ranks(_counts, 2, micro_batches, uneven) == [[first, expected, expected]] * 2


def _foreign(kind: str) -> Any:
    """Batches of other sizes, of which rank 0 has none; a gradient from before the loop; a loop that does more."""
    net = _sharded(norm=False)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = list(DATA.split([4, 1, 7, 6, 4]))
    mine = batches if world_size == 1 else [[], batches[:3], batches[3:]][rank] if world_size == 3 else batches[rank::2]
    for _ in range(2):
        for micro in dp.accumulate(net, mine, count=lambda data: float(data[:, 1].gt(0).sum())):
            loss = (net(micro.data).square().mean(1) * micro.data[:, 1].gt(0)).sum() / micro.data[:, 1].gt(0).sum()
            if kind == "twice":
                (loss * micro.weight / 4).backward(retain_graph=True)
                loss = loss * 3 / 4
            with torch.no_grad():
                net(micro.data)
            (loss * micro.weight).backward()
    return [None if one.grad is None else whole_tensor(one.grad) for one in net.parameters()]


def _foreign_once_and_twice() -> tuple[Any, Any]:
    return _foreign("once"), _foreign("twice")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_foreign_batches(world_size: int) -> None:
    net = Net(norm=False)
    kept = DATA[:, 1].gt(0)
    h = net.second(torch.tanh(net.first(DATA)))
    gates = torch.cat([(part[0, 0] > 0.5).expand(len(part)) for part in DATA.split([4, 1, 7, 6, 4])])
    h = torch.where(gates[:, None], h * net.some, h)
    loss = net.last(torch.relu(h)).square().mean(1)
    (2 * (loss * kept).sum() / kept.sum()).backward()  # two loops
    expected = [one.grad for one in net.parameters()]
    for once, twice in run_ranks(_foreign_once_and_twice, world_size):
        torch.testing.assert_close(once, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(twice, expected, rtol=1e-12, atol=1e-12)


def _skipping() -> Any:
    net = _sharded(norm=False)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for number, micro in enumerate(dp.accumulate(net, list(DATA.split(2))[rank::world_size], skipped="drop")):
        if number == rank:
            continue
        (net(micro.data).square().mean() * micro.weight).backward()
    return [None if one.grad is None else whole_tensor(one.grad) for one in net.parameters()]


@pytest.mark.parametrize("world_size", [2, 3])
def test_dropped_micro_batches(world_size: int) -> None:
    net = Net(norm=False)
    rows = [part for number, part in enumerate(DATA.split(2)) if number // world_size != number % world_size]
    for part in rows:
        (net(part).square().mean() / len(rows)).backward()
    for found in run_ranks(_skipping, world_size):
        torch.testing.assert_close(found, [one.grad for one in net.parameters()], rtol=1e-12, atol=1e-12)


def _zeroing() -> Any:
    """zero_grad() in the loop, over old gradients; the last rank has no micro-batch, and the first skips one."""
    net = _sharded(norm=False)
    optimizer = torch.optim.SGD(net.parameters())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = []
    for to_none in (True, False):
        for one in net.parameters():
            one.grad = torch.ones_like(one)
        batches = list(DATA.split(2))[: 2 * (world_size - 1)][rank :: world_size - 1] if rank < world_size - 1 else []
        for number, micro in enumerate(dp.accumulate(net, batches, skipped="drop")):
            if number == 0:
                optimizer.zero_grad(set_to_none=to_none)
            if rank or number:
                (net(micro.data).square().mean() * micro.weight).backward()
        found.append([None if one.grad is None else whole_tensor(one.grad) for one in net.parameters()])
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_zero_grad_in_a_loop(world_size: int) -> None:
    expected = []
    for to_none in (True, False):
        net = Net(norm=False)
        rows = DATA.split(2)[1 : 2 * (world_size - 1)]
        for one in net.parameters():
            one.grad = None if to_none else torch.zeros_like(one)
        for part in rows:
            (net(part).square().mean() / len(rows)).backward()
        expected.append([one.grad for one in net.parameters()])
    for found in run_ranks(_zeroing, world_size):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _without_a_backward() -> Any:
    """Every rank leaves out its last backward; and a step of forwards alone moves the running statistics."""
    net = _sharded()
    for _ in range(2):  # the second could reduce in the last backward
        net.zero_grad()
        for number, micro in enumerate(dp.accumulate(net, [DATA[:4], DATA[4:8], DATA[8:12]])):
            loss = net(micro.data).square().mean()
            if number < 2:
                (loss * micro.weight).backward()
    with torch.no_grad():
        for micro in dp.accumulate(net, [DATA[:4]]):
            net(micro.data)
    return [None if one.grad is None else whole_tensor(one.grad) for one in net.parameters()], list(net.buffers())


def test_micro_batches_without_a_backward() -> None:
    net = Net()
    for _ in range(2):
        net.zero_grad()
        for _rank in range(2):
            for number in range(3):
                loss = net(DATA[4 * number : 4 * number + 4]).square().mean()
                if number < 2:
                    (loss / 6).backward()
    with torch.no_grad():
        for _rank in range(2):
            net(DATA[:4])
    for found in run_ranks(_without_a_backward, 2):
        expected = [one.grad for one in net.parameters()], list(net.buffers())
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _leaving() -> list[str]:
    net = _sharded(norm=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    said = []
    batches = [DATA[:4], DATA[4:8]]
    for _ in range(2):  # in the second round, the last backward has reduced already
        for position, micro in enumerate(dp.accumulate(net, batches)):
            (net(micro.data).square().mean() * micro.weight).backward()
            if position == len(said):
                break
        with pytest.raises(RuntimeError, match="left before its end") as caught:
            optimizer.step()
        said.append(str(caught.value))
        optimizer.zero_grad()
    loop = dp.accumulate(net, batches)
    (net(next(loop).data).sum()).backward()
    with pytest.raises(RuntimeError, match="move optimizer"):
        optimizer.step()
    for micro in dp.accumulate(net, batches):  # another loop takes the model over
        (net(micro.data).square().mean() * micro.weight).backward()
    with pytest.raises(RuntimeError, match="another loop over this model has begun"):
        next(loop)
    with contextlib.suppress(OSError):
        for _ in dp.accumulate(net, batches):
            raise OSError("lost")
    for micro in dp.accumulate(net, batches):
        (net(micro.data).square().mean() * micro.weight).backward()
    plain = Net(norm=False)
    for batch in batches:  # two loops, of two ranks with the same batches
        plain(batch).square().mean().backward()
    for one, its in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(None if one.grad is None else whole_tensor(one.grad), its.grad)
    optimizer.step()
    return said


def test_loops_that_are_left() -> None:
    run_ranks(_leaving, 2)


def _resumed(path: str, first: int, last: int) -> Any:
    net, average = _sharded(), _sharded().requires_grad_(False)
    update = get_ema_multi_avg_fn(0.8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    loader = loader_of("uneven")
    training: dict[str, Any] = {"model": net, "average": average, "optimizer": optimizer, "loader": loader}
    if first:
        dp.load_checkpoint(path, **training)
    for step in loader.steps(last):
        for micro in dp.accumulate(net, step):
            (net(micro.data).square().mean() * micro.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        update(list(average.parameters()), list(net.parameters()), loader.steps_done)
        for mine, its in zip(average.buffers(), net.buffers(), strict=True):
            mine.copy_(its)
    dp.save_checkpoint(path, **training)
    outputs = dp.predict(average, list(DATA), 4, to="all")
    return [*_whole(net, optimizer), *map(whole_tensor, average.parameters())], outputs


def _averaged_by_hand() -> Any:
    """By torch's AveragedModel, which takes a copy of the model; a sharded one refuses that."""
    net = Net()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    average.n_averaged += 1  # the average begins with the first weights, not with those after the first step
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    for step in loader_of("uneven").steps(8):
        for micro in step:
            (net(micro.data).square().mean() * micro.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(net)
    with torch.no_grad():
        outputs = torch.cat([average.eval()(part) for part in DATA.split(4)])
    return [*_whole(net, optimizer), *(one.detach() for one in average.parameters())], outputs


def test_it_and_an_average_of_its_weights_continue_on_another_number_of_processes(tmp_path: Path) -> None:
    states, outputs = _averaged_by_hand()
    found = run_ranks(_resumed, 1, str(tmp_path / "one"), 0, 8)
    run_ranks(_resumed, 3, str(tmp_path / "c"), 0, 2)
    run_ranks(_resumed, 2, str(tmp_path / "c"), 2, 5)
    found += run_ranks(_resumed, 3, str(tmp_path / "c"), 5, 8)
    for its_states, its_outputs in found:
        torch.testing.assert_close((its_states, its_outputs), (states, outputs), rtol=1e-12, atol=1e-12)


def _predicted(path: str) -> Any:
    net = _sharded()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if dist.is_initialized():
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            dp.fingerprint(net)
        gathered = sum(e.count for e in profiler.key_averages() if e.key == "gloo:all_gather")
        assert gathered == len(list(net.parameters()))  # one tensor after the other
    before = dp.fingerprint(net), dp.fingerprint(net.state_dict())
    outputs = []
    for step in loader_of("even").epoch(0):
        outputs.append(dp.predict(net, list(DATA), batch_size=4, to="all"))  # 6 batches, the last of 2
        for micro in dp.accumulate(net, step):
            (net(micro.data).square().mean() * micro.weight).backward()
        optimizer.step()
    return before, [*outputs, dp.predict(net, list(DATA), batch_size=4, to="all")]


@pytest.mark.parametrize("world_size", [2, 3])
def test_predictions_and_fingerprints(world_size: int, tmp_path: Path) -> None:
    expected = _predicted("")
    assert expected[0][0] == expected[0][1]
    for prints, outputs in run_ranks(_predicted, world_size, ""):
        assert prints == expected[0]
        torch.testing.assert_close(outputs, expected[1], rtol=1e-12, atol=1e-12)


def _sums_for_averages() -> None:
    net = fully_shard(nn.Linear(2, 2))
    reduced = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    with mock.patch.object(dist, reduced.__name__, lambda output, value, op, group: output.fill_(group.size())):
        next(dp.accumulate(net, [torch.ones(1, 2)]))


def test_a_backend_that_adds_in_place_of_an_average() -> None:
    for outcome in outcomes(_sums_for_averages, 2):
        assert "for averages and gets sums, so its gradients would be too large" in (outcome.error or "")


def _refused(kind: str) -> None:
    net: nn.Module = Net(norm=False)
    batches = [DATA[:4]]
    if kind == "replicate":
        dp.replicate(_sharded())
    elif kind == "strict":
        dp.replicate(_sharded(), reduction="strict")
    elif kind == "parts":
        fully_shard(net.first)
        next(dp.accumulate(net, batches))
    elif kind == "left out":
        fully_shard(net, ignored_params={net.some})
        next(dp.accumulate(net, batches))
    elif kind == "embedding":
        net = fully_shard(nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)))
        next(dp.accumulate(net, batches))
    elif kind == "mixed":
        next(dp.accumulate([_sharded(), dp.replicate(net)], batches))
    elif kind == "divisors":
        net = _sharded()
        net.first.set_gradient_divide_factor(3.0)
        next(dp.accumulate(net, batches))


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("replicate", "TypeError: replicate.. got a model of fully_shard"),
        ("strict", "ValueError: replicate.reduction=.strict.. got a model of fully_shard.*order that depends"),
        ("parts", "TypeError: .*call fully_shard.model. on the whole model"),
        ("left out", "ValueError: .*has left some out"),
        ("embedding", "ValueError: .*0 has max_norm=1.0"),
        ("mixed", "ValueError: .*models of different reductions .fast and sharded"),
        ("divisors", "ValueError: parts of the model have different divisors.*set_gradient_divide_factor"),
    ],
)
def test_refused_on_every_rank(kind: str, error: str) -> None:
    if kind == "divisors" and not DIVIDES:
        pytest.skip("this torch has no set_gradient_divide_factor")
    for outcome in outcomes(_refused, 2, kind):
        assert outcome.error is not None and re.match(error, outcome.error), outcome.error


def _beside() -> list[str]:
    """A weight of the loss, which an optimizer trains, in no list of models; then in one."""
    weight, said = nn.Linear(3, 1, bias=False), []
    nn.init.ones_(weight.weight)
    for criterion in (weight.double(), fully_shard(copy.deepcopy(weight))):
        net = _sharded(norm=False)
        models = [net] if criterion is weight else [net, criterion]
        optimizer = torch.optim.SGD([*net.parameters(), *criterion.parameters()], lr=0.1)
        loader = dp.Loader(list(DATA), dp.BatchPlan(len(DATA), global_batch=12, micro_batch=3))
        try:
            for step in loader.steps(3):  # the second epoch begins after two
                for micro in dp.accumulate(models, step):
                    (criterion(net(micro.data)).square().mean() * micro.weight).backward()
                optimizer.step()
                optimizer.zero_grad()
            said.append("")
        except dp.DDParityError as error:  # by the store, another rank's
            said.append(f"{error}\n{getattr(error, '__notes__', '')}")
    return said


def test_parameters_beside_a_sharded_model_are_noticed() -> None:
    for alone, listed in run_ranks(_beside, 2):
        assert "trains 1 parameters that no replicated or sharded model has, the first of shape (1, 3)" in alone
        assert listed == ""


class Counting(nn.Module):
    """A layer with a buffer that each rank's forwards change."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3).double()
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x[0, 0].float()
        return self.inner(x)


def _ways() -> dict[str, Any]:
    """Two models at once; a mesh with replicas; another divisor; a buffer; a lower precision; a loss of all rows."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    options: dict[str, Any] = {}
    if world_size == 4:
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    first, second = _sharded(norm=False, **options), _sharded(norm=False, **options)
    if world_size > 1 and DIVIDES:
        for module in (*first.modules(), *second.modules()):
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(8.0)
    for micro in dp.accumulate([first, second], list(DATA[:20].split(5))[rank::world_size]):
        ((first(micro.data) - second(micro.data[:, [1, 2, 3, 4, 0]])).square().mean() * micro.weight).backward()
    found: dict[str, Any] = {"both": [one.grad for net in (first, second) for one in net.parameters()]}

    counting = Counting()
    if dist.is_initialized():
        fully_shard(counting, **options)
    for _ in range(2):
        for micro in dp.accumulate(counting, [DATA[rank : rank + 2]]):
            (counting(micro.data).sum() * micro.weight).backward()
    found["buffer"] = float(counting.seen[0]) if rank == 0 else None

    low = _sharded(norm=False, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32), **options)
    for _ in range(2):
        for micro in dp.accumulate(low, list(DATA[:20].split(4))[rank::world_size]):
            (low(micro.data).double().square().mean() * micro.weight).backward()
    found["low"] = [one.grad for one in low.parameters()]

    rows = _sharded(norm=False, **options)
    for step in dp.Loader(list(DATA), dp.BatchPlan(22, 14, 3, seed=0)).epoch(0):
        dp.backward_over_batch(rows, step, lambda net, x: net(x), lambda y: (y @ y.T).softmax(1).diagonal().sum())
    found["rows"] = [one.grad for one in rows.parameters()]
    return {
        name: [None if one is None else whole_tensor(one) for one in value] if isinstance(value, list) else value
        for name, value in found.items()
    }


@pytest.mark.skipif(not EARLY, reason="older torch adds float32 in place of an average, which is refused")
@pytest.mark.parametrize("world_size", [2, 4])
def test_other_ways(world_size: int) -> None:
    one = _ways()
    for rank, found in enumerate(run_ranks(_ways, world_size)):
        torch.testing.assert_close((found["both"], found["rows"]), (one["both"], one["rows"]), rtol=1e-12, atol=1e-12)
        if rank == 0:
            assert found["buffer"] == pytest.approx(one["buffer"])
        torch.testing.assert_close(found["low"], one["low"], rtol=0.05, atol=2e-3)
