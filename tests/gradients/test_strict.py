"""The strict reduction: the same bits of parameters, optimizer state and buffers on any number of processes."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from ddparity.gradients import strict
from ddparity.gradients.strict import StrictReduction, deterministic
from tests.gradients.strict_cases import (
    FEATURES,
    MATRIX,
    Case,
    Pictures,
    adamw,
    cnn,
    digest,
    image_loss,
    mlp,
    train,
    wide,
)
from tests.ranks import kill_self, outcomes, run_ranks

CASES = {**MATRIX, **FEATURES}


def _digests(names: list[str], num_workers: int) -> dict[str, str]:
    return {name: digest(train(CASES[name], num_workers)) for name in names}


@pytest.fixture(scope="module")
def one_process() -> dict[str, str]:
    """Without a process group: a plain `python train.py`."""
    (ended,) = outcomes(_digests, 1, list(CASES), 0, env=lambda rank: {}, in_world=False)
    assert ended.error is None, ended.trace
    return ended.value


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_bits_of_one_process(world_size: int, one_process: dict[str, str]) -> None:
    # Options of DDP's, and of the checkpointing, change nothing.
    assert len(set(one_process.values())) == len(CASES) - 4, "cases that should differ do not"
    for digests in run_ranks(_digests, world_size, list(CASES), 0):
        assert [name for name in CASES if digests[name] != one_process[name]] == []


LOADED_BY_WORKERS = [name for name in MATRIX if name.endswith("adamw")]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_workers_load_the_same_bits(world_size: int, one_process: dict[str, str]) -> None:
    for digests in run_ranks(_digests, world_size, LOADED_BY_WORKERS, 2):
        assert digests == {name: one_process[name] for name in LOADED_BY_WORKERS}


def _fast_and_permuted() -> tuple[str, str, str]:
    case = Case(mlp)
    fast, tree = digest(train(case, reduction="fast")), digest(train(case))
    added = strict._added
    strict.TreeSum = _OneByOne
    assert strict._added is added
    return fast, tree, digest(train(case))


class _OneByOne(strict.TreeSum):
    """Sums from left to right, as autograd accumulates."""

    def push(self, node: Any, value: Any) -> None:
        if self.nodes:
            value = self._add(self.nodes.pop()[1], value)
        self.nodes.append((node, value))


def test_another_order_of_the_sum_has_other_bits() -> None:
    """So the equality above is no accident of sums that come out alike in any order."""
    (fast, tree, one_by_one), *_ = run_ranks(_fast_and_permuted, 1)
    assert tree != fast
    assert one_by_one == fast
    (fast_on_two, tree_on_two, _), *_ = run_ranks(_fast_and_its_tree, 2)
    assert tree_on_two == tree
    assert fast_on_two != fast


def _fast_and_its_tree() -> tuple[str, str, None]:
    case = Case(mlp)
    return digest(train(case, reduction="fast")), digest(train(case)), None


def _two_threads() -> str:
    torch.set_num_threads(2)
    net = train(Case(cnn))
    assert not torch.are_deterministic_algorithms_enabled()
    return digest(net)


def test_two_threads_a_process() -> None:
    assert len({found for world_size in (1, 2) for found in run_ranks(_two_threads, world_size)}) == 1


# -- gradients, against an oracle that adds along the tree by hand --


def _by_hand(leaves: list[torch.Tensor | None]) -> torch.Tensor | None:
    """The tree from the root down."""
    if len(leaves) == 1:
        return leaves[0]
    half = 2 ** (math.ceil(math.log2(len(leaves))) - 1)
    left, right = _by_hand(leaves[:half]), _by_hand(leaves[half:])
    if left is None or right is None:
        return right if left is None else left
    if left.is_complex():  # by parts, since torch's sum of complex numbers does not keep -0.0
        return torch.complex(left.real + right.real, left.imag + right.imag)
    return left + right


def _leaves(
    count: int,
    numel: int,
    present: Callable[[int], bool] = lambda number: True,
    dtype: torch.dtype = torch.float32,
) -> list:
    generator = torch.Generator().manual_seed(count)
    leaves = [torch.randn(numel, generator=generator, dtype=dtype) for _ in range(count)]
    for leaf in leaves:
        # A sum of these is -0.0, unless somebody adds a zero.
        (torch.view_as_real(leaf) if leaf.is_complex() else leaf)[0] = -0.0
    return [leaf if present(number) else None for number, leaf in enumerate(leaves)]


def _reduced(numbers: list[int], numel: int) -> bool:
    """For five parameters: always, sometimes, by one micro-batch and never with a gradient; and a complex one."""
    rank, group = (dist.get_rank(), dist.group.WORLD) if dist.get_world_size() > 1 else (0, None)
    count, first = sum(numbers), sum(numbers[:rank])
    presence = [lambda n: True, lambda n: n % 3 == 1, lambda n: n == count - 1, lambda n: False]
    dtypes = [torch.float32] * 4 + [torch.complex64]
    leaves = [_leaves(count, numel, *kind) for kind in zip([*presence, presence[1]], dtypes, strict=True)]
    parameters = [nn.Parameter(torch.zeros(numel, dtype=dtype)) for dtype in dtypes]
    found = []
    for held in (False, True):  # gradients that are there before the step
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 3.0) if held else None
        reduction = StrictReduction([(str(i), p) for i, p in enumerate(parameters)], numbers, rank, group)
        for number in range(first, first + numbers[rank]):
            for parameter, own in zip(parameters, leaves, strict=True):
                if own[number] is not None:
                    parameter.backward(own[number].clone())
            reduction.take()
        reduction.finish()
        for parameter, own in zip(parameters, leaves, strict=True):
            expected = _by_hand(own)
            if held:
                expected = torch.full_like(parameter, 3.0) + (0 if expected is None else expected)
            found.append(_same_bits(parameter.grad, expected))
    return all(found)


def _same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# How many micro-batches each rank has.
SHARES = [[8], [7], [1], [4, 4], [5, 2], [0, 3], [3, 3, 2], [2, 0, 5], [0, 1, 0, 1], [1, 2, 3, 4], [9, 8, 8, 8]]


def _all_reduced(world_size: int, numel: int) -> list[tuple[list[int], bool]]:
    return [(shares, _reduced(shares, numel)) for shares in SHARES if len(shares) == world_size]


@pytest.mark.parametrize("numel", [5, 70_001])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sums_are_those_of_the_tree_to_the_sign_of_zero(world_size: int, numel: int) -> None:
    for found in run_ranks(_all_reduced, world_size, world_size, numel):
        assert [shares for shares, right in found if not right] == []


def _layout() -> bool:
    """Gradients lie in memory as their parameters, whatever a collective made of them."""
    model = dp.replicate(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), reduction="strict")
    for micro in dp.accumulate(model, torch.ones(2, 2, 3, 5, 5), equal_counts=True):
        (model(micro.data).mean() * micro.weight).backward()
    return all(parameter.grad.stride() == parameter.stride() for parameter in model.parameters())


def test_gradients_keep_their_layout() -> None:
    assert run_ranks(_layout, 2) == [True, True]


def _three(gradients: list[list[float | None]]) -> tuple[list[nn.Parameter], StrictReduction]:
    """Return three parameters, of which the first has a gradient of 10, and the reduction that has taken these."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.full((2,), 10.0)
    reduction = StrictReduction(zip("abc", parameters, strict=True), [len(gradients)])
    for row in gradients:
        for parameter, value in zip(parameters, row, strict=True):
            if value is not None:
                parameter.backward(torch.full((2,), value))
        assert reduction.take() == any(value is not None for value in row)
    return parameters, reduction


def test_a_sum_is_scaled_and_added_to_what_was_there() -> None:
    gradients = [[1.0, None, None], [2.0, 4.0, None], [None, None, None], [3.0, None, None]]
    for scale, expected in (({}, [16.0, 4.0]), ({"scale": 0.5}, [13.0, 2.0]), ({"scale": 0.0}, [10.0, 0.0])):
        parameters, reduction = _three(gradients)
        reduction.finish(**scale)
        assert [parameter.grad.tolist() for parameter in parameters[:2]] == [[value] * 2 for value in expected]
        assert parameters[2].grad is None
    parameters, reduction = _three(gradients)
    reduction.restore()
    assert parameters[0].grad.tolist() == [10.0, 10.0]
    assert parameters[1].grad is parameters[2].grad is None
    parameters, reduction = _three([[None, None, 5.0]])
    reduction.finish(2.0)
    assert parameters[0].grad.tolist() == [10.0, 10.0]
    assert parameters[1].grad is None and parameters[2].grad.tolist() == [10.0, 10.0]


def test_gradients_that_are_marked_as_negative_add_up() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    reduction = StrictReduction([("a", parameter)], [2])
    for number in (1.0, 2.0):
        parameter.grad = torch.full((2,), complex(0.0, number)).conj().imag
        assert parameter.grad.is_neg() and reduction.take()
    reduction.finish()
    assert parameter.grad.tolist() == [-3.0, -3.0]


# -- memory and collectives --


def _most_copies(micro_batches: int) -> int:
    """Gradients of the one parameter that are alive between two micro-batches, at most."""
    numel = 1_000
    model = dp.replicate(nn.Linear(numel, 1, bias=False), reduction="strict")
    seen: list[weakref.ref[torch.Tensor]] = []
    world_size, most = dist.get_world_size(), 0
    for micro in dp.accumulate(model, [torch.ones(1, numel)] * (micro_batches // world_size), equal_counts=True):
        (model(micro.data).mean() * micro.weight).backward()
        seen.append(weakref.ref(next(model.parameters()).grad))
        most = max(most, sum(gradient() is not None for gradient in seen))
    return most


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 16), (1, 32), (2, 32)])
def test_memory_is_a_copy_for_each_level(world_size: int, micro_batches: int) -> None:
    for most in run_ranks(_most_copies, world_size, micro_batches):
        assert most - 1 == math.log2(micro_batches // world_size)  # one is there without the tree, too


def _collectives(make: Callable[[], nn.Module], reduction: str, micro_batches: int) -> dict[str, int]:
    model = dp.replicate(make(), reduction=reduction)

    def step() -> None:
        for micro in dp.accumulate(model, torch.ones(micro_batches, 2, 3, 8, 8), equal_counts=True):
            (model(micro.data).mean() * micro.weight).backward()
        model.zero_grad()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    return {e.key: e.count for e in profiler.key_averages() if e.key.startswith("gloo:")}


@pytest.mark.parametrize(
    ("make", "micro_batches", "expected"),
    [
        (mlp, 1, {"gloo:all_to_all": 1}),
        (mlp, 6, {"gloo:all_to_all": 1}),
        (wide, 1, {"gloo:send": 2, "gloo:recv": 2}),
        (wide, 6, {"gloo:send": 3, "gloo:recv": 3}),  # a rank's share has two subtrees: 4 and 2
        (cnn, 1, {"gloo:all_to_all": 2}),  # the running statistics
        (cnn, 6, {"gloo:all_to_all": 2}),
    ],
)
def test_collectives_of_a_step(make, micro_batches: int, expected: dict[str, int]) -> None:
    assert run_ranks(_collectives, 2, make, "strict", micro_batches) == [expected] * 2


# -- what the user's objects are afterwards --


def test_a_world_of_one_gets_its_module_back() -> None:
    net = mlp()
    before = dp.fingerprint(net)
    assert dp.replicate(net, reduction="strict") is net
    assert type(net) is nn.Sequential
    assert dp.fingerprint(net) == before
    assert b"ddparity." not in pickle.dumps(net)
    x = torch.randn(6, 2, 192)

    def gradient(model: nn.Module) -> torch.Tensor:
        model.zero_grad()
        for micro in dp.accumulate(model, x):
            (model(micro.data).square().mean() * micro.weight).backward()
        return model[1].weight.grad

    tree = gradient(net)
    assert torch.equal(gradient(copy.deepcopy(net)), tree)  # a copy is as strict
    fast = gradient(dp.replicate(net))  # asked for anew
    assert not torch.equal(fast, tree)
    torch.testing.assert_close(fast, tree)


def _compiled() -> bool:
    net = dp.replicate(mlp(), reduction="strict")
    found = []
    for model in (net, torch.compile(net, backend="eager")):
        for micro in dp.accumulate(model, torch.ones(6, 2, 192).cumsum(0)):
            (model(micro.data).square().mean() * micro.weight).backward()
        found.append([parameter.grad for parameter in net.parameters()])
        net.zero_grad()
    return all(map(torch.equal, *found))


def test_a_module_compiled_afterwards_is_as_strict() -> None:
    assert run_ranks(_compiled, 1) == [True]


def _between_steps() -> None:
    """DDP itself is untouched: a loop by hand averages as DDP does, also after a step that was left."""
    model = dp.replicate(mlp(), reduction="strict")
    assert type(model) is nn.parallel.DistributedDataParallel
    x = torch.ones(4, 192)
    model(x).mean().backward()
    by_hand = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    try:
        for _ in dp.accumulate(model, [x, x], equal_counts=True):
            raise OSError("lost")
    except OSError:
        model.zero_grad()
        for micro in dp.accumulate(model, [x, x], equal_counts=True):
            (model(micro.data).mean() * micro.weight).backward()
    assert model.require_backward_grad_sync
    for ours, expected in zip(model.parameters(), by_hand, strict=True):
        torch.testing.assert_close(ours.grad, expected)
    model.zero_grad()
    model(x).mean().backward()
    for ours, expected in zip(model.parameters(), by_hand, strict=True):
        assert torch.equal(ours.grad, expected)


def test_ddp_by_hand_between_steps() -> None:
    run_ranks(_between_steps, 2)


def test_leaving_the_loop_in_its_last_micro_batch_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = dp.replicate(mlp(), reduction="strict")
    with caplog.at_level(logging.WARNING):
        for _ in dp.accumulate(model, [torch.ones(4, 192)]):
            break
    assert "left accumulate() in micro-batch 1 of 1: gradients are not reduced" in caplog.text


def test_deterministic_algorithms_are_on_inside() -> None:
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        torch.set_num_threads(2)
        with deterministic(torch.device("cpu")):
            assert torch.are_deterministic_algorithms_enabled()
            with pytest.raises(RuntimeError, match="put_"):  # torch names the operator
                torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        assert not torch.are_deterministic_algorithms_enabled()
        torch.set_num_threads(1)
        for device in (torch.device("cpu"), None):
            with deterministic(device):
                assert not torch.are_deterministic_algorithms_enabled()
        with deterministic(torch.device("meta")):
            assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark


def _scaled() -> list[str]:
    dp.seed_everything(0)
    net = mlp()
    model = dp.replicate(net, reduction="strict")
    optimizer = adamw(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)  # overflows in the first steps
    loader = dp.Loader(Pictures(), dp.BatchPlan(31, 10, 3))
    for step in loader.epoch(0):
        for micro in dp.accumulate(model, step):
            scaler.scale(100 * image_loss(model, micro.data) * micro.weight).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [dp.fingerprint(net), scaler.get_scale()]


def test_a_gradient_scaler_skips_the_same_steps() -> None:
    found = [part for world_size in (1, 2, 3) for part in run_ranks(_scaled, world_size)]
    assert found == found[:1] * 6
    assert found[0][1] < 2.0**127


def _raises_in_a_backward(how: str, make: Callable[[], nn.Module]) -> None:
    model = dp.replicate(make(), reduction="strict")
    for micro in dp.accumulate(model, torch.ones(2, 2, 192), equal_counts=True):
        if micro.index == 1 and dist.get_rank() == 1:
            if how == "kill":
                kill_self()
            raise OSError("lost")
        (model(micro.data).mean() * micro.weight).backward()


@pytest.mark.parametrize("make", [mlp, wide])
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_rank_that_fails_in_the_loop_fails_the_others(how: str, make: Callable[[], nn.Module]) -> None:
    ended = outcomes(_raises_in_a_backward, 2, how, make)
    assert ended[0].error is not None
    assert ended[0].seconds < 10
    assert ended[1].exitcode == -9 if how == "kill" else ended[1].error == "OSError: lost"


# -- refusals --


def _sync_batch_norm(torchs_own: bool) -> None:
    convert = nn.SyncBatchNorm.convert_sync_batchnorm if torchs_own else dp.convert_sync_batchnorm
    dp.replicate(convert(cnn()), reduction="strict")


@pytest.mark.parametrize("torchs_own", [True, False])
def test_a_synchronised_batch_norm_is_refused_on_every_rank(torchs_own: bool) -> None:
    for outcome in outcomes(_sync_batch_norm, 2, torchs_own):
        assert outcome.error.startswith('ValueError: replicate(reduction="strict"): 1 is a SyncBatchNorm, whose')
        assert 'use reduction="fast", or plain batch norms (revert_sync_batchnorm(model))' in outcome.error
        assert outcome.seconds < 10
    assert run_ranks(_sync_batch_norm, 1, torchs_own) == [None]


def _other_threads() -> None:
    torch.set_num_threads(1 + dist.get_rank())
    dp.replicate(mlp(), reduction="strict")


def test_other_numbers_of_threads_are_refused_on_every_rank() -> None:
    for outcome in outcomes(_other_threads, 2):
        assert "the number of intra-op threads (OMP_NUM_THREADS, torch.set_num_threads) differs" in outcome.error
        assert {"1 on", "2 on"} <= {f"{n} on" for n in (1, 2) if f" {n} on" in outcome.error}
        assert outcome.seconds < 10


def _subgroup() -> str:
    group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        return ""
    model = dp.replicate(mlp(), reduction="strict", process_group=group)
    for micro in dp.accumulate(model, [torch.ones(2, 192) * dist.get_rank()]):
        (model(micro.data).square().mean() * micro.weight).backward()
    step = next(dp.Loader(Pictures(), dp.BatchPlan(31, 10, 3)).epoch(0))
    with pytest.raises(ValueError, match="shared among 3 ranks, but the model's process group has 2"):
        list(dp.accumulate(model, step))
    return dp.fingerprint({str(i): p.grad for i, p in enumerate(model.parameters())})


def test_a_group_of_some_ranks() -> None:
    """Foreign batches are shared as the user likes; a Loader's are shared among all."""
    first, second, _ = run_ranks(_subgroup, 3)
    assert first == second


class _SparseByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 3))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(words, self.table, sparse=True)


def test_sparse_gradients_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"the parameter 1\.weight has a sparse gradient"):
        dp.replicate(nn.Sequential(nn.Flatten(), nn.Embedding(5, 3, sparse=True)), reduction="strict")
    model = dp.replicate(_SparseByHand(), reduction="strict")
    step = dp.accumulate(model, [torch.tensor([1, 2])])
    model(next(step).data).mean().backward()
    with pytest.raises(TypeError, match=r"the parameter table has a sparse gradient.*use sparse=False"):
        next(step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "ordered"}, "reduction='ordered'"),
        ({"batchnorm_statistics": "mine"}, "batchnorm_statistics='mine'"),
        ({"reduction": "strict", "static_graph": True}, "static_graph=True"),
        ({"reduction": "strict", "mixed_precision": "bf16"}, "use torch.autocast"),
    ],
)
def test_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dp.replicate(mlp(), **options)
