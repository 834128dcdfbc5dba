"""Modules that a function uses are evaluated as a module that is given itself, and dicts go to keywords."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddparity as dp
from ddparity.inference.functions import modules_in
from tests.ranks import outcomes, run_ranks


class Net(nn.Module):
    """A module that takes keywords, as those of Hugging Face do, and whose output depends on its mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.drop, self.last = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: Any = None) -> torch.Tensor:
        return self.last(self.drop(self.norm(x)))

    def scores(self, batch: dict[str, Any]) -> torch.Tensor:
        return self(batch["x"])


class Holder:
    """An object of the user that holds a module, and something that is not used."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.unused = net, nn.Linear(1, 1)

    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        return self._inner(batch)

    def _inner(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.net(**batch)

    @property
    def network(self) -> nn.Module:
        return self.net

    def by_property(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.network(**batch)


class Slots:
    __slots__ = ("net",)

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def run(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.net(**batch)


class Proxy:
    """It has the attributes of another object, and its entries."""

    def __init__(self, other: Any) -> None:
        self._other = other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)

    def __getitem__(self, key: int) -> Any:
        return self._other


class OfClass:
    """Its module is an attribute of the class."""

    net: nn.Module

    @classmethod
    def by_class(cls, batch: dict[str, Any]) -> torch.Tensor:
        return cls.net(**batch)

    @staticmethod
    def alone(batch: dict[str, Any]) -> torch.Tensor:
        return OfClass.net(**batch)

    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.by_class(batch)


class Hops:
    """An object that passes a batch through many methods, to a module that it makes when it is first used."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net

    @functools.cached_property
    def net(self) -> nn.Module:
        return self._net

    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        return self._one(batch)

    def _one(self, batch: dict[str, Any]) -> torch.Tensor:
        return self._two(batch)

    def _two(self, batch: dict[str, Any]) -> torch.Tensor:
        return self._three(batch)

    def _three(self, batch: dict[str, Any]) -> torch.Tensor:
        return self._four(batch)

    def _four(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.net(**batch)


NET: nn.Module
NAMESPACE = types.ModuleType("users_models")


def _global(batch: dict[str, Any]) -> torch.Tensor:
    return NET(**batch)


def _calls_global(batch: dict[str, Any]) -> torch.Tensor:
    return _global(batch)


def _in_a_module(batch: dict[str, Any]) -> torch.Tensor:
    return NAMESPACE.net(**batch)


def _takes(batch: dict[str, Any], net: Any, which: int = 0) -> torch.Tensor:
    return net(**batch)


def _default(net: nn.Module) -> Callable[..., Any]:
    def function(batch: dict[str, Any], net: nn.Module = net) -> torch.Tensor:
        return net(**batch)

    return function


def _keyword_default(net: nn.Module) -> Callable[..., Any]:
    def function(batch: dict[str, Any], *, net: nn.Module = net) -> torch.Tensor:
        return net(**batch)

    return function


def _nested(net: nn.Module) -> Callable[..., Any]:
    def function(batch: dict[str, Any]) -> torch.Tensor:
        def inner() -> torch.Tensor:
            return net(**batch)

        return inner()

    return function


def _set_class(net: nn.Module) -> type[OfClass]:
    OfClass.net = net
    return OfClass


def _set_global(net: nn.Module) -> None:
    global NET
    NET = NAMESPACE.net = net


FUNCTIONS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "a lambda": lambda net: lambda batch: net(**batch),
    "a closure inside": _nested,
    "a bound method": lambda net: (net.module if isinstance(net, DistributedDataParallel) else net).scores,
    "a partial": lambda net: functools.partial(_takes, net=net, which=1),
    "a default": _default,
    "a default of a keyword": _keyword_default,
    "a global": lambda net: _set_global(net) or _global,
    "a function that calls another": lambda net: _set_global(net) or _calls_global,
    "another file": lambda net: _set_global(net) or _in_a_module,
    "an object": Holder,
    "its method": lambda net: Holder(net)._inner,
    "its property": lambda net: Holder(net).by_property,
    "slots": lambda net: Slots(net).run,
    "an object in a lambda": lambda net: (lambda holder: lambda batch: holder._inner(batch))(Holder(net)),
    "a list": lambda net: (lambda nets: lambda batch: nets[0](**batch))([net]),
    "a dict": lambda net: (lambda nets: lambda batch: nets["a"](**batch))({"a": (net,)[0]}),
    "a class method": lambda net: _set_class(net).by_class,
    "a static method": lambda net: _set_class(net).alone,
    "a class": lambda net: _set_class(net) and (lambda batch: OfClass.net(**batch)),
    "an object of a class": lambda net: _set_class(net) and (lambda batch: OfClass()(batch)),
    "many methods": Hops,
    "a deque": lambda net: (lambda nets: lambda batch: nets[0](**batch))(collections.deque([net])),
    "a set": lambda net: (lambda nets: lambda batch: next(iter(nets))(**batch))({net}),
    "a UserDict": lambda net: (lambda nets: lambda batch: nets["a"](**batch))(collections.UserDict(a=net)),
    "a weak reference": lambda net: (lambda one: lambda batch: one()(**batch))(weakref.ref(net)),
    "a proxy": lambda net: (lambda proxy: lambda batch: proxy.scores(batch))(
        Proxy(net.module if isinstance(net, DistributedDataParallel) else net)
    ),
    "an entry": lambda net: (lambda proxy: lambda batch: proxy[0](**batch))(Proxy(net)),
    "a decorator": lambda net: torch.no_grad()(lambda batch: net(**batch)),
    "a decorated lambda": lambda net: functools.wraps(_global)(lambda batch: net(**batch)),
    "a method of torch": lambda net: lambda batch: torch.func.functional_call(net, {}, (), batch),
}


class Pair(NamedTuple):
    net: nn.Module


@dataclasses.dataclass
class Stage:
    net: nn.Module

    def __call__(self, batch: Any) -> Any:
        return self.net(**batch)


class Base:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, batch: Any) -> Any:
        return self.net(**batch)


class CallsBase(Base):
    def __call__(self, batch: Any) -> Any:
        return super().__call__(batch)


class Partial:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def _with(self, which: int, batch: Any) -> Any:
        return self.net(**batch)

    run = functools.partialmethod(_with, 1)


class Lazy:
    def __init__(self, net: nn.Module) -> None:
        self.make = lambda: net

    @functools.cached_property
    def net(self) -> nn.Module:
        return self.make()

    def __call__(self, batch: Any) -> Any:
        return self.net(**batch)


class Decorator:
    def __init__(self, f: Any) -> None:
        self.f = f

    def __call__(self, *a: Any) -> Any:
        return self.f(*a)


class OfClosure:
    def __init__(self, net: nn.Module) -> None:
        self.run = lambda batch: net(**batch)


class Nested:
    def __init__(self, net: nn.Module) -> None:
        self.inner = Holder(net)

    def __call__(self, batch: Any) -> Any:
        return self.inner.net(**batch)


class ByNames:
    def __init__(self, net: nn.Module) -> None:
        self.nets = {"a": [net]}

    def __call__(self, batch: Any) -> Any:
        return self.nets["a"][0](**batch)


def _uses(batch: Any, holder: Any) -> Any:
    return holder.net(**batch)


def _passes_on(batch: Any, holders: list[Any]) -> Any:
    return _uses(batch, holders[0])


class PassesItself(Base):
    def __call__(self, batch: Any) -> Any:
        return _uses(batch, self)


# The ways to a module that differ only in where it is: in one process.
MORE: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "a partial of a partial": lambda net: functools.partial(functools.partial(_takes, which=1), net=net),
    "a partial of a method": lambda net: functools.partial(Holder(net)._inner),
    "a partialmethod": lambda net: Partial(net).run,
    "a named tuple": lambda net: (lambda pair: lambda batch: pair.net(**batch))(Pair(net)),
    "a dataclass": Stage,
    "super": CallsBase,
    "a cached property": Lazy,
    "cache": lambda net: (lambda cached: lambda batch: cached()(**batch))(functools.cache(lambda: net)),
    "a decorator class": lambda net: Decorator(lambda batch: net(**batch)),
    "a lambda of a lambda": lambda net: (lambda run: lambda batch: run(batch))(lambda batch: net(**batch)),
    "a function in a list": lambda net: (lambda runs: lambda batch: runs[0](batch))([lambda batch: net(**batch)]),
    "an attribute that is a lambda": lambda net: OfClosure(net).run,
    "an object in an object": Nested,
    "a namespace": lambda net: (lambda space: lambda batch: space.net(**batch))(types.SimpleNamespace(net=net)),
    "lists in a dict": ByNames,
    "forward": lambda net: net.forward and (lambda batch: net.forward(**batch)),
    "a bound forward": lambda net: (lambda forward: lambda batch: forward(**batch))(net.forward),
    "a ModuleList": lambda net: (lambda nets: lambda batch: nets[0](**batch))(nn.ModuleList([net])),
    "methodcaller": lambda net: (lambda call: lambda batch: call(Holder(net), batch))(
        lambda h, b: operator.methodcaller("_inner", b)(h)
    ),
    "reduce": lambda net: (lambda steps: lambda batch: functools.reduce(lambda x, f: f(x), steps, batch))(
        (lambda b: net(**b),)
    ),
    "a generator": lambda net: lambda batch: next(net(**b) for b in [batch]),
    "singledispatch": lambda net: functools.singledispatch(lambda batch: net(**batch)),
    "a ChainMap": lambda net: (lambda m: lambda batch: m["a"](**batch))(collections.ChainMap({"a": net})),
    "an argument": lambda net: (lambda holder: lambda batch: _uses(batch, holder))(Holder(net)),
    "an argument of a partial": lambda net: functools.partial(_uses, holder=Holder(net)),
    "an argument of further functions": lambda net: functools.partial(_passes_on, holders=[Holder(net)]),
    "an argument of a local function": lambda net: (lambda holder, use: lambda batch: use(holder, batch))(
        Nested(net), lambda one, batch: _uses(batch, one.inner)
    ),
    "self as an argument": PassesItself,
    "a class as an argument": lambda net: functools.partial(_uses, holder=_set_class(net)),
    "itemgetter": lambda net: (lambda nets: lambda batch: operator.itemgetter("a")(nets)(**batch))({"a": net}),
}


def _data() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(3, generator=generator), "labels": i} for i in range(11)]


def _through_a_function(kind: str, wrap: bool) -> Any:
    net = Net()
    wrapped = DistributedDataParallel(net) if wrap else net
    wrapped.train()
    net.drop.eval()
    before = dp.fingerprint(net)
    as_a_module = dp.predict(wrapped, _data(), 4, to="all")
    found = dp.predict((FUNCTIONS | MORE)[kind](wrapped), _data(), 4, to="all")
    assert torch.equal(found, as_a_module), (found, as_a_module)
    assert dp.fingerprint(net) == before and wrapped.training and net.norm.training and not net.drop.training
    if wrap:
        assert "forward" not in vars(wrapped) and wrapped.require_forward_param_sync
    return found.tolist()


@pytest.mark.parametrize("kind", FUNCTIONS | MORE)
def test_modules_in_a_function_are_evaluated_like_a_module(kind: str) -> None:
    _through_a_function(kind, wrap=False)


def _each(wrap: bool, kinds: list[str]) -> list[Any]:
    """Run these kinds. Shares are uneven: DDP's own forward would wait for ever."""
    return [_through_a_function(kind, wrap) for kind in kinds]


def test_ddp_is_taken_off_in_a_function_and_outputs_are_those_of_one_process() -> None:
    for world_size, kinds in ((2, list(FUNCTIONS)), (3, list(FUNCTIONS)[::6])):
        assert run_ranks(_each, world_size, True, kinds) == [_each(False, kinds)] * world_size


def _with(net: nn.Module, then: Callable[..., Any] | None = None) -> Callable[..., Any]:
    return lambda x: net(x if then is None else then(x))


def test_modules_of_one_name_are_all_found() -> None:
    one, other = nn.Dropout(0.3), nn.Dropout(0.6)
    assert list(modules_in(_with(one, _with(other))).values()) == [one, other]


def test_the_order_in_a_set_is_that_of_the_weights() -> None:
    nets = [nn.Linear(1, 1) for _ in range(20)]
    first, again = set(nets), set(copy.deepcopy(nets))
    found = [modules_in(lambda x, nets=nets: [net(x) for net in nets]) for nets in (first, again)]
    assert len(found[0]) == 20 and [dp.fingerprint(net) for net in found[0].values()] == [
        dp.fingerprint(net) for net in found[1].values()
    ]


def test_a_search_that_ends_early_is_told() -> None:
    many = [[[object() for _ in range(50)] for _ in range(50)] for _ in range(50)]
    with pytest.warns(UserWarning, match="only 100,000 of them were searched"):
        modules_in(lambda: many)


def test_a_function_may_still_choose_the_mode() -> None:
    net = Net()

    def with_dropout(batch: dict[str, Any]) -> torch.Tensor:
        net.drop.train()
        return net(**batch)

    one, other = dp.predict(with_dropout, _data(), 4), dp.predict(net, _data(), 4)
    assert not torch.equal(one, other) and net.drop.training and net.training


def test_modules_of_inputs_and_metrics_are_evaluated_too() -> None:
    net, embed = Net(), nn.Dropout(0.9)
    data = torch.ones(8, 3)
    expected = dp.predict(net, data, 4)
    assert torch.equal(dp.predict(net, data, 4, inputs=lambda batch: embed(batch)), expected)
    loss = nn.Sequential(nn.Dropout(0.9))
    total = dp.predict(net, data, 4, metric=lambda output, batch: loss(output).sum())
    assert total == pytest.approx(expected.double().sum().item())
    assert embed.training and loss[0].training


class Accumulates(nn.Module):
    """A metric, as those of torchmetrics are: its states are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(())

    def update(self, output: torch.Tensor) -> None:
        self.total = self.total + output.sum()

    def compute(self) -> torch.Tensor:
        return self.total


def test_a_metric_that_a_function_updates_keeps_its_state() -> None:
    metric = Accumulates()

    def function(x: torch.Tensor) -> torch.Tensor:
        metric.update(x)
        return x

    dp.predict(function, torch.ones(8), 4)
    assert metric.compute() == 8 and not modules_in(function)


def test_only_modules_that_the_code_names_are_found() -> None:
    holder = Holder(Net())
    assert list(modules_in(lambda batch: holder(batch))) == ["holder.net"]
    net = Net()
    assert list(modules_in(lambda batch: net.last(net(batch)))) == ["net"]  # not the layer inside
    last = net.last
    assert list(modules_in(lambda batch: last(net(batch)))) == ["net"]
    assert not modules_in(len) and not modules_in(torch.softmax) and not modules_in(nn.functional.cross_entropy)
    large = [nn.Linear(1, 1)] * 2000
    assert not modules_in(lambda batch: large[0](batch))


def _differs(kind: str) -> None:
    torch.manual_seed(dist.get_rank())
    net, other = nn.Linear(3, 1), nn.Linear(3, 1)
    with torch.no_grad():
        other.weight.zero_(), other.bias.zero_()
    holder = Holder(net)
    data = torch.ones(4, 3)
    if kind == "model":
        dp.predict(lambda x: holder.net(x), data, 2)
    elif kind == "inputs":
        dp.predict(other, data, 2, inputs=lambda x: x + net(x))
    else:
        dp.predict(other, data, 2, metric=lambda output, batch: net(batch).sum())


@pytest.mark.parametrize(
    ("kind", "name"),
    [("model", "holder.net.weight"), ("inputs", "inputs: net.weight"), ("metric", "metric: net.weight")],
)
def test_modules_of_functions_that_differ_between_ranks_are_refused(kind: str, name: str) -> None:
    for outcome in outcomes(_differs, 2, kind):
        assert f"The first difference is in the parameter '{name}': load the same" in outcome.error
        assert outcome.seconds < 10


def test_other_weights_in_a_function_are_another_run(tmp_path: Any) -> None:
    def call(net: nn.Module) -> Any:
        return dp.predict(lambda x: net(x), torch.ones(4, 3), 2, tmp_path, key="a")

    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    call(net), call(net)
    with pytest.raises(ValueError, match=r"another run: its model is .*<lambda>, net: Linear .{32}, and here"):
        call(nn.Linear(3, 1))


# Dict batches


class Positional(nn.Module):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["x"] + batch["y"]


class Keywords(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return x if y is None else x + y


class AnyKeywords(nn.Module):
    def forward(self, x: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        return x + others["y"]


class Passes(nn.Module):
    """A wrapper, as torch's AveragedModel is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    "model",
    [
        Positional(),
        Keywords(),
        AnyKeywords(),
        Passes(Positional()),
        Passes(Keywords()),
        Passes(Passes(Keywords())),
        torch.optim.swa_utils.AveragedModel(Keywords()),
        torch.compile(Keywords(), backend="eager"),
        lambda batch: batch["x"] + batch["y"],
    ],
)
def test_a_dict_goes_to_keywords_where_forward_takes_them(model: Any) -> None:
    data = [{"x": float(i), "y": 2.0 * i} for i in range(5)]
    expected = [3.0 * i for i in range(5)]
    assert dp.predict(model, data, 2).tolist() == expected
    assert dp.predict(model, [(sample, 1) for sample in data], 2, inputs=lambda batch: batch[0]).tolist() == expected


def test_a_dict_that_forward_does_not_take_names_the_keys() -> None:
    data = [{"x": 1.0, "id": i} for i in range(4)]
    with pytest.raises(dp.DDParityError, match="indices 0 to 1") as caught:
        dp.predict(nn.Sequential(Keywords(), nn.Linear(1, 1)), data, 2)
    with pytest.raises(dp.DDParityError, match="indices 0 to 1: TypeError") as caught:
        dp.predict(Scales(), data, 2)
    (note,) = caught.value.__cause__.__notes__
    assert "since forward does not take ['id']" in note and "inputs=lambda batch" in note
    assert dp.predict(Scales(), data, 2, inputs=lambda batch: {"x": batch["x"]}).tolist() == [2.0] * 4


class Scales(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


# Autograd in a forward


class Force(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad((self.layer(x) ** 2).sum(), x)
        return gradient


def _forces(wrap: bool) -> Any:
    torch.manual_seed(0)
    model = DistributedDataParallel(Force()) if wrap else Force()
    found = dp.predict(model, torch.arange(5.0)[:, None], 2, to="all")
    again = dp.predict(lambda x: model(x), torch.arange(5.0)[:, None], 2, to="all")
    assert torch.equal(found, again) and not found.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    return found.tolist()


def test_a_forward_may_use_autograd() -> None:
    torch.manual_seed(0)
    model = Force()
    by_hand = model(torch.arange(5.0)[:, None]).tolist()
    alone = _forces(wrap=False)
    assert torch.allclose(torch.tensor(alone), torch.tensor(by_hand))
    assert run_ranks(_forces, 2, True) == [alone] * 2


def test_an_output_that_requires_grad_is_detached(tmp_path: Any) -> None:
    weight = nn.Parameter(torch.ones(1))

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return x * weight

    assert not dp.predict(function, torch.ones(4, 1), 2).requires_grad
    dp.predict(lambda x: {"a": function(x), "b": list(function(x))}, torch.ones(4, 1), 2, tmp_path)
    assert dp.read_predictions(tmp_path)["a"].tolist() == [[1.0]] * 4
    assert dp.predict(function, torch.ones(4, 1), 2, metric=lambda output, batch: output.sum()) == 4.0


# Data sets that differ between ranks


class Data(torch.utils.data.Dataset[Any]):
    """Eleven samples, of which some are other ones on each rank."""

    def __init__(self, kind: str) -> None:
        self.kind, self.rank, self.draws = kind, dist.get_rank(), torch.Generator()
        self.draws.manual_seed(self.rank)

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Any:
        if self.kind == "order":
            return torch.tensor(float(index + self.rank))
        if self.kind == "last":
            return float(index + self.rank * (index == 10))
        if self.kind == "words":
            return f"word {self.rank}"
        if self.kind == "path":
            return torch.tensor(float(index)), f"/scratch/{self.rank}/{index}.png"
        if self.kind == "own generator":
            return torch.rand((), generator=self.draws)
        if self.kind == "own share" and index // 4 % 3 != self.rank:
            raise KeyError(index)
        if self.kind == "sample_seed":
            return torch.tensor(float(dp.sample_seed() % 1000)) + torch.rand(())
        return torch.tensor(float(index))


def _on_other_data(kind: str, num_workers: int) -> Any:
    def model(batch: Any) -> Any:
        return batch if isinstance(batch, torch.Tensor) else list(range(len(batch))) if kind == "words" else batch[0]

    found = dp.predict(model, Data(kind), 4, to="all", num_workers=num_workers)
    return [float(value) for value in found]


DIFFERENT = [(kind, index, workers) for kind, index in (("order", 0), ("last", 10), ("words", 0)) for workers in (0, 2)]
EQUAL = [(k, n) for k in ("equal", "path", "own generator", "own share", "sample_seed") for n in (0, 1)]


def _refusals() -> list[str]:
    errors = []
    for kind, _, num_workers in DIFFERENT:
        with pytest.raises((ValueError, dp.RankFailure)) as caught:
            _on_other_data(kind, num_workers)
        errors.append(str(caught.value))
    return errors


def test_data_sets_that_differ_between_ranks_are_refused() -> None:
    for errors in run_ranks(_refusals, 2):
        for (_, index, _), error in zip(DIFFERENT, errors, strict=True):
            assert f"data sets that differ between ranks: they have the same length, but sample {index}" in error


def _on_equal_data() -> list[Any]:
    return [_on_other_data(kind, num_workers) for kind, num_workers in EQUAL]


def test_data_sets_that_need_not_be_equal_are_not_refused() -> None:
    for rank in run_ranks(_on_equal_data, 3):
        for (kind, _), found in zip(EQUAL, rank, strict=True):
            assert len(found) == 11
            if kind not in ("own generator", "sample_seed"):
                assert found == [float(i) for i in range(11)], kind


def test_a_directory_of_a_data_set_with_sample_seeds(tmp_path: Any) -> None:
    class Seeds(list[float]):
        def __getitem__(self, index: Any) -> Any:
            return torch.tensor([float(dp.sample_seed() % 2**16)])

    for _ in range(2):
        dp.predict(nn.Identity(), Seeds([0.0] * 4), 2, tmp_path)
    assert dp.read_predictions(tmp_path).shape == (4, 1)
