"""Open the rendezvous of a job under torch's own interface, so that nothing that comes through it is unpickled.

torch's c10d rendezvous keeps its state as a pickle in a store without a password: whoever reaches the store could run
code in each launcher. Here the state is JSON. torch's stores listen on all addresses; here they listen on one.
"""

from __future__ import annotations

import json
import pickle
import random
import time
import uuid
from datetime import timedelta
from typing import Any

from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, create_handler
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from ..compat import (
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
    build_state,
    describe_state,
    serve_store,
    worker_stores_at,
)
from ..runtime.network import LOOPBACK, listen_at, split_endpoint
from .diagnosis.limits import read_json
from .rendezvous import RendezvousSetup

_WRITE_S = 0.005  # for one machine to read the state and to write its own
_DOUBLINGS = 7  # of the time in which a machine tries again, up to 0.6 s
_RANKS_STORE_S = 300.0  # torch's default for a store


def rendezvous_handler(setup: RendezvousSetup) -> RendezvousHandler:
    """Return the handler of a rendezvous that `check_rendezvous` has prepared. It opens stores at one address each.

    Raises:
        RendezvousConnectionError, DistError: the store cannot be reached.
    """
    config = setup.config
    if setup.alone:
        return OneMachine(config.run_id)
    if config.rdzv_backend == "static":
        return NumberedMachines(setup)
    parameters = RendezvousParameters(
        config.rdzv_backend,
        config.rdzv_endpoint,
        config.run_id or uuid.uuid4().hex,
        config.min_nodes,
        config.max_nodes,
        config.local_addr,
        **config.rdzv_configs,
    )
    if config.rdzv_backend == "c10d":
        store: Store = _open_store(setup, float(config.rdzv_configs.get("read_timeout", 60)))
        backend: RendezvousBackend = C10dRendezvousBackend(store, parameters.run_id)
    elif config.rdzv_backend == "etcd-v2":
        from torch.distributed.elastic.rendezvous.etcd_rendezvous_backend import create_backend

        backend, store = create_backend(parameters)
    else:  # the user's own; torch's other one, etcd, uses JSON
        return get_rendezvous_handler(parameters)
    handler = create_handler(store, StateAsJson(backend), parameters)
    if config.local_addr is not None:
        address = config.local_addr
        worker_stores_at(handler, lambda: listen_at(address, 0))
    return handler


def _open_store(setup: RendezvousSetup, timeout_s: float, clients: int | None = None) -> TCPStore:
    """Return the connection to the job's store. Open the store where this machine holds its port."""
    timeout = timedelta(seconds=timeout_s)
    if setup.listener is not None:
        return serve_store(setup.listener, timeout, clients)
    _, port = split_endpoint(setup.config.rdzv_endpoint)
    assert setup.address is not None, "check_rendezvous has found it"
    return TCPStore(setup.address, port, clients, False, timeout, wait_for_workers=clients is not None)


class _Fixed(RendezvousHandler):
    """A rendezvous of a known number of machines. None can join later."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    @property
    def use_agent_store(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


class OneMachine(_Fixed):
    """A job on one machine: the agent's words stay in its memory, and the ranks' store listens on the loopback."""

    def get_backend(self) -> str:
        return "local"

    def next_rendezvous(self) -> RendezvousInfo:
        # A new store for each start of the ranks: the keys of an earlier start would mislead them.
        self._store = serve_store(listen_at(LOOPBACK, 0), timedelta(seconds=_RANKS_STORE_S))
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, self._store.port))


class NumberedMachines(_Fixed):
    """Machines with known numbers: number 0 opens the store, for the agents and for the ranks."""

    def __init__(self, setup: RendezvousSetup) -> None:
        super().__init__(setup.config.run_id)
        self._setup = setup
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return "static"

    def next_rendezvous(self) -> RendezvousInfo:
        setup, size = self._setup, self._setup.config.max_nodes
        if self._store is None:
            self._store = _open_store(setup, float(setup.config.rdzv_configs["timeout"]), size)
        assert setup.address is not None, "check_rendezvous has found it"
        where = RendezvousStoreInfo(setup.address, self._store.port)
        return RendezvousInfo(
            PrefixStore(self._run_id, self._store), int(setup.config.rdzv_configs["rank"]), size, where
        )


class StateAsJson(RendezvousBackend):
    """A backend of torch's dynamic rendezvous whose state is JSON.

    torch's handler gives it pickles and expects pickles. Each is made and read in this process alone: what another
    machine wrote is read as JSON, and checked.
    """

    def __init__(self, backend: RendezvousBackend) -> None:
        self._backend = backend
        self._failed = 0  # tries to write, since the last one that succeeded

    @property
    def name(self) -> str:
        return self._backend.name

    def get_state(self) -> tuple[bytes, Any] | None:
        found = self._backend.get_state()
        return None if found is None else (_as_pickle(found[0]), found[1])

    def set_state(self, state: bytes, token: Any | None = None) -> tuple[bytes, Any, bool] | None:
        text = json.dumps(describe_state(pickle.loads(state)), separators=(",", ":")).encode()  # of this process
        found = self._backend.set_state(text, token)
        if found is None:
            return None
        stored, new_token, is_ours = found
        if is_ours:
            self._failed = 0
            return state, new_token, True
        # Another machine was first, and torch tries again at once. Where many machines come at the same moment, their
        # tries must spread. The state is read after the pause: one that was read before it would be out of date again.
        self._failed = min(self._failed + 1, _DOUBLINGS)
        time.sleep(random.SystemRandom().random() * _WRITE_S * 2**self._failed)
        fresh = self.get_state()
        return (*fresh, False) if fresh is not None else (_as_pickle(stored), new_token, False)


def _as_pickle(text: bytes) -> bytes:
    """Return a state in JSON as the pickle that torch's handler expects.

    Raises:
        RendezvousStateError: the text is no state of a rendezvous.
    """
    try:
        return pickle.dumps(build_state(read_json(text)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RendezvousStateError(
            f"the state of the rendezvous cannot be read ({type(error).__name__}: {error}): does another program, or "
            f"torchrun, use the same port?"
        ) from None
