"""Collect in one place what differs between torch versions (2.6 and later) and what torch keeps private."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import multiprocessing.connection
import os
import signal
import socket
import struct
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.distributed.utils import _to_kwargs
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, get_worker_info

if TYPE_CHECKING:  # torch.distributed exports these in a way that type checkers do not see
    from torch._C._distributed_c10d import AllgatherOptions, HashStore, PrefixStore, Store, TCPStore
else:
    from torch.distributed import HashStore, PrefixStore, Store, TCPStore
    from torch.distributed.distributed_c10d import AllgatherOptions

__all__ = ["HashStore", "PrefixStore", "Store", "TCPStore"]


# Process groups and collectives.


def all_gather_single(
    output: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """All-gather into one flat tensor. torch 2.13 renamed the function and the method."""
    backend = _direct_backend(value, group)
    if backend is None:
        function: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return function(output, value, group=group, async_op=async_op)
    options = AllgatherOptions()
    options.asyncOp = async_op
    work = (getattr(backend, "all_gather_single", None) or backend._allgather_base)(output, value, options)
    if async_op:
        return work
    if work is not None:  # some backends have waited already
        work.wait()
    return None


def all_to_all_single(
    output: torch.Tensor, value: torch.Tensor, rows: list[int], group: dist.ProcessGroup | None = None
) -> Any:
    """Start to send so many rows to each rank, and to receive as many from it; return the work without a wait."""
    backend = _direct_backend(value, group)
    if backend is None:
        return dist.all_to_all_single(output, value, rows, rows, group=group, async_op=True)
    return backend.alltoall_base(output, value, rows, rows)


def averages_scattered(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return True if a reduce-scatter averages where it is asked to. Gloo of torch 2.7 adds, without a word.

    Collectives: one of 4 bytes a rank; all ranks call it.
    """
    function: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    output = torch.zeros(1, device=device)
    function(output, torch.ones(group.size(), device=device), op=dist.ReduceOp.AVG, group=group)
    return float(output) == 1.0


def _direct_backend(value: torch.Tensor, group: dist.ProcessGroup | None) -> Any:
    """Return the backend of the group for such a tensor; None where another tool observes torch's operators.

    A call through torch.distributed and torch's operator takes twice as long for a small tensor: they check and box
    the arguments for as long as Gloo sends.
    """
    if torch._C._len_torch_dispatch_stack() or not is_plain_tensor(value):
        return None
    whole_group: Any = dist.group.WORLD if group is None else group
    return whole_group._get_backend(value.device)


def grad_dtype(parameter: torch.Tensor) -> torch.dtype:
    """Return the dtype of a parameter's gradient; since torch 2.10 it may be another one than the parameter's.

    Raises:
        TypeError: gradients of any dtype are allowed, so that ranks need not have one dtype.
    """
    declared: torch.dtype | None = getattr(parameter, "grad_dtype", parameter.dtype)
    if declared is None:
        raise TypeError(
            f"a parameter of shape {tuple(parameter.shape)} has grad_dtype=None, so its gradients may have another "
            f"dtype on each rank: set its grad_dtype to one, such as torch.float32"
        )
    return declared


def flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the elements of tensors of one dtype and device, behind each other, in one call of C++."""
    flat: torch.Tensor = torch._utils._flatten_dense_tensors(tensors)
    return flat


def unflatten(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return views of what `flatten` made of tensors of these shapes, none of them empty."""
    views: tuple[torch.Tensor, ...] = torch._utils._unflatten_dense_tensors(flat, like)
    return views


def is_unused(tensor: torch.Tensor) -> bool:
    """Return whether this tensor alone uses its memory, so that writing there changes nothing that anybody has.

    False where torch cannot tell, and where another process can see the memory.
    """
    if _STORAGE_USES is None or _references(tensor) != _OF_ONE_TENSOR:
        return False
    storage = tensor.untyped_storage()
    same_memory = not storage.is_shared() and storage.nbytes() == tensor.nbytes
    return same_memory and not weakref.getweakrefcount(storage) and not vars(storage)


def _references(tensor: torch.Tensor) -> tuple[int, int]:
    """Return how often C++, where torch can tell, and Python refer to a tensor's storage."""
    storage = tensor.untyped_storage()
    return _STORAGE_USES(storage._cdata) if _STORAGE_USES is not None else 0, sys.getrefcount(storage)


_STORAGE_USES: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
with torch.utils._python_dispatch._disable_current_modes():  # one of them may keep what is made
    _OF_ONE_TENSOR = _references(torch.empty(1, device="cpu"))


def compares_calls() -> bool:
    """Return True if TORCH_DISTRIBUTED_DEBUG=DETAIL is set: torch then compares the ranks' calls before they run."""
    return dist.get_debug_level() == dist.DebugLevel.DETAIL  # type: ignore[attr-defined]  # exported unseen by checkers


def group_name(group: dist.ProcessGroup) -> str:
    """Return the group's name: the same on all of its ranks, and different for each group."""
    return str(group.group_name)


def group_of_name(name: str) -> dist.ProcessGroup:
    """Return the process group of this name: a compiled graph contains the name, not the group."""
    # Private, and typed for a name of torch's own kind, which is a str.
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]  # see above


def group_timeout_s(group: dist.ProcessGroup | None) -> float:
    """Return the time-out of a group's collectives in seconds; torch's default where the group does not say."""
    whole_group: Any = dist.group.WORLD if group is None else group
    try:
        limit = whole_group._get_backend(whole_group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):  # a wrapper, or a backend of another library
        limit = dist.default_pg_timeout
    return float(limit.total_seconds())


def ranks_of_groups() -> dict[str, list[int]]:
    """Return the global ranks of the process groups that this process is in, by the groups' names."""
    return {name: sorted(dist.distributed_c10d._world.pg_group_ranks[group]) for name, group in _groups().items()}


def numbers_of_groups() -> dict[str, dict[str, int]]:
    """Return the number of the last collective that this process called in each group, by group and backend."""
    found: dict[str, dict[str, int]] = {}
    for name, group in _groups().items():
        for device in group._device_types:
            backend = group._get_backend(device)
            if hasattr(backend, "_get_sequence_number_for_group"):
                found.setdefault(name, {})[backend.name()] = backend._get_sequence_number_for_group()
    return found


def place_in_world() -> tuple[int, int] | None:
    """Return this process's rank in the default process group and the group's size; None without such a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else None


def _groups() -> dict[str, Any]:
    known: Any = getattr(dist.distributed_c10d, "_world", None)
    if known is None:
        return {}
    return {str(known.pg_names[group]): group for group in list(known.pg_group_ranks) if group in known.pg_names}


def flight_record() -> bytes | None:
    """Return the process's last collectives as the worker server gives them; None where this torch has no record."""
    module = torch._C._distributed_c10d if dist.is_available() else None
    dump: Any = getattr(module, "_dump_fr_trace_json", None)
    if dump is None:
        return None
    text: bytes | str = dump()
    return text.encode() if isinstance(text, str) else text


def serve_flight_records(path: str) -> bool:
    """Open torch's worker server on a Unix socket until the process ends; return False where this torch has none."""
    module = torch._C._distributed_c10d if dist.is_available() else None
    server_type: Any = getattr(module, "_WorkerServer", None)
    if server_type is None:
        return False
    try:
        server = server_type(path)
    except (RuntimeError, TypeError):
        return False
    # Never destroy it: its destructor warns, and its shutdown may wait for ever for a server that has just started.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(server))
    return True


def add_server_handler(name: str, handler: Callable[[Any, Any], None]) -> None:
    """Let torch's worker server answer requests of this name by a function of (request, response), if it can."""
    register: Any = getattr(torch._C._distributed_c10d, "_register_handler", None)
    if register is not None:
        ctypes.pythonapi.Py_IncRef(
            ctypes.py_object(handler)
        )  # C++ would destroy it without the GIL, after Python's end
        register(name, handler)


# Stores.


def default_store() -> Store:
    """Return the key-value store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def append(store: Store, key: str, text: str) -> None:
    """Append a text to a key of a store. The store does this as one operation, so that ranks cannot interfere."""
    store.append(key, text)  # type: ignore[attr-defined]  # torch's type stubs lack the method


def is_store(address: tuple[str, int], timeout_s: float) -> bool:
    """Return True if torch's store listens at (host, port).

    The store sends back the number in a client's first two messages.

    Raises:
        OSError: no connection could be made.
    """
    validate, magic, ping, number = 0, 0x3C85F7CE, 13, os.getpid()
    with socket.create_connection(address, timeout_s) as connection:
        try:
            connection.sendall(struct.pack("=BIBI", validate, magic, ping, number))
            return connection.recv(4) == struct.pack("=I", number)
        except (TimeoutError, ConnectionError):
            return False


def serve_store(listener: socket.socket, timeout: timedelta, clients: int | None = None) -> TCPStore:
    """Open torch's store at a bound socket, and nowhere else; return this process's connection to it.

    torch itself would listen on all addresses. `clients`: wait for so many connections, this one included.
    """
    address, port = listener.getsockname()[:2]
    waits, number = clients is not None, listener.detach()  # the store closes the socket
    start = functools.partial(
        TCPStore, address, port, clients, True, timeout, wait_for_workers=waits, master_listen_fd=number
    )
    if torch.__version__.startswith("2.6."):  # it would write an error of its own to stderr, too
        return start(use_libuv=False)
    try:
        return start()
    except RuntimeError as error:
        if "listen fd" not in str(error):
            raise
        return start(use_libuv=False)


@functools.cache
def recognises_stores() -> bool:
    """Return True if `is_store` works with this torch: no documentation promises the answer that it expects."""
    own = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10), wait_for_workers=False)
    return is_store(("127.0.0.1", own.port), 10.0)


# DDP and modules.
def has_built_in_hook(model: DistributedDataParallel) -> bool:
    """Return True if the module has a communication hook of torch's C++, which leaves no other trace in Python."""
    return bool(model._get_ddp_logging_data().get("comm_hook"))


def broadcast_buffers(model: DistributedDataParallel) -> None:
    """Run the broadcast of buffers that DDP runs in a forward, if the module has any to broadcast."""
    model.require_forward_param_sync = True
    if model.will_sync_module_buffers():
        model._sync_buffers()


def set_flags(model: DistributedDataParallel, reduces: bool, broadcasts: bool) -> None:
    """Set whether the next backward reduces, and whether forwards broadcast buffers; the next one does not.

    Not by assignment: `nn.Module.__setattr__` takes ten times as long.
    """
    model.__dict__["require_backward_grad_sync"] = reduces
    model.__dict__["require_forward_param_sync"] = False
    model.__dict__["broadcast_buffers"] = broadcasts


def disarm(model: DistributedDataParallel) -> None:
    """Make the next backward reduce nothing, also after a forward that prepared DDP for it.

    DDP forgets its order of buckets.
    """
    model.reducer._reset_state()


def joins(model: DistributedDataParallel) -> bool:
    """Return True inside of the model's `join()`, which answers collectives of ranks that have more batches."""
    config = getattr(model, "_join_config", None)
    return config is not None and bool(config.enable)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside of DDP, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def without_ddp(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Let each DDP module among these run the module inside of it alone, until the end of the body.

    DDP's own forward broadcasts buffers and prepares a reduction, so it would wait for ranks that call it less often.
    It also moves its inputs to its device. This is kept.
    """
    wrapped = [one for one in modules if isinstance(one, DistributedDataParallel) and take_off(one)]
    try:
        yield
    finally:
        for one in wrapped:
            put_on(one)


def take_off(model: DistributedDataParallel) -> bool:
    """Let a DDP module run the module inside of it alone, until `put_on`; return False if it has a forward of its own.

    In a forward that neither reduces nor broadcasts, DDP's own takes a third of a small model's time.
    """
    if "forward" in vars(model) or type(model).forward is not DistributedDataParallel.forward:
        return False
    inside = _taken_off.get(model)
    if inside is None:  # one for good: torch.compile guards on it
        inside = _taken_off[model] = _Inside(model)
    vars(model)["forward"] = inside
    return True


def put_on(model: DistributedDataParallel) -> None:
    """Let a DDP module be what it was before `take_off`."""
    vars(model).pop("forward", None)


_taken_off: weakref.WeakKeyDictionary[DistributedDataParallel, _Inside] = weakref.WeakKeyDictionary()


class _Inside:
    """The forward of a DDP module that is taken off; in a copy and in a pickle, DDP's own."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = weakref.ref(model)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        model = self._model()
        assert model is not None, "it is the model that calls"
        return _forward_inside(model, *inputs, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (DistributedDataParallel.forward, self._model())


def _forward_inside(model: DistributedDataParallel, *inputs: Any, **kwargs: Any) -> Any:
    if model.device_ids:
        device = torch.device(model.device_type, model.device_ids[0])
        moved, moved_kwargs = _to_kwargs(inputs, kwargs, device, model.use_side_stream_for_tensor_copies)
        inputs, kwargs = moved[0], moved_kwargs[0]
    return model.module(*inputs, **kwargs)


def layer_versions(state: Any) -> dict[str, Any] | None:
    """Return the versions of a module's layers from its state dict: layers need them to read older states."""
    found = getattr(state, "_metadata", None)
    return None if found is None else {name: dict(entry) for name, entry in found.items()}


def with_layer_versions(state: dict[str, Any], versions: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict that has these versions of layers."""
    ordered = OrderedDict(state)
    ordered._metadata = OrderedDict(versions)  # type: ignore[attr-defined]  # where torch reads them
    return ordered


# Modules of `fully_shard` (FSDP2).


def sharded_modules(model: torch.nn.Module) -> list[Any]:
    """Return the modules of a model that `fully_shard` was called on, outer ones first, without an import of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def holds_old_fsdp(model: torch.nn.Module) -> bool:
    """Return True if a module of FullyShardedDataParallel, FSDP1, is in a model."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(one, fsdp.FullyShardedDataParallel) for one in model.modules())


class FullySharded:
    """What `fully_shard` keeps of a model's parameters and of their gradients in a step.

    torch has no public way to reduce the gradients that backwards have left unreduced but another backward, which a
    rank without data has not, and none to ask for what its setters have set.

    Attributes:
        modules: those that `fully_shard` was called on, the model first.
        mesh: the ranks. device: that of the computation; shards may be elsewhere.
        divisor: what the sum over the ranks is divided by, if it was set, else None.

    Raises:
        ValueError: parts of the model differ in their mesh or in `set_gradient_divide_factor`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.modules = sharded_modules(model)
        self._root = self.modules[0]._get_fsdp_state()
        self._root._lazy_init()
        self.reshard()
        states = {id(state): state for state in (module._get_fsdp_state() for module in self.modules)}
        self._groups = [group for state in states.values() for group in _groups_of(state)]
        if not self._groups:
            raise ValueError("fully_shard() has found no parameter in this model")
        self._params = [one for group in self._groups for one in group.fsdp_params]
        meshes = [group.mesh_info.mesh for group in self._groups]
        if any(mesh != meshes[0] for mesh in meshes):
            raise ValueError("parts of the model were given to fully_shard() with different meshes: give all the same")
        old = "reduce_scatter_reduce_op"  # an operation in place of a number, in torch 2.6
        divisors = {getattr(one, "gradient_divide_factor", getattr(one, old, None)) for one in self._groups}
        if len(divisors) > 1 or not all(one is None or isinstance(one, (int, float)) for one in divisors):
            raise ValueError(
                "parts of the model have different divisors, or one that is no number: call "
                "set_gradient_divide_factor() with the same number on all of them, or leave it out"
            )
        self.mesh, self.device, self.divisor = meshes[0], self._groups[0].device, next(iter(divisors))

    @property
    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and shards of all parameters. An optimizer has them; the model has whole ones while it is gathered."""
        return [(one._param_fqn or "a parameter", one.sharded_param) for one in self._params]

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Let no backward reduce in the body. At its end parameters are shards."""
        names = ("reduce_grads", "all_reduce_grads", "reduce_scatter_unused_params")
        before = [(group, *(getattr(group, name, False) for name in names)) for group in self._groups]
        self.reshard()  # whole parameters that a forward has left would hide what an optimizer did since
        try:
            self.let_reduce(False)
            yield
        finally:
            _put_back(before, names)
            self.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather all parameters, and keep them so until the end of the body, through forwards and backwards.

        Collectives: one all-gather for each part of the model that is not gathered yet.
        """
        before = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in self._groups]
        try:
            for group in self._groups:
                group.post_forward_mesh_info, group.reshard_after_backward = None, False
            for module in self.modules:
                module.unshard()
            yield
        finally:
            _put_back(before, ("post_forward_mesh_info", "reshard_after_backward"))
            self.reshard()

    def reshard(self) -> None:
        """Free the whole parameters. Those that are left would hide what an optimizer does to the shards."""
        for module in self.modules:
            module.reshard()

    def let_reduce(self, reduces: bool) -> None:
        """Let the next backward reduce each part as soon as its gradients are complete, or not.

        A parameter that has no gradient on this rank then counts as zeros, see `can_reduce_early`.
        """
        self.modules[0].set_requires_gradient_sync(reduces)
        for group in self._groups:
            group.reduce_scatter_unused_params = reduces

    def can_reduce_early(self, alone: bool) -> bool:
        """Return True if ranks may differ in the parameters that a backward that reduces gives gradients.

        torch 2.14 and later can add zeros for the others, in the dtype of the parameter.

        Args:
            alone: no gradients of earlier backwards are there, which may have another dtype.
        """
        adds_zeros = all(hasattr(type(module), "set_reduce_scatter_unused_params") for module in self.modules)
        return adds_zeros and (alone or all(one.reduce_dtype is None for one in self._params))

    def make_whole_parameters(self) -> None:
        """Let torch make the whole parameters, which it keeps without memory from their first use on.

        Collectives: one all-gather for each part that was not used yet; its memory is freed before the next.
        """
        for module in self.modules:
            for group in _groups_of(module._get_fsdp_state()):
                if not all(hasattr(one, "_unsharded_param") for one in group.fsdp_params):
                    module.unshard()
                    module.reshard()

    @property
    def averages(self) -> bool:
        """Whether torch asks the backend for an average. It divides by itself in float64 and float16."""
        dtypes = {one.reduce_dtype or one.param_dtype or one.orig_dtype for one in self._params}
        return self.divisor is None and not dtypes.isdisjoint((torch.float32, torch.bfloat16))

    def on_gradient(self, seen: Callable[[int], None]) -> list[Any]:
        """Call `seen` with a parameter's number whenever a backward gives it a gradient; return handles to remove."""

        def hook(number: int, _: torch.Tensor) -> None:
            seen(number)

        return [
            one._unsharded_param.register_post_accumulate_grad_hook(functools.partial(hook, number))
            for number, one in enumerate(self._params)
            if one._unsharded_param.requires_grad
        ]

    def unreduced(self) -> list[torch.Tensor | None]:
        """Return this rank's gradient of each parameter as far as it is not reduced."""
        return [_unreduced(one) for one in self._params]

    @torch.no_grad()
    def reduce(self, wanted: Sequence[bool]) -> None:
        """Reduce the gradients of these parameters into their shards. A rank without one adds zeros. All ranks call it.

        Collectives: one reduce-scatter for each part of the model that has such a parameter.
        """
        for one, is_wanted in zip(self._params, wanted, strict=True):
            one.accumulate_unsharded_grad_if_needed()
            if hasattr(one, "_unsharded_param"):
                one.to_accumulated_grad_if_needed()
            if is_wanted and _unreduced(one) is None:
                like = one._unsharded_param
                dtype = one.reduce_dtype or like.dtype
                one.unsharded_accumulated_grad = torch.zeros_like(like, dtype=dtype, requires_grad=False)
        for group in self._groups:
            group.reduce_grads, group.all_reduce_grads, group.reduce_scatter_unused_params = True, True, False
            group._training_state = type(group._training_state).IDLE
        self._root._root_post_backward_final_callback()  # torch's own at the end of a backward

    def drop(self) -> None:
        """Drop gradients that are not reduced, and what a forward or backward that was interrupted has left."""
        reset = getattr(self.modules[0], "reset_iter_state", None)  # torch 2.14 and later
        if reset is not None:
            reset()
        for group in self._groups:
            group._training_state = type(group._training_state).IDLE
        self._root._state_ctx.iter_forward_root = None
        self._root._state_ctx.post_backward_final_callback_queued = False
        for one in self._params:
            one.unsharded_accumulated_grad = None
            if hasattr(one, "_unsharded_param"):
                one._unsharded_param.grad = None


def _groups_of(state: Any) -> list[Any]:
    """Return the groups of parameters of one `fully_shard`: several since torch 2.12, before that one or None."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [one for one in (state._fsdp_param_group,) if one is not None]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a DTensor; any other tensor as it is."""
    held: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return held


def version(tensor: torch.Tensor) -> int:
    """Return what grows with each write. A DTensor has two: of its own operators, and of those on what is local."""
    held = local(tensor)
    return int(tensor._version) + (0 if held is tensor else int(held._version))


def _unreduced(parameter: Any) -> torch.Tensor | None:
    whole = getattr(parameter, "_unsharded_param", None)  # since the first all-gather
    found: torch.Tensor | None = parameter.unsharded_accumulated_grad
    return found if found is not None or whole is None else whole.grad


def _put_back(before: Sequence[tuple[Any, ...]], names: Sequence[str]) -> None:
    for owner, *values in before:
        for name, value in zip(names, values, strict=True):
            setattr(owner, name, value)


# The compiler and autograd.


def is_compiled(module: torch.nn.Module) -> bool:
    """Return True if `torch.compile(module)` or `module.compile()` compiled this module's forward."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside of `torch.compile(module)`, or the module itself."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def constant_in_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as `torch.compiler.assume_constant_result` does, but without a compiler import of 1 s."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch's mark on functions
    return function


def untraced(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Return a partial call that `torch.compile` leaves as it is, for hooks: a compiled function may have a backward.

    Nothing imports the compiler for it, which takes a second.
    """
    if "torch._dynamo" in sys.modules:
        return functools.partial(_untraced_call(), function, *arguments)
    return functools.partial(function, *arguments)


@functools.cache
def _untraced_call() -> Callable[..., Any]:
    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    disabled: Callable[..., Any] = torch.compiler.disable(call)
    return disabled


def in_transform() -> bool:
    """Return True inside of a torch.func transform, such as `torch.func.grad`."""
    return torch._C._are_functorch_transforms_active()


def in_backward() -> bool:
    """Return True inside of a backward: a forward there recomputes what activation checkpointing did not keep."""
    return torch._C._current_graph_task_id() != -1


def recomputation_ended() -> bool:
    """Return True where activation checkpointing ends a forward, since all that it recomputes has been computed."""
    stop: Any = getattr(torch.utils.checkpoint, "_StopRecomputationError", None)
    return stop is not None and isinstance(sys.exc_info()[1], stop)


# Tensors and random generators.


def is_plain_tensor(x: torch.Tensor) -> bool:
    """Return True if the tensor is only its memory: of no subclass, and not wrapped by a torch.func transform."""
    plain = type(x) is torch.Tensor or type(x) is torch.nn.Parameter
    return plain and not is_functorch_wrapped_tensor(x)


def is_dtensor(value: object) -> bool:
    """Return True if the value is a DTensor, such as a parameter of `fully_shard`, without an import of DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # its import takes a second, and no DTensor is without it
    return module is not None and isinstance(value, module.DTensor)


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return a DTensor as a whole, which is one all-gather that every rank calls; another tensor itself."""
    whole: Any = value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]  # a DTensor has it
    return whole  # type: ignore[no-any-return]  # of any type, see above


def zero_redundancy(value: object) -> Any:
    """Return a ZeroRedundancyOptimizer, None for any other value, without an import of it."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return value if module is not None and isinstance(value, module.ZeroRedundancyOptimizer) else None


def is_batch_norm(module: torch.nn.Module) -> bool:
    """Return whether a module normalises over the samples of a batch, also over those of all processes."""
    instance = isinstance(module, torch.nn.modules.instancenorm._InstanceNorm)
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not instance


def drops_out(model: torch.nn.Module) -> bool:
    """Return whether a model has a layer of dropout in training mode, with a probability above 0."""
    layers = (one for one in model.modules() if isinstance(one, torch.nn.modules.dropout._DropoutNd))
    return any(one.training and one.p > 0 for one in layers)


def saved(node: Any, name: str, default: Any = None) -> Any:
    """Return what a node of autograd has saved under a name."""
    return getattr(node, f"_saved_{name}", default)


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which batch statistics are kept: float64 if the device has it, else float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def seed_cpu_generator(seed: int) -> None:
    """Seed torch's CPU generator in 2 µs. `torch.manual_seed` takes 280 µs, for devices that may not exist."""
    torch.default_generator.manual_seed(seed)


def seed_cuda_generator(index: int, seed: int) -> None:
    """Seed the generator of one CUDA device that is in use."""
    torch.cuda.default_generators[index].manual_seed(seed)


# The data loader.


def end_workers(dataloader: DataLoader[Any], iterator: Any) -> None:
    """End an iterator's workers now, in order.

    An exception keeps the iterator in a reference cycle. When the garbage collector frees the cycle, it may free the
    queues first, and then each worker is waited for 5 s.
    """
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
    if getattr(dataloader, "_iterator", None) is iterator:  # persistent workers
        dataloader._iterator = None


def ended_worker(iterator: Any, timeout_s: float) -> str:
    """Return which worker of an iterator has ended and how, waiting `timeout_s` for one; "" if all of them run.

    A worker's connections are closed some time before its end can be seen.
    """
    workers = {worker.sentinel: worker for worker in getattr(iterator, "_workers", ())}
    for sentinel in multiprocessing.connection.wait(list(workers), timeout_s):
        worker = workers[sentinel]
        worker.join()
        how = f"exit code {worker.exitcode}"
        if worker.exitcode is not None and worker.exitcode < 0:
            how = f"killed by signal: {signal.strsignal(-worker.exitcode)}"
        return f"DataLoader worker (pid {worker.pid}) exited unexpectedly ({how})"
    return ""


def show_dataset(inner: Callable[[Any], Any]) -> None:
    """In a loader's worker, let `get_worker_info().dataset` be what `inner` returns for the DataLoader's data set.

    torch forbids to assign to the object's attributes, so that a data set does not do so by mistake.
    """
    info = get_worker_info()
    assert info is not None, "only a worker calls this"
    object.__setattr__(info, "dataset", inner(info.dataset))


def hide_worker() -> None:
    """In a loader's worker, let `get_worker_info()` return None from now on, as outside of workers.

    Streams (datasets.IterableDataset, WebDataset) look at it, and would read only a part of what they are given.
    """
    from torch.utils.data._utils import worker

    assert hasattr(worker, "_worker_info"), "torch 2.6 and later have it"
    worker._worker_info = None


def loader_hooks() -> tuple[type, tuple[type, ...], Callable[[Any], Any]]:
    """Return the class of all iterators of loaders, those that fetch batches, and what gives a loader's sampler."""
    from torch.utils.data import _utils, dataloader

    fetchers = (_utils.fetch._MapDatasetFetcher, _utils.fetch._IterableDatasetFetcher)
    return dataloader._BaseDataLoaderIter, fetchers, DataLoader.__dict__["_index_sampler"].fget


def set_index_sampler(function: Callable[[Any], Any]) -> None:
    """Let each loader's iterators draw from what the function returns for the loader."""
    setattr(DataLoader, "_index_sampler", property(function))  # noqa: B010 - mypy refuses to assign to a property


def iterator_seed(iterator: Any) -> tuple[int, int]:
    """Return the seed of an iterator's workers and their number."""
    return int(iterator._base_seed), int(iterator._num_workers)


def undrawn(iterator: Any) -> Iterator[Any]:
    """Return what is left of the sampler of an iterator."""
    rest: Iterator[Any] = iterator._sampler_iter
    return rest


def pipeline_stage(stages: Any) -> type:
    """Return the class of all stages of torch.distributed.pipelining, of its module of stages."""
    found: type = stages._PipelineStageBase
    return found


# The launcher and its rendezvous.


def shutdown_timeout(config_class: type, seconds: int) -> dict[str, Any]:
    """Return `LaunchConfig`'s option for the grace period at the end, if this torch has it (2.13 and later)."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {"shutdown_timeout": seconds} if "shutdown_timeout" in names else {}


def worker_stores_at(rendezvous: object, listen: Callable[[], socket.socket]) -> None:
    """Make torch's c10d rendezvous open its store for the ranks at a socket of `listen`, not on all addresses."""

    def create(host: str, port: int) -> TCPStore:
        return serve_store(listen(), dist.default_pg_timeout)

    assert hasattr(rendezvous, "_create_tcp_store_server"), "torch 2.6 and later have it"
    rendezvous._create_tcp_store_server = create


def describe_state(state: Any) -> dict[str, Any]:
    """Return the state of torch's c10d rendezvous as values that JSON can hold.

    Of each machine: its address, process and number there, its rank, whether it waits, whether it is a spare one, and
    its last heartbeat.
    """
    nodes = {*state.participants, *state.wait_list, *state.redundancy_list, *state.last_heartbeats}
    rows = []
    for node in nodes:
        seen = state.last_heartbeats.get(node)
        lists = [state.participants.get(node), node in state.wait_list, node in state.redundancy_list]
        rows.append([node.addr, node.pid, node.local_id, *lists, seen and seen.isoformat()])
    return {
        "round": state.round,
        "complete": state.complete,
        "closed": state.closed,
        "deadline": state.deadline and state.deadline.isoformat(),
        "nodes": sorted(rows, key=lambda row: row[:3]),
    }


def build_state(values: Mapping[str, Any]) -> Any:
    """Return the state that `describe_state` described.

    Raises:
        KeyError, TypeError, ValueError: the values describe no state.
    """
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

    state = _RendezvousState()
    state.round, state.complete, state.closed = (
        _of_type(values[name], kind) for name, kind in (("round", int), ("complete", bool), ("closed", bool))
    )
    state.deadline = values["deadline"] and datetime.fromisoformat(values["deadline"])
    for address, pid, number, rank, waits, spare, seen in values["nodes"]:
        node = _NodeDesc(_of_type(address, str), _of_type(pid, int), _of_type(number, int))
        if rank is not None:
            state.participants[node] = _of_type(rank, int)
        if _of_type(waits, bool):
            state.wait_list.add(node)
        if _of_type(spare, bool):
            state.redundancy_list.add(node)
        if seen is not None:
            state.last_heartbeats[node] = datetime.fromisoformat(seen)
    return state


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def forget_bootstrap_store(rendezvous: object) -> None:
    """Make each round of torch's rendezvous open a new store on its first node, and announce that store's address.

    torch keeps the address of the first round. If the first node has left, or another node has become the first, the
    workers of some nodes would wait at an address where no store is.
    """
    if hasattr(rendezvous, "_bootstrap_store_info"):
        rendezvous._bootstrap_store_info = None


def close_outputs(processes: Any) -> None:
    """Close torch's own handles of the files that its processes write to. torch closes them late, or never."""
    for handler in getattr(processes, "subprocess_handlers", {}).values():
        for stream in (getattr(handler, "_stdout", None), getattr(handler, "_stderr", None)):
            if stream is not None:
                stream.close()
