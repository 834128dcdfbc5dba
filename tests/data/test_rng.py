from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ddparity as dp
from ddparity.data import rng
from ddparity.data.rng import derive_seed, numbered_seed, preserve_streams, seed_streams
from tests.ranks import run_ranks

WORDS = st.text("ab/'\",()1 ", max_size=4)
DIGEST = "2ba5747c79a329e7"
KEYS = st.lists(st.one_of(st.integers(-(10**20), 10**20), WORDS), max_size=4).map(tuple)


@pytest.fixture(autouse=True)
def _streams() -> Iterator[None]:
    with preserve_streams():
        yield


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def _seeded(seed: int) -> tuple[float, float, float]:
    dp.seed_everything(seed)
    return _draw()


@pytest.mark.parametrize("seed", [0, 2**32, 2**64 - 1])
def test_every_rank_has_the_same_streams(seed: int) -> None:
    draws = run_ranks(_seeded, 3, seed)
    assert draws[0] == draws[1] == draws[2] == _seeded(seed)


def test_other_seeds_give_other_streams() -> None:
    for one, other in zip(_seeded(1), _seeded(2), strict=True):
        assert one != other


def test_seeds_of_numpy_are_integers() -> None:
    assert _seeded(np.int64(7)) == _seeded(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"{seed}.*from 0 to"):
        dp.seed_everything(seed)


@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_what_is_no_integer_is_refused_before_anything_is_seeded(seed: object) -> None:
    dp.seed_everything(3)
    expected = _draw()
    dp.seed_everything(3)
    with pytest.raises(TypeError, match="must be an integer, not a"):
        dp.seed_everything(seed)  # type: ignore[arg-type]
    assert _draw() == expected


def _deterministic() -> tuple[bool, bool, str | None, str]:
    torch.backends.cudnn.benchmark = True
    dp.seed_everything(0, deterministic=True)
    try:
        torch.empty(4).put_(torch.tensor([0]), torch.ones(1), accumulate=False)  # has no deterministic algorithm
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        refused,
    )


def test_deterministic() -> None:
    """It runs in a process of its own, because the mode holds for the whole process."""
    [(enabled, benchmark, workspace, refused)] = run_ranks(_deterministic, 1)
    assert enabled and not benchmark and workspace == ":4096:8"
    assert "put_" in refused and "deterministic" in refused


def test_derived_seeds_do_not_collide() -> None:
    keys = itertools.product(range(50), range(500), range(4))
    seeds = {derive_seed(7, "micro-batch", epoch, step, number) for epoch, step, number in keys}
    assert len(seeds) == 100_000
    assert min(seeds) >= 0 and max(seeds) < 2**63
    # Half of all bits are set, within 6 standard deviations of a fair coin.
    ones = np.unpackbits(np.array(list(seeds), dtype="<u8").view(np.uint8)).sum()
    assert abs(int(ones) - 63 * 50_000) < 6 * (63 * 100_000 / 4) ** 0.5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a/b",), ("a", "b")),
        ((1, "a"), ("1", "a")),
        ((1,), ("1",)),
        (("a", ""), ("a",)),
        (("", "a"), ("a", "")),
        ((1, 23), (12, 3)),
        ((-1,), (1,)),
        (("a', 'b",), ("a", "b")),
        ((), ("",)),
    ],
)
def test_keys_that_read_alike_give_different_seeds(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert derive_seed(*one) != derive_seed(*other)


@given(KEYS, KEYS)
def test_seeds_are_equal_where_keys_are(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert (derive_seed(*one) == derive_seed(*other)) == (one == other)


def test_numpy_integers_are_integers_in_a_key() -> None:
    assert derive_seed(np.int64(3), "a") == derive_seed(3, "a")


def test_derived_seeds_are_the_same_in_every_process_and_version() -> None:
    """A resumed training continues with the seeds that it started with.

    The expected digest is blake2b of "(0, 'data', 3)", computed by b2sum -l 64.
    """
    assert derive_seed(0, "data", 3) == int.from_bytes(bytes.fromhex(DIGEST), "little") >> 1


def test_the_definition_of_numbered_seeds_stays() -> None:
    key = derive_seed(3)
    assert [numbered_seed(0, number) for number in (0, 1, 2**31 - 1, 2**31)] == [0, 1214877616, 4227042454, 0]
    assert [numbered_seed(key, number) for number in (0, 1, 2**31 - 1, 2**31)] == [
        363018755875875786,
        363018755331076796,
        363018755005070230,
        363018755875875786,
    ]


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_numbered_seeds_have_low_bits_of_their_own(key: int, one: int, other: int) -> None:
    low = [numbered_seed(key, number) & 0xFFFFFFFF for number in (one, other)]
    assert (low[0] == low[1]) == (one == other)
    assert all(number % 2 == 0 for number in low)
    assert numbered_seed(key, one) >> 32 == key >> 32


def test_each_library_is_seeded_as_if_alone() -> None:
    """NumPy takes 32 bits of a seed."""
    for seed in (3, 2**32 + 5, 2**64 - 1):
        dp.seed_everything(seed)
        ours = _draw()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        assert ours == _draw()


def test_a_random_state_goes_on() -> None:
    """Also with the second number of a pair of normal numbers, which Python and NumPy keep for the next call."""

    def draw() -> list[float]:
        return [*_draw(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))]

    seed_streams(5)
    draw()
    saved = dp.RandomState().state_dict()
    expected = [draw(), draw()]
    seed_streams(6)
    dp.RandomState().load_state_dict(saved)
    assert [draw(), draw()] == expected


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_a_gpus_stream_is_set_where_both_have_one(there: bool, saved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: torch's functions are replaced by ones that note their calls."""
    state = dp.RandomState().state_dict()
    assert state["cuda"] is None
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_rng_state", calls.append)
    dp.RandomState().load_state_dict({**state, "cuda": "a state" if saved else None})
    assert calls == ["a state"] * (there and saved)


@pytest.mark.parametrize("initialized", [False, True])
def test_the_current_gpu_is_seeded_if_it_is_in_use(initialized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(rng, "seed_cuda_generator", lambda *arguments: calls.append(arguments))
    seed_streams(5)
    assert calls == [(3, 5)] * initialized


@pytest.mark.parametrize("fails", [False, True])
def test_preserved_streams_are_restored(fails: bool) -> None:
    seed_streams(5)
    expected = [_draw() for _ in range(2)]
    seed_streams(5)
    first = _draw()
    try:
        with preserve_streams():
            seed_streams(6)
            _draw()
            if fails:
                raise OSError("disk full")
    except OSError:
        assert fails
    assert [first, _draw()] == expected


def test_seed_streams_seeds_all_three() -> None:
    draws = []
    for seed in (5, 6, 5, 2**63 - 1):
        seed_streams(seed)
        draws.append(_draw())
    assert draws[0] == draws[2]
    for one, other in zip(draws[0], draws[1], strict=True):
        assert one != other
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert _draw() == draws[0]
