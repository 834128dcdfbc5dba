"""The objects of a checkpoint: which have a state, which are values, and what is compared before a state is loaded."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..compat import uncompiled, unwrapped, zero_redundancy
from .fingerprint import plain_name


def sorted_out(objects: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the objects with a state, without the wrappers of DDP and torch.compile, and the values.

    Raises:
        TypeError: an object is neither.
    """
    stateful, values = {}, {}
    for name, value in objects.items():
        value = unwrapped(uncompiled(unwrapped(value))) if isinstance(value, nn.Module) else value
        methods = [hasattr(value, "state_dict"), hasattr(value, "load_state_dict")]
        if all(methods):
            stateful[name] = value
        elif any(methods):
            raise TypeError(
                f"{name}, a {type(value).__name__}, has only one of state_dict and load_state_dict: give an object "
                f"that has both"
            )
        else:
            values[name] = value
    return stateful, values


def state_of(value: Any) -> Any:
    zero = zero_redundancy(value)
    if zero is None:
        return value.state_dict()
    zero.consolidate_state_dict(0)  # each rank has a part of it; afterwards rank 0 has all
    return zero.state_dict() if is_first() else {}


def about_of(stateful: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return what is compared at a load, because torch would take another state without an error."""
    about: dict[str, Any] = {name: {"value": True} for name in values}
    for name, value in stateful.items():
        if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
            about[name] = {"class": type(value).__qualname__}
        if isinstance(value, torch.optim.Optimizer):
            about[name] = {
                "class": _class_of(value),
                "shapes": [[list(parameter.shape) for parameter in group["params"]] for group in value.param_groups],
                "names": [[names[0] if names else None for names in group] for group in _names_of(value, stateful)],
            }
    return about


def _class_of(optimizer: torch.optim.Optimizer) -> str:
    zero = zero_redundancy(optimizer)
    return type(optimizer if zero is None else zero.optim).__qualname__


def _names_of(optimizer: torch.optim.Optimizer, stateful: dict[str, Any]) -> list[list[list[str]]]:
    """Return the names of an optimizer's parameters, by group, in the modules that are saved or loaded with it.

    A parameter has several if a module and a part of it are given: the one in the whole module comes first.
    """
    names: dict[int, list[str]] = {}
    modules = [(name, dict(module.named_parameters())) for name, module in _modules(stateful).items()]
    for name, parameters in sorted(modules, key=lambda module: -len(module[1])):
        for own, parameter in parameters.items():
            names.setdefault(id(parameter), []).append(f"{name}.{plain_name(own)}")
    return [[names.get(id(parameter), []) for parameter in group["params"]] for group in optimizer.param_groups]


def _modules(stateful: dict[str, Any]) -> dict[str, nn.Module]:
    return {name: value for name, value in stateful.items() if isinstance(value, nn.Module)}


def check_about(misfit: str, saved: Any, value: Any, stateful: dict[str, Any]) -> None:
    """Refuse a state of another optimizer or scheduler, or of other parameters: torch would take it without an error.

    Raises:
        ValueError: it does not fit; begins with `misfit`.
    """
    own = about_of({"": value}, {}).get("")
    if own is None or type(saved) is not dict:
        return
    if not _is_about(saved):
        raise ValueError(f"{misfit}: the file does not say of what it is the state")
    if "class" in saved and saved["class"] != own["class"]:
        raise ValueError(
            f"{misfit}: it is the state of a {str(saved['class'])[:80]}, and here is a {own['class']}: make the same "
            f"again, or leave it out of load_checkpoint"
        )
    if "shapes" in own and "shapes" in saved and saved["shapes"] != own["shapes"]:
        raise ValueError(f"{misfit}: {_first_difference(saved['shapes'], own['shapes'])}")
    if "names" in own and saved.get("names") is not None:
        names, given = _names_of(value, stateful), tuple(f"{name}." for name in _modules(stateful))
        for group, (theirs, ours) in enumerate(zip(saved["names"], names, strict=True)):
            for number, (one, others) in enumerate(zip(theirs, ours, strict=True)):
                # A name in a module that is not given here says nothing.
                if one is not None and others and one not in others and one.startswith(given):
                    raise ValueError(
                        f"{misfit}: parameter {number} of group {group} is {one[:200]} in the file and {others[0]} "
                        f"here: give the optimizer the parameters in the same order"
                    )


def _is_about(saved: dict[str, Any]) -> bool:
    """Return True if a file's entry has groups of shapes and of names, one for each parameter, where it has them."""
    shapes, names = saved.get("shapes", []), saved.get("names")
    if names is not None and "shapes" not in saved:
        return False
    for groups in (shapes, [] if names is None else names):
        if type(groups) is not list or not all(type(group) is list for group in groups):
            return False
    if not all(type(shape) is list for group in shapes for shape in group):
        return False
    if names is None:
        return True
    texts = all(name is None or type(name) is str for group in names for name in group)
    return texts and [len(group) for group in names] == [len(group) for group in shapes]


def _first_difference(saved: list[list[list[int]]], own: list[list[list[int]]]) -> str:
    """Return the first difference between the shapes of an optimizer's parameters in the file and its own shapes."""
    for group, (saved_shapes, own_shapes) in enumerate(zip(saved, own, strict=False)):
        for number, (one, other) in enumerate(zip(saved_shapes, own_shapes, strict=False)):
            if one != other:
                return f"parameter {number} of group {group} is {tuple(one)} in the file and {tuple(other)} here"
    counts = [[len(shapes) for shapes in groups] for groups in (saved, own)]
    return f"its groups have {counts[0]} parameters in the file and {counts[1]} here"


def is_first() -> bool:
    """Return True on rank 0, and without a process group."""
    return not dist.is_initialized() or dist.get_rank() == 0
