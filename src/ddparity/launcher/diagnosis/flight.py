"""Read the last collectives of a rank, and the agreements of ddparity that it waits in.

The collectives come from the flight recorder that torch keeps in each process, the agreements from files that the rank
writes while it waits (`runtime/waits.py`). Here an agreement is a collective in a group of its own.
"""

from __future__ import annotations

import json
import math
import selectors
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...runtime.waits import WAIT_FILES
from ...system import unix_socket
from .instruments import FLIGHT, SERVER, STATE_HANDLER
from .limits import ANSWER, SMALL, read_file, read_json

DEFAULT_GROUP = "0"
AGREEMENT = "agreement"  # the backend of an agreement
_RECORDS_HANDLER = "fr_trace_json"
_STACKS_HANDLER = "dump_traceback"
_UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError)
_DTYPES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
}


@dataclass(frozen=True)
class Operation:
    """One call of a collective by one rank, or one wait in an agreement.

    `sequence`: its number in its process group, the same on all ranks. `record`: its number in its process.
    `inputs`, `outputs`: number of elements of each tensor. `row`: number of elements of one row (an index of the first
    dimension) of the first tensor. `created_s`: the time of the call, in seconds since 1970. `timeout_s`: of its group;
    None: unknown. `ranks`: of its group, where they are known; always of an agreement. `main`: the agreement is one
    that the main thread waits in.
    """

    group: str
    sequence: int
    name: str
    backend: str
    dtypes: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    pending: bool
    point_to_point: bool
    record: int
    created_s: float
    row: int
    timeout_s: float | None = None
    ranks: tuple[int, ...] = ()
    main: bool = False

    def __str__(self) -> str:
        """Return a text like "all_reduce of 4 float32"."""
        sizes = self.inputs or self.outputs
        if not sizes:
            return self.name
        kinds = "/".join(dict.fromkeys(self.dtypes))
        if len(sizes) > 3:
            return f"{self.name} of {sum(sizes):,} {kinds} in {len(sizes)} tensors"
        return f"{self.name} of {' + '.join(f'{size:,}' for size in sizes)} {kinds}".rstrip()


@dataclass(frozen=True)
class FlightRecord:
    """The last collectives of a rank, oldest first, and the global ranks of the process groups that it names.

    `complete`: the rank has called no others before them.
    """

    operations: tuple[Operation, ...]
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    complete: bool = True


@dataclass(frozen=True)
class GroupsOfRank:
    """What a rank says of its process groups now.

    `ranks`: the global ranks of each. `called`: at least the number of the last collective that it called in a group
    over a backend. `launched`: its world is the one that it was launched for, with the rank that it was given.
    """

    ranks: Mapping[str, tuple[int, ...]]
    called: Mapping[tuple[str, str], int]
    launched: bool


def parse_record(text: bytes) -> FlightRecord:
    """Return the flight record in a JSON text of torch.

    A process group may be destroyed and created again under the same name: only the collectives of the new group stay.
    """
    content = read_json(text, ANSWER)
    kept: dict[str, list[Operation]] = {}
    made: dict[tuple[str, str], object] = {}  # torch's own number of the group that has the name now
    entries = content.get("entries") or []
    for entry in entries:
        operation = _operation(entry)
        own = kept.setdefault(operation.group, [])
        number = entry.get("pg_id")
        if number is None and own and not operation.point_to_point and operation.sequence < own[-1].sequence:
            own.clear()
        elif number is not None and made.setdefault((operation.group, operation.backend), number) != number:
            made[operation.group, operation.backend] = number
            own[:] = [one for one in own if one.backend != operation.backend]
        own.append(operation)
    # Only NCCL names its groups here, Gloo does not.
    groups = {
        one["name"]: tuple(json.loads(one["ranks"]))
        for one in (content.get("pg_config") or {}).values()
        if one.get("name")
    }
    return FlightRecord(
        tuple(sorted((one for own in kept.values() for one in own), key=lambda one: one.record)),
        groups,
        complete=not entries or int(entries[0]["record_id"]) <= 1,
    )


def _operation(entry: Mapping[str, Any]) -> Operation:
    backend, _, name = str(entry["profiling_name"]).rpartition(":")
    done = entry.get("retired") or entry.get("state") == "completed"
    point_to_point = bool(entry.get("is_p2p", False))
    first: Sequence[int] = next(iter(entry["input_sizes"] or entry["output_sizes"]), [])
    return Operation(
        group=str(entry["process_group"][0]),
        sequence=int(entry["p2p_seq_id" if point_to_point else "collective_seq_id"]),
        name=name.lstrip("_"),
        backend=backend,
        dtypes=tuple(_DTYPES.get(kind, kind) for kind in entry["input_dtypes"] or entry.get("output_dtypes") or ()),
        inputs=tuple(math.prod(size) for size in entry["input_sizes"]),
        outputs=tuple(math.prod(size) for size in entry["output_sizes"]),
        pending=not done,
        point_to_point=point_to_point,
        record=int(entry["record_id"]),
        created_s=entry["time_created_ns"] / 1e9,
        row=math.prod(first[1:]),
        timeout_s=entry["timeout_ms"] / 1e3 if entry.get("timeout_ms") else None,
    )


def read_agreements(folder: Path) -> tuple[Operation, ...]:
    """Return the agreements that threads of a rank wait in, from the files in its folder."""
    found = []
    for path in folder.glob(WAIT_FILES):
        with suppress(OSError, ValueError, KeyError, TypeError):  # the wait has just ended
            content = read_json(read_file(path, SMALL))
            since_s = float(content["since"])
            operation = Operation(
                group=str(content["key"]),
                sequence=1,
                name=str(content["what"]),
                backend=AGREEMENT,
                dtypes=(),
                inputs=(),
                outputs=(),
                pending=True,
                point_to_point=False,
                record=int(since_s * 1e6),  # later than any collective's, and different for each wait
                created_s=since_s,
                row=1,
                timeout_s=content["timeout"],
                ranks=tuple(map(int, content["ranks"])),
                main=bool(content["main"]),
            )
            found.append(operation)
    return tuple(sorted(found, key=lambda one: one.record))


def read_record_file(folder: Path) -> FlightRecord | None:
    """Return the record that a rank wrote to its folder when it ended; None if there is none that can be read."""
    try:
        return parse_record(read_file(folder / FLIGHT))
    except (OSError, *_UNREADABLE):
        return None


def ask_records(folders: Mapping[int, Path], timeout_s: float) -> dict[int, FlightRecord]:
    """Ask all ranks for their records at once; return the answers that come within `timeout_s`."""
    found = {}
    for rank, text in ask(folders, _RECORDS_HANDLER, timeout_s).items():
        try:
            record = parse_record(text)
            found[rank] = replace(record, operations=record.operations + read_agreements(folders[rank]))
        except _UNREADABLE:  # another torch may have other fields: treat as no answer
            continue
    return found


def ask_groups(folders: Mapping[int, Path], timeout_s: float) -> dict[int, GroupsOfRank]:
    """Ask ranks for their process groups. A rank needs its GIL to answer."""
    found = {}
    for rank, text in ask(folders, STATE_HANDLER, timeout_s).items():
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            content = read_json(text, ANSWER)
            ranks = {str(name): tuple(map(int, ranks)) for name, ranks in content["groups"].items()}
            called = {
                (str(name), str(backend)): int(number)
                for name, numbers in content["called"].items()
                for backend, number in numbers.items()
            }
            found[rank] = GroupsOfRank(ranks, called, bool(content["launched"]))
    return found


def ask_stacks(folders: Mapping[int, Path], timeout_s: float) -> dict[int, str]:
    """Ask all ranks for the Python frames of all their threads at once. A rank needs its GIL to answer."""
    return {rank: text.decode(errors="replace") for rank, text in ask(folders, _STACKS_HANDLER, timeout_s).items()}


def ask(folders: Mapping[int, Path], handler: str, timeout_s: float) -> dict[int, bytes]:
    """Return the bodies of the servers' answers. A rank without a whole answer is left out: stopped, dead, starting.

    A rank that sends more than `limits.ANSWER` bytes is left out, too.
    """
    request = f"POST /handler/{handler} HTTP/1.1\r\nHost: ddparity\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    deadline = time.monotonic() + timeout_s
    parts: dict[int, list[bytes]] = {}
    sizes: Counter[int] = Counter()
    ended = set()
    with selectors.DefaultSelector() as selector:
        try:
            for rank, folder in folders.items():
                connection = unix_socket()
                try:
                    connection.setblocking(False)
                    connection.connect(str(folder / SERVER))
                    connection.sendall(request.encode())
                except OSError:  # also if the process is stopped and its queue is full
                    connection.close()
                    continue
                parts[rank] = []
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map() and (left_s := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left_s):
                    connection = key.fileobj  # type: ignore[assignment]
                    try:
                        chunk = connection.recv(1 << 20)
                    except OSError:
                        chunk = b""
                    parts[key.data].append(chunk)
                    sizes[key.data] += len(chunk)
                    if not chunk or sizes[key.data] > ANSWER:
                        if not chunk:
                            ended.add(key.data)
                        selector.unregister(connection)
                        connection.close()
        finally:
            for key in list(selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
    return {rank: body for rank in ended if (body := _body(b"".join(parts[rank]))) is not None}


def _body(answer: bytes) -> bytes | None:
    """Return the body of a complete answer with status 200; None for any other."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    if not lines[0].startswith(b"HTTP/1.1 200"):
        return None
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip() != str(len(body)).encode():
            return None
    return body


def to_json(operations: Iterable[Operation]) -> list[dict[str, Any]]:
    """Return the operations as values that JSON can hold; `from_json` is the inverse."""
    return [asdict(operation) for operation in operations]


def from_json(rows: Iterable[Mapping[str, Any]]) -> tuple[Operation, ...]:
    """Return the operations that `to_json` made these values of."""
    found = []
    for row in rows:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
        }
        found.append(Operation(**fields))
    return tuple(found)
