"""Test what can be saved: values of every type come back as they were, or are refused by name."""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import time
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import ddparity as dp
from tests.checkpoint.test_checkpoint import Held, Version, _assert_same
from tests.ranks import run_ranks

T = TypeVar("T")


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


class Access(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float
    sizes: tuple[int, ...] = (1,)
    doubled: float = dataclasses.field(init=False, default=0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "doubled", 2 * self.rate)


@dataclasses.dataclass
class Tags(list):
    source: str = ""


@dataclasses.dataclass
class Failure(Exception):
    code: int = 0


@dataclasses.dataclass
class Derived:
    width: int

    def __post_init__(self) -> None:
        self.area = self.width**2


@dataclasses.dataclass
class Late:
    width: int = dataclasses.field(init=False)


@dataclasses.dataclass
class Box(Generic[T]):
    width: T


@dataclasses.dataclass
class Cached:
    width: int

    @functools.cached_property
    def area(self) -> int:
        return self.width**2


class Marked(namedtuple("Marked", "x")):
    pass


class Labelled(torch.Tensor):
    pass


class Attributes(dict):
    pass


def test_values_are_returned(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    meta = {"names": ["a", "b"], "seen": torch.arange(3), 7: None, "wide": np.arange(2.0)}
    dp.save_checkpoint(tmp_path / "c", model=model, epoch=3, best=0.7, meta=meta)
    found = dp.load_checkpoint(tmp_path / "c", model=model)
    assert list(found) == ["epoch", "best", "meta"]
    _assert_same(found, {"epoch": 3, "best": 0.7, "meta": meta})
    assert dp.load_checkpoint(tmp_path / "c", epoch=0)["epoch"] == 3
    with pytest.raises(ValueError, match="has no state with the name 'step': it has model, epoch, best, meta"):
        dp.load_checkpoint(tmp_path / "c", step=0)
    with pytest.raises(
        ValueError, match="a value under the name 'epoch', no state of a Linear: load_checkpoint returns"
    ):
        dp.load_checkpoint(tmp_path / "c", epoch=model)
    with pytest.raises(TypeError, match=r"model, a int, has no state_dict and load_state_dict, and .* an object"):
        dp.load_checkpoint(tmp_path / "c", model=3)


def _values(path: str) -> Any:
    dp.save_checkpoint(path, epoch=3, meta={"a": [1]})
    return dp.load_checkpoint(path)


def test_values_are_returned_on_every_rank(tmp_path: Path) -> None:
    assert run_ranks(_values, 2, str(tmp_path / "c")) == [{"epoch": 3, "meta": {"a": [1]}}] * 2


def test_a_cached_property_is_computed_again(tmp_path: Path) -> None:
    config = Cached(3)
    assert config.area == 9
    dp.save_checkpoint(tmp_path / "c", config=config)
    found = dp.load_checkpoint(tmp_path / "c", config=Cached(0))["config"]
    assert found == config and "area" not in vars(found) and found.area == 9


def test_a_generic_dataclass(tmp_path: Path) -> None:
    dp.save_checkpoint(tmp_path / "c", box=Box[int](3))
    assert dp.load_checkpoint(tmp_path / "c", box=Box(0)) == {"box": Box(3)}


def test_a_deep_value_is_refused(tmp_path: Path) -> None:
    def nested(levels: int) -> Any:
        value: Any = 1
        for _ in range(levels):
            value = [value]
        return value

    dp.save_checkpoint(tmp_path / "c", value=nested(100))
    assert dp.load_checkpoint(tmp_path / "c") == {"value": nested(100)}
    itself: list[Any] = []
    itself += [itself, itself]
    config = Derived(1)
    config.width = [config]  # type: ignore[assignment]
    del config.area
    for value in (nested(101), itself, {"x": itself}, config):
        with pytest.raises(TypeError, match=r"value.* is nested more than 100 levels deep, or contains itself: give a"):
            dp.save_checkpoint(tmp_path / "c", value=value)


def test_two_types_of_one_name_are_refused(tmp_path: Path) -> None:
    """One of them would come back as the other one."""
    one, other = (enum.Enum("Colour", "RED") for _ in range(2))
    with pytest.raises(TypeError, match="the state of value cannot be saved: it has two types Colour with the same"):
        dp.save_checkpoint(tmp_path / "c", value={"a": one.RED, "b": [other.RED]})
    dp.save_checkpoint(tmp_path / "c", value=one.RED)
    with pytest.raises(ValueError, match="c: value is a Colour, and there are two such types here"):
        dp.load_checkpoint(tmp_path / "c", value=[one.RED, other.RED])
    assert dp.load_checkpoint(tmp_path / "c", value=[one.RED, one.RED]) == {"value": one.RED}


@pytest.mark.parametrize("value", [Counter("a"), OrderedDict(a=1), Marked(1)], ids=lambda value: type(value).__name__)
def test_attributes_that_would_be_lost_are_refused(value: Any, tmp_path: Path) -> None:
    dp.save_checkpoint(tmp_path / "c", value=[value])
    value.note = "x"
    with pytest.raises(
        TypeError, match=rf"value\[0\] is a {type(value).__name__} with the attribute note, which would"
    ):
        dp.save_checkpoint(tmp_path / "c", value=[value])


def test_one_part_in_many_places_is_refused_at_once(tmp_path: Path) -> None:
    """A file has a copy for each place. 2**99 of them end at once; some come back."""
    shared: Any = [Config(0.5), {"a": 1}]
    once = {"a": shared, "b": (shared, [shared])}
    dp.save_checkpoint(tmp_path / "c", value=once)
    assert dp.load_checkpoint(tmp_path / "c", value=once) == {"value": once}
    for _ in range(97):
        shared = [shared, shared]
    own: list[Any] = [shared]
    own.append(own)
    start = time.monotonic()
    for value, message in ((shared, "values, counting what is in several places each time"), (own, "contains itself")):
        with pytest.raises(TypeError, match=f"the state of value cannot be saved: it .*{message}"):
            dp.save_checkpoint(tmp_path / "c", value=value)
    assert time.monotonic() - start < 5


def test_named_types_are_those_of_what_is_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Config(0.5, (2, 3))
    values = {"config": config, "versions": [Version(1, Colour.RED)], "level": Level.HIGH}
    dp.save_checkpoint(tmp_path / "c", held=Held(values), epoch=1, **values)
    given = {"config": Config(0.0), "versions": Version(0, Colour.RED), "level": Level.HIGH}
    held = Held(given)
    found = dp.load_checkpoint(tmp_path / "c", held=held, **given)
    for one in (held.state, found):
        assert {name: one[name] for name in values} == values
        assert type(one["versions"][0]) is Version and type(one["level"]) is Level
    # Without one, the other values are there, and what is missing is said.
    with caplog.at_level(logging.WARNING):
        assert dp.load_checkpoint(tmp_path / "c") == {"epoch": 1}
    assert "has config, of the type Config, which no file can import: give load_checkpoint(…, config=…)" in caplog.text
    with pytest.raises(ValueError, match=r"c: config is a Config with the fields rate.*give load_checkpoint an object"):
        dp.load_checkpoint(tmp_path / "c", config=None)
    with pytest.raises(ValueError, match=r"versions\[0\] is a Version .* the one here has the fields major: give"):
        dp.load_checkpoint(tmp_path / "c", versions=namedtuple("Version", "major")(Colour.RED))


def _optimized(cls: Any, order: list[int] | None = None, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    parameters = list(model.parameters())
    optimizer = cls([parameters[number] for number in order or range(4)], lr=0.1, **options)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer = _optimized(torch.optim.Adam)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    dp.save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, scheduler=scheduler)
    other = _optimized(torch.optim.RMSprop)[1]
    with pytest.raises(
        ValueError, match="does not fit optimizer, a RMSprop: it is the state of a Adam, and here is a RM"
    ):
        dp.load_checkpoint(tmp_path / "c", optimizer=other)
    with pytest.raises(ValueError, match="the state of a StepLR, and here is a ExponentialLR"):
        dp.load_checkpoint(tmp_path / "c", scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))


def test_parameters_in_another_order_are_refused(tmp_path: Path) -> None:
    """Both layers have the same shapes."""
    model, optimizer = _optimized(torch.optim.Adam)
    dp.save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    other, swapped = _optimized(torch.optim.Adam, [2, 3, 0, 1])
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0 is model.0.weight in the file and model.1.weight here"
    ):
        dp.load_checkpoint(tmp_path / "c", model=other, optimizer=swapped)
    compiled = torch.compile(_optimized(torch.optim.Adam)[0])
    dp.load_checkpoint(tmp_path / "c", model=compiled, optimizer=torch.optim.Adam(compiled.parameters()))


def test_a_part_of_a_module_may_be_given_or_left_out(tmp_path: Path) -> None:
    """Its parameters have a name in the module and one in the part."""
    model, optimizer = _optimized(torch.optim.Adam)
    for saved in ({"model": model, "head": model[1]}, {"head": model[1], "model": model}, {"head": model[1]}):
        dp.save_checkpoint(tmp_path / "c", **saved, optimizer=optimizer)
        for names in ({"model", "head"}, {"model"}, {"head"}, set()):
            for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
                other, swapped = _optimized(torch.optim.Adam, order)
                given = {name: {"model": other, "head": other[1]}[name] for name in names & saved.keys()}
                if order[0] and "model" in given:
                    with pytest.raises(ValueError, match=r"is model.0.weight in the file and model.1.weight here"):
                        dp.load_checkpoint(tmp_path / "c", **given, optimizer=swapped)
                elif not order[0]:
                    dp.load_checkpoint(tmp_path / "c", **given, optimizer=swapped)


def test_a_file_of_torch_save_is_told_apart(tmp_path: Path) -> None:
    for new in (True, False):
        torch.save({"model": nn.Linear(1, 1).state_dict()}, tmp_path / "c.pth", _use_new_zipfile_serialization=new)
        with pytest.raises(
            ValueError, match=r"c.pth is not a ddparity checkpoint but a pickle.*torch.load\(path, weights"
        ):
            dp.load_checkpoint(tmp_path / "c.pth", model=nn.Linear(1, 1))


def _zero(path: str, save: bool) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    if save:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        dp.save_checkpoint(path, model=model, optimizer=optimizer)
    else:
        dp.load_checkpoint(path, model=model, optimizer=optimizer)
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    return dp.fingerprint(model)


def test_a_zero_redundancy_optimizer(tmp_path: Path) -> None:
    """Each rank has a part of its state. It goes on on another number of ranks, and as the optimizer that it is of."""
    path = str(tmp_path / "c")
    (expected, _) = run_ranks(_zero, 2, path, True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    alone = torch.optim.AdamW(model.parameters(), lr=0.1)
    dp.load_checkpoint(path, model=model, optimizer=alone)
    model(torch.ones(1, 3)).sum().backward()  # as the gradients that `_zero` does not clear
    model.zero_grad()
    assert alone.state_dict()["state"][3]["step"] == 1
    assert len(set(run_ranks(_zero, 3, path, False))) == 1
    assert expected


FORMAT_2 = Path(__file__).parent / "data" / "format_2.safetensors"


def test_a_checkpoint_of_the_old_format_is_read() -> None:
    """An earlier version wrote the file; the digests are what it had in memory."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer, held = torch.optim.AdamW(model.parameters()), Held()
    loader = dp.Loader(range(8), dp.BatchPlan(8, 4, 2))
    assert dp.load_checkpoint(FORMAT_2, model=model, optimizer=optimizer, held=held, loader=loader) == {}
    assert dp.fingerprint(model) == "91a1955df6fec7be4fbf95cdc53a4168aed5dc7c563175a2a0a41f318a17936b"
    assert dp.fingerprint(optimizer.state_dict()) == "a8a29cb469ee983fc4bab676d965815ef0a23af22cd61a9277207a53031dd6b4"
    _assert_same(
        held.state,
        {
            "plain": [1, 2.5, None, "text", True, 1 << 100, float("inf"), -0.0, 2 + 3j],
            "number": 3,
            "nan": float("nan"),
            "nested": ({}, [], (), [[1], {"x": (2, "y")}]),
            "alike": {"a.b": 1, "a": {"b": 2}, 0: 3},
            "t": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
            "s": torch.tensor(3.5),
            "array": np.arange(4, dtype=np.uint32),
        },
    )
