"""Look at what the ranks do: their stacks, what they have used, what keeps them. A look makes the rows of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from . import instruments
from .desync import Finding
from .flight import AGREEMENT
from .hang_report import ABORTING, HangReport, Row, headline, make_row
from .known import Known, is_idle
from .stacks import AT_PROMPT, Stack, read_stacks
from .unended import Handled, ask_exceptions, read_ended
from .usage import describe_usage

_USED_S = 1.0  # what a rank has used in less is not told


def report_on(known: Known, host: str, finding: Finding) -> HangReport:
    """Return the report on a finding, with the rows of all ranks; `host`: this machine's name."""
    stacks = stacks_of(known, known.ranks)
    rows = rows_of(known, host, asked_group(finding), stacks, finding)
    return HangReport(finding.kind, finding.group, finding.blamed, headline(finding, known.states), rows, texts(stacks))


def asked_group(finding: Finding) -> str:
    """Return the group in which all ranks are looked at; "" for what each waits in, of any group."""
    return "" if finding.kind == "circle" else finding.group


def rows_of(
    known: Known, host: str, group: str, stacks: Mapping[int, Stack], finding: Finding | None = None
) -> tuple[Row, ...]:
    """Return the rows of this machine's ranks, or those of all ranks for a finding. `group`: "" for any."""
    now = known.now()
    operations = finding.operations if finding is not None else {}
    used = known.used(known.ranks, now)
    agreement = any(state.agrees(group) for state in known.states.values())
    rows = []
    for rank in sorted(known.states if finding is not None else known.ranks):
        state, stack = known.states[rank], stacks.get(rank)
        waits = state.pending(group) if group else state.waits()
        said = ""
        if rank in used and used[rank][0] > _USED_S:
            said = describe_usage(*used[rank][1:])
        shown = waits or operations.get(rank) or state.shown("" if agreement else group)
        row = make_row(host if rank in known.ranks else "", state, shown, stack, _activity(known, rank), said)
        idle = rank in used and is_idle(*used[rank])
        whole = waits is not None and stack is not None and stack.only_waits(waits.backend == AGREEMENT, idle)
        rows.append(replace(row, only_waits=whole))
    return tuple(rows)


def _activity(known: Known, rank: int) -> str:
    """Return what a rank does, where its files say more than its stack can; "" where they do not."""
    if rank in known.aborts:
        return ABORTING
    if has_prompt(known, rank):
        return AT_PROMPT
    ended = read_ended(known.ranks[rank].pid, known.ranks[rank].folder) if known.alive(rank) else None
    if ended is None:
        return ""
    return "its script has ended" + (f", {ended.keeps} keeps its process" if ended.keeps else "")


def has_prompt(known: Known, rank: int) -> bool:
    """Return whether a rank of this machine is at a debugger's prompt, or waits for the terminal to show one."""
    return known.alive(rank) and instruments.has_prompt(known.ranks[rank].folder)


def stacks_of(known: Known, ranks: Iterable[int]) -> dict[int, Stack]:
    """Return the stacks of those of the ranks that run on this machine."""
    alive = {rank: known.ranks[rank] for rank in ranks if known.alive(rank)}
    return read_stacks(
        {rank: one.pid for rank, one in alive.items()}, {rank: one.folder for rank, one in alive.items()}
    )


def exceptions_of(known: Known, ranks: Iterable[int]) -> dict[int, Handled]:
    """Return the exceptions that ranks of this machine handle now."""
    return ask_exceptions({rank: known.ranks[rank].folder for rank in ranks if known.alive(rank)})


def texts(stacks: Mapping[int, Stack]) -> dict[int, str]:
    """Return the stacks of all threads of each rank, for files."""
    return {rank: stack.text for rank, stack in stacks.items() if stack.text}
