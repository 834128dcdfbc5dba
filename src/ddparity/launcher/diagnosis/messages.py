"""What the agents of several machines write to each other about their ranks: short JSON texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from .desync import RankState
from .flight import Operation, from_json, to_json
from .hang_report import Row, Verdict

_LAST = 4  # collectives of each group that are published; more are pending only where a reducer issues many


class Exchange(Protocol):
    """How agents tell each other: `publish` and `read` what each sees; `tell`, `verdict`: what the leading one says."""

    @property
    def leads(self) -> bool: ...
    def publish(self, state: str, /) -> None: ...
    def read(self) -> Sequence[str]: ...
    def tell(self, verdict: str, /) -> None: ...
    def verdict(self) -> str | None: ...


@dataclass(frozen=True)
class Report:
    """One machine's ranks. `answers`: the question of the leading agent that `rows` answer."""

    host: str
    states: Mapping[int, RankState]
    repeated: frozenset[tuple[int, str]]
    answers: str
    rows: tuple[Row, ...]


def pack(report: Report) -> str:
    ranks = [{**vars(state), "operations": to_json(_newest(state.operations))} for state in report.states.values()]
    rows = [asdict(row) for row in report.rows]
    content = {"host": report.host, "ranks": ranks, "repeated": sorted(report.repeated), "answers": report.answers}
    return json.dumps({**content, "rows": rows})


def unpack(text: str) -> Report:
    content = json.loads(text)
    states = {one["rank"]: RankState(**{**one, "operations": from_json(one["operations"])}) for one in content["ranks"]}
    repeated = frozenset((rank, group) for rank, group in content["repeated"])
    rows = tuple(Row(**row) for row in content["rows"])
    return Report(content["host"], states, repeated, content["answers"], rows)


def _newest(operations: Iterable[Operation]) -> list[Operation]:
    groups: dict[str, list[Operation]] = {}
    for one in operations:
        groups.setdefault(one.group, []).append(one)
    kept = []
    for own in groups.values():
        pending = [one for one in own if one.pending][:_LAST]
        kept += sorted({*pending, *own[-_LAST:]}, key=lambda one: one.record)
    return sorted(kept, key=lambda one: one.record)


def question(group: str, number: int) -> str:
    """Ask all machines where their ranks stand, as seen from a group."""
    return json.dumps({"look": group, "number": number})


def asked_group(text: str) -> str | None:
    """The group of a question; None where the text is none."""
    return str(json.loads(text)["look"]) if text.startswith('{"look"') else None


def pack_verdict(verdict: Verdict, number: int) -> str:
    fields = {name: value for name, value in vars(verdict).items() if name not in ("rows", "stacks")}
    return json.dumps({"verdict": fields, "rows": [asdict(row) for row in verdict.rows], "number": number})


def unpack_verdict(text: str) -> Verdict | None:
    """The verdict of the leading agent, without stacks; None where the text is none."""
    if not text.startswith('{"verdict"'):
        return None
    content = json.loads(text)
    fields = {**content["verdict"], "odd": tuple(content["verdict"]["odd"])}
    return Verdict(**fields, rows=tuple(Row(**row) for row in content["rows"]), stacks={})
