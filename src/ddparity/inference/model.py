"""Run a model for evaluation: check that the ranks' models are equal, call the model, and restore it afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..comm.bits import check_words, is_same, parts, put_back
from ..compat import FullySharded, sharded_modules, uncompiled, unwrapped, without_ddp
from ..data.rng import preserve_streams
from .functions import modules_in
from .metrics import is_metric

Model = nn.Module | Callable[[Any], Any]


def reached(model: Model, **functions: Callable[..., Any] | None) -> dict[str, nn.Module]:
    """Return the modules that a prediction runs, by name: the model, or those that functions use.

    Args:
        functions: what is called beside the model, by the names of the arguments. Metrics are left out.
    """
    found = {"": model} if isinstance(model, nn.Module) else modules_in(model)
    for argument, function in functions.items():
        if function is not None and not is_metric(function):
            found |= {f"{argument}: {name}": module for name, module in modules_in(function).items()}
    return found


def callable_of(
    model: Model, inputs: Callable[[Any], Any] | None, modules: Iterable[nn.Module]
) -> tuple[Callable[[Any], Any], torch.device | None]:
    """Return the function to call with a batch, and the device that the batch must be on; None: where it is.

    The module inside DDP is called. `modules` are those that a function uses: if all of their parameters are on one
    device, it is the batch's.
    """
    if not isinstance(model, nn.Module):
        devices = {parameter.device for module in modules for parameter in module.parameters()}
        device = next(iter(devices)) if len(devices) == 1 else None
        return (model if inputs is None else lambda batch: model(inputs(batch))), device
    module = unwrapped(model)
    take = inputs or (lambda batch: batch[0] if isinstance(batch, (list, tuple)) else batch)
    keywords = _Keywords.of(module)

    def call(batch: Any) -> Any:
        argument = take(batch)
        if keywords is None or not isinstance(argument, Mapping):
            return module(argument)
        if keywords.take(argument):
            return module(**argument)
        try:
            return module(argument)
        except Exception as error:
            error.add_note(keywords.hint(argument))
            raise

    parameter = next(module.parameters(), None)
    return call, None if parameter is None else parameter.device


class _Keywords:
    """The keywords that a module's forward takes.

    `names`: of all its arguments; None: it takes any keyword. `required`: those without a default.
    """

    def __init__(self, names: set[str] | None, required: set[str]) -> None:
        self._names, self._required = names, required

    @classmethod
    def of(cls, module: nn.Module) -> _Keywords | None:
        """Return those of a module; None if they are unknown, or if forward takes none.

        A forward that takes (*args, **kwargs) and has one module inside passes them on to it, as those of torch's
        AveragedModel and of adapters do.
        """
        module = uncompiled(module)
        try:
            parameters = inspect.signature(module.forward).parameters.values()
        except (TypeError, ValueError):  # of a scripted module, for example
            return None
        kinds = {parameter.kind for parameter in parameters}
        if kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            inside = list(module.children())
            return cls.of(unwrapped(inside[0])) if len(inside) == 1 else None
        by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        named = [parameter for parameter in parameters if parameter.kind in by_keyword]
        no_keyword = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_ONLY]
        if any(parameter.default is parameter.empty for parameter in no_keyword):
            return None
        names = {parameter.name for parameter in named}
        required = {parameter.name for parameter in named if parameter.default is parameter.empty}
        return cls(None if inspect.Parameter.VAR_KEYWORD in kinds else names, required)

    def take(self, argument: Mapping[Any, Any]) -> bool:
        """Return whether forward can be called with these keywords: it takes each, and none that it needs is absent."""
        given = set(argument)
        if not given or not all(type(name) is str for name in given):
            return False
        return self._required <= given and (self._names is None or given <= self._names)

    def hint(self, argument: Mapping[Any, Any]) -> str:
        """Return why a dict was given to forward as one argument, and the way out."""
        absent = sorted(self._required - set(argument))
        other = [] if self._names is None else [name for name in argument if name not in self._names]
        reasons = [f"needs {absent}, which are not in it"] * bool(absent) + [f"does not take {other}"] * bool(other)
        return (
            f"The batch is a dict. It was given to forward as one argument, since forward "
            f"{' and '.join(reasons) or 'takes names as keywords, and these keys are none'}. To choose the keywords: "
            f"inputs=lambda batch: {{name: batch[name] for name in …}}"
        )


# Evaluate and restore

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # names of attributes


@contextmanager
def evaluating(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Run the body in eval mode and without gradients, with DDP's wrappers taken off.

    Then restore modes, buffers, wrappers and random streams, also on an exception. Gradients are switched off by
    `no_grad`, not by inference mode, so that a forward can switch them on: an energy's gradient is a force. Models of
    `fully_shard` stay gathered in the body, since ranks may have other numbers of batches.

    Collectives: none; of models of `fully_shard`, one all-gather for each part.

    Raises:
        ValueError: a module is lazy: its parameters would be made here.
    """
    roots = list(roots)
    modules = list({id(module): module for root in roots for module in root.modules()}.values())
    if lazy := [type(module).__name__ for module in modules if _is_lazy(module)]:
        raise ValueError(
            f"predict() got a model with a {lazy[0]} that has not seen its input: run one batch through it before"
        )
    modes = [(module, module.training) for module in modules]
    before = [(module, _Attributes(module), dict(module._buffers), set(_not_saved(module))) for module in modules]
    copies = {id(one): (one, one.clone()) for _, _, named, _ in before for one in named.values() if one is not None}
    try:
        with preserve_streams(), torch.no_grad(), without_ddp(modules):
            for root in roots:
                root.eval()
            with ExitStack() as stack:
                for sharded in _outermost(modules):
                    stack.enter_context(FullySharded(sharded).gathered())
                yield
    finally:
        for module, training in modes:
            if type(module).train is not nn.Module.train and module.training != training:
                module.train(training)  # it does more than set the mode: a layer may merge its weights, for example
        for module, training in modes:
            module.training = training
        for module, attributes, named, not_saved in before:
            module._buffers.clear()
            module._buffers.update(named)
            _not_saved(module).clear()
            _not_saved(module).update(not_saved)
            attributes.forget_tensors()
        for buffer, kept in copies.values():
            # Compared by content, since `.data` and NumPy write without a trace. Written only where it differs, since
            # a later backward may need the buffer unchanged.
            if not is_same(buffer, kept):
                put_back(buffer, kept)


def _outermost(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules that `fully_shard` was called on, without those inside of others."""
    inside: set[int] = set()
    for module in modules:
        if id(module) not in inside and (sharded := sharded_modules(module)) and sharded[0] is module:
            inside.update(map(id, sharded))
            yield module


def _is_lazy(module: nn.Module) -> bool:
    own = [*module._parameters.values(), *module._buffers.values()]
    return any(one is not None and is_lazy(one) for one in own)


def _not_saved(module: nn.Module) -> set[str]:
    """Return the names of the buffers that are not in the module's state dict."""
    return module._non_persistent_buffers_set


_CONTAINERS = (dict, list, tuple)
_DEPTH = 8  # of containers inside of each other


class _Attributes:
    """A module's attributes before a prediction, to remove the tensors that it caches there during the prediction.

    They have no gradient, so a training that used them would be wrong. Each is an attribute, or is in dicts, lists and
    tuples inside of each other that are an attribute. Anything else that the module keeps there stays, such as a count
    of its calls.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._before = module, _own(module)
        self._containers: dict[int, tuple[Any, Any]] = {}
        for value in self._before.values():
            self._keep(value)

    def _keep(self, value: Any) -> None:
        if not isinstance(value, _CONTAINERS) or id(value) in self._containers:
            return
        if not isinstance(value, tuple):
            self._containers[id(value)] = value, dict(value) if isinstance(value, dict) else list(value)
        for item in value.values() if isinstance(value, dict) else value:
            self._keep(item)

    def forget_tensors(self) -> None:
        for container, before in self._containers.values():
            if isinstance(container, dict):
                _forget(container, before, container)
            elif any(_holds_tensors(item) and not any(item is one for one in before) for item in container):
                container[:] = before  # items may have moved, as in a sliding window
        _forget(vars(self._module), self._before, _own(self._module))


def _own(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes without those that every module has."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def _forget(values: dict[Any, Any], before: dict[Any, Any], candidates: dict[Any, Any]) -> None:
    for name, value in list(candidates.items()):
        if value is not before.get(name) and _holds_tensors(value):
            if name in before:
                values[name] = before[name]
            else:
                del values[name]


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if not isinstance(value, _CONTAINERS) or depth > _DEPTH:
        return False
    return any(_holds_tensors(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value))


# Compare between ranks

_DIGITS = 8  # hex digits of a word of 32 bits

_PARAMETERS = (
    "load the same checkpoint on every rank, or call seed_everything before the model is made, or wrap the model, "
    "which sends rank 0's parameters to all ranks (replicate, or torch's DistributedDataParallel)"
)
_BUFFERS = (
    "in a training with torch's DistributedDataParallel each rank's buffers, such as the running statistics of a batch "
    "norm, follow its own batches, and the other ranks get rank 0's only with the next forward in training. Use "
    "convert_sync_batchnorm(model), or run the steps in accumulate(), which exchanges running statistics; or send rank "
    "0's before predict(): for buffer in model.buffers(): torch.distributed.broadcast(buffer, 0)"
)


class Checksums:
    """A checksum for each tensor of this rank's model: its parameters, and those buffers that a checkpoint has.

    It leaves out what may differ: buffers that are not saved, such as a cache; shards of a distributed tensor.

    Args:
        modules: by name, see `reached`.
        is_function: whether the model is a function that uses these modules.

    `text`: 8 characters for each tensor, after one for the model's kind.
    """

    def __init__(self, modules: Mapping[str, nn.Module], is_function: bool = False) -> None:
        self._names: list[str] = []
        held, headers = [], []
        with torch.no_grad():
            for name, tensor in _saved_tensors(modules):
                memory = parts(tensor)
                if memory is not None:
                    held.append(memory)
                    headers.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.layout}")
                    self._names.append(name)
            words = check_words(held, headers)
        self.text = ("f" if is_function else "m") + "".join(f"{word:0{_DIGITS}x}" for word in words)

    def difference(self, theirs: str) -> str:
        """Return the error message for another rank's text that is not this one's."""
        if self.text[0] != theirs[0]:
            return "predict() got a module on one rank and a function on another: give the same model on every rank"
        words = zip_longest(_words(self.text), _words(theirs))
        first = next(number for number, (ours, other) in enumerate(words) if ours != other)
        name = self._names[first] if first < len(self._names) else "one that this rank does not have"
        return (
            f"predict() got models that differ between ranks, so that outputs would depend on the number of processes. "
            f"The first difference is in the {name}: {_BUFFERS if name.startswith('buffer') else _PARAMETERS}"
        )


def _saved_tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for root, wrapped in modules.items():
        module, start = unwrapped(wrapped), f"{root}." if root else ""
        for name, parameter in module.named_parameters():
            yield f"parameter {start + name!r}", parameter
        not_saved = {
            f"{path}.{name}" if path else name for path, one in module.named_modules() for name in _not_saved(one)
        }
        for name, buffer in module.named_buffers():
            if name not in not_saved:
                yield f"buffer {start + name!r}", buffer


def _words(text: str) -> list[str]:
    return [text[start : start + _DIGITS] for start in range(1, len(text), _DIGITS)]
