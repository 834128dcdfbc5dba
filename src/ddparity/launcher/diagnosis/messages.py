"""Write what the agents of several machines tell each other about their ranks as short JSON texts, and read it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Protocol

from .desync import RankState
from .flight import Operation, from_json, to_json
from .hang_report import HangReport, Row
from .limits import read_json

_LAST = 4  # collectives of each group that are published. More are pending only if a reducer calls many at once


class AgentChannel(Protocol):
    """The connection between the agents of a job's machines. One of them leads: it compares what all have published."""

    @property
    def leads(self) -> bool:
        """Whether this agent leads."""

    def publish(self, state: str, /) -> None:
        """Publish the state of this machine."""

    def read(self) -> Sequence[str]:
        """Return the last published state of each machine. Called by the leading agent."""

    def announce(self, text: str, /) -> None:
        """Send a text of the leading agent to all agents: a question, a hang report, or "" to withdraw the last one."""

    def announced(self) -> str | None:
        """Return the last text that the leading agent sent."""


@dataclass(frozen=True)
class MachineState:
    """The ranks of one machine. `answers`: the question of the leading agent that `rows` answer."""

    host: str
    states: Mapping[int, RankState]
    repeated: frozenset[tuple[int, str]]
    answers: str
    rows: tuple[Row, ...]


def pack(machine: MachineState) -> str:
    """Return a machine's state as JSON; `unpack` is the inverse, except for collectives that are too old."""
    ranks = [{**vars(state), "operations": to_json(_newest(state.operations))} for state in machine.states.values()]
    rows = [asdict(row) for row in machine.rows]
    content = {"host": machine.host, "ranks": ranks, "repeated": sorted(machine.repeated), "answers": machine.answers}
    return json.dumps({**content, "rows": rows})


def unpack_all(texts: Iterable[str]) -> list[MachineState]:
    """Return the machines' states that `pack` wrote. A text that is no such state is left out."""
    found = []
    for text in texts:
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            found.append(unpack(text))
    return found


def unpack(text: str) -> MachineState:
    """Return the machine's state that `pack` wrote."""
    content = read_json(text)
    states = {one["rank"]: RankState(**{**one, "operations": from_json(one["operations"])}) for one in content["ranks"]}
    repeated = frozenset((rank, group) for rank, group in content["repeated"])
    rows = tuple(Row(**row) for row in content["rows"])
    return MachineState(content["host"], states, repeated, content["answers"], rows)


def _newest(operations: Iterable[Operation]) -> list[Operation]:
    """Return the last collectives of each group and the first pending ones, in the order of their calls."""
    groups: dict[str, list[Operation]] = {}
    for one in operations:
        groups.setdefault(one.group, []).append(one)
    kept = []
    for own in groups.values():
        pending = [one for one in own if one.pending][:_LAST]
        kept += sorted({*pending, *own[-_LAST:]}, key=lambda one: one.record)
    return sorted(kept, key=lambda one: one.record)


def question(group: str, number: int) -> str:
    """Return a text that asks all machines for the rows of their ranks, as a report on this group shows them."""
    return json.dumps({"look": group, "number": number})


def asked_group(text: str) -> str | None:
    """Return the group of a question; None if the text is no question."""
    with suppress(ValueError):
        return str(read_json(text)["look"]) if text.startswith('{"look"') else None
    return None


def pack_hang(report: HangReport, number: int) -> str:
    """Return a hang report as JSON, without its stacks."""
    fields = {name: value for name, value in vars(report).items() if name not in ("rows", "stacks")}
    return json.dumps({"hang": fields, "rows": [asdict(row) for row in report.rows], "number": number})


def unpack_hang(text: str) -> HangReport | None:
    """Return the hang report of the leading agent, without stacks; None if the text is no hang report."""
    if not text.startswith('{"hang"'):
        return None
    with suppress(ValueError, TypeError, KeyError):
        content = read_json(text)
        fields = {**content["hang"], "blamed": tuple(content["hang"]["blamed"])}
        return HangReport(**fields, rows=tuple(Row(**row) for row in content["rows"]), stacks={})
    return None
