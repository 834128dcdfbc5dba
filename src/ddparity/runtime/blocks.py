"""Context managers that say so where a script uses them without `with`, in place of doing nothing."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Block(ContextDecorator, AbstractContextManager[T, bool | None], Generic[T]):
    """What a function of `block` returns: for `with`, or as a decorator, which enters it for each call.

    It warns if it is freed before it was used.
    """

    def __init__(self, enter: Callable[[], AbstractContextManager[T, bool | None]], name: str, way_out: str) -> None:
        self._enter, self._name, self._way_out = enter, name, way_out
        self._entered: list[AbstractContextManager[T, bool | None]] = []
        caller = sys._getframe(2)
        self._unused: tuple[str, int] | None = (caller.f_code.co_filename, caller.f_lineno)

    def __enter__(self) -> T:
        self._unused = None
        entered = self._enter()
        value = entered.__enter__()
        self._entered.append(entered)
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._entered.pop().__exit__(kind, error, trace)

    def __call__(self, function: F) -> F:
        self._unused = None
        return super().__call__(function)

    def __bool__(self) -> bool:
        raise TypeError(f"{self._name}() has no truth value before it is entered: write {self._way_out}")

    def __getattr__(self, attribute: str) -> Any:
        name, way_out = vars(self).get("_name"), vars(self).get("_way_out")
        raise AttributeError(f"{name}() has no {attribute!r} before it is entered: write {way_out}")

    def __del__(self) -> None:
        if vars(self).get("_unused") is not None:
            assert self._unused is not None, "as just seen"
            message = f"{self._name}() does nothing before it is entered: write {self._way_out}"
            warnings.warn_explicit(message, RuntimeWarning, *self._unused)


def block(way_out: str) -> Callable[[Callable[P, Iterator[T]]], Callable[P, Block[T]]]:
    """Make a context manager of a generator, as `contextlib.contextmanager` does, that tells how it is used.

    Args:
        way_out: how it is written.
    """

    def decorate(function: Callable[P, Iterator[T]]) -> Callable[P, Block[T]]:
        enter = contextmanager(function)

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> Block[T]:
            name = f"ddparity.{function.__name__}"
            if args and callable(args[0]):
                raise TypeError(f"{name} got a function: as a decorator write `@{name}()`, with parentheses")
            return Block(functools.partial(enter, *args, **kwargs), name, way_out)

        return called

    return decorate
