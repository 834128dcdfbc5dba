"""Write docs/failures.md: what torchrun and `ddparity run` print for each failure of `failure_cases.py`, and when.

python benchmarks/failures.py                            # takes 15 minutes; half of them wait for torchrun
python benchmarks/failures.py --results results.json     # keeps the results, and runs only the cases without one
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import socket
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# The tests have the same cases. Python finds them after the line above.
from tests.launcher.failure_cases import CASES, OURS, TORCHRUN, Case, NotPermittedError, Outcome, run_case  # noqa: E402 - needs the path

PAGE = ROOT / "docs" / "failures.md"
HANG_S = 10
CAP_S = 60
WHOLE = ("raise", "loader-raises", "other-shape", "returns-early", "dead-lock")
LINES = 30  # of the output of a case in WHOLE
LAUNCHERS = {"torchrun": TORCHRUN, "ddparity": (*OURS, "--hang-timeout", str(HANG_S))}
_LINE = 150

_HEAD = f"""# Ways to fail

With other launchers, the output of a failed job often ends with the launcher's own traceback. The launcher may name a
rank that failed only because another rank had failed before. The exit code is 1, whatever the cause is. A job that
hangs prints nothing until the time-out of its process group, which is half an hour.

Each row is one of {{count}} failures, in a job of two ranks. Each job runs twice: with `torchrun` and with
`ddparity run`. The script is the same and has no code for either launcher. The seconds count from the failure until the
launcher and all processes that it started have ended. If no rank starts, they count from the start of the launcher.
"Above the end" counts the lines below the line that names the cause. torchrun is ended after {CAP_S} s if it prints
nothing. `ddparity run` has `--hang-timeout {HANG_S}`. It matters only for a rank that has not called a collective and
may still call it: without the option, the launcher reports such a rank after 60 s and ends the job at the time-out of
its process group. A hang that cannot end by itself is reported within seconds
([Launch](launch.md#hangs-and-long-waits)).

`benchmarks/failures.py` writes this page. `tests/launcher/test_failures.py` checks `ddparity run`: the last 15 lines
name the cause, its rank and its line; the exit code is right; the job ends within ten seconds; no process is left.

Measured with torch {torch.__version__}, Gloo, Python {platform.python_version()}, on two cores that other
programs used, too; one run of each.

| failure | torchrun | ddparity run |
| --- | --- | --- |
"""


def row(case: Case, found: dict[str, Outcome]) -> str:
    """Return the row of one case in the table."""
    cells = [case.failure, of_torchrun(case, found["torchrun"]), of_ddparity(case, found["ddparity"])]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def of_torchrun(case: Case, outcome: Outcome) -> str:
    """Return what torchrun prints: the rank that it names, and where in its output the cause stands."""
    said = []
    blamed = re.search(
        r"Root Cause.*?rank +: (\d+).*?exitcode +: (-?\d+)[^\n]*?(?:\((SIG\w+)\))?\n", outcome.text, re.DOTALL
    )
    if blamed is not None:
        rank, code, name = blamed.groups()
        how = name or f"exit code {code}"
        victim = case.culprit is not None and int(rank) != case.culprit
        said.append(
            f"**blames rank {rank}**, which is not the cause ({how})" if victim else f"names rank {rank} ({how})"
        )
    lines = outcome.text.rstrip().splitlines()
    positions = [number for number, line in enumerate(lines) if re.search(case.cause, line)]
    if positions:
        above = len(lines) - 1 - positions[-1]
        where = f"{above} line{'s' * (above > 1)} above the end" if above else "at the end"
        said.append(f"{quoted(lines[positions[-1]])} {where}")
    elif outcome.code is not None and case.send is None:
        said.append("does not print the cause")
    return ending(case, outcome, "; ".join(said))


def of_ddparity(case: Case, outcome: Outcome) -> str:
    """Return what `ddparity run` prints: the line that names the cause, and the script's line that is at fault."""
    heads = [
        line for line in outcome.text.splitlines() if re.match(r"ddparity: (hang|rank|ranks|ended|mach|port|th)", line)
    ]
    heads = [line for line in heads if "failed:" in line or "rank" not in line[:14]] or heads
    said = quoted(heads[-1].removeprefix("ddparity: ")) if heads else ""
    if not heads and case.while_starting:
        said = quoted("KeyboardInterrupt")
    if (line := case.line()) is not None:
        said += f", `train.py:{line}`"
    return ending(case, outcome, said)


def ending(case: Case, outcome: Outcome, said: str) -> str:
    """Return how the job ended, after what was printed."""
    if outcome.code is None:
        return f"{said + '; then ' if said else ''}**nothing in {CAP_S} s**"
    code = outcome.code if outcome.code >= 0 else 128 - outcome.code  # as a shell shows it
    since = " from the start" if outcome.from_start else ""
    text = f"exit code {code} after {outcome.seconds:.1f} s{since}"
    if outcome.left:
        text += f"; **{len(outcome.left)} of its processes still run**"
    return f"{said}<br>{text}" if said else text


def quoted(text: str) -> str:
    """Return one line as code, at most `_LINE` characters of it."""
    text = plain(text).strip().replace("`", "'")
    return f"`{text if len(text) <= _LINE else text[: _LINE - 1] + '…'}`"


def plain(text: str) -> str:
    """Return the text without prefixes, folders and names that belong to this machine."""
    text = re.sub(r"^\[rank\d+\]: ?", "", text) if "\n" not in text else text
    text = re.sub(r"/\S*/(?:site-packages|lib/python3\.\d+)/", "", text)
    text = re.sub(r"/\S*/(?:src/(?=ddparity/)|bin/(?=python))", "", text)
    return re.sub(rf"\b{re.escape(socket.gethostname())}\b", "n0", text)


def whole(case: Case, found: dict[str, Outcome]) -> str:
    """Return the section of one case: its script, and the last lines that each launcher prints."""
    script = case.text().partition("\n\n")[2].strip() or case.text()
    parts = [f"\n## {case.failure}\n", "```python", script, "```\n"]
    for name, outcome in found.items():
        lines = plain(outcome.text).rstrip().splitlines()
        cut = f"… {len(lines) - LINES} lines\n" if len(lines) > LINES else ""
        shown = cut + "\n".join(line.rstrip() for line in lines[-LINES:])
        after = f"after {outcome.seconds:.1f} s" if outcome.code is not None else f"nothing in {CAP_S} s"
        parts += [f"{name}, {after}:\n", "```text", shown or "(nothing)", "```\n"]
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    results = json.loads(given.results.read_text()) if given.results and given.results.exists() else {}
    folder = Path(tempfile.mkdtemp(prefix="failures-"))
    outcomes: dict[str, dict[str, Outcome]] = {}
    for case in CASES:
        outcomes[case.name] = {}
        for name, launcher in LAUNCHERS.items():
            key = f"{case.name} {name}"
            if key not in results:
                try:
                    outcome = run_case(case, launcher, folder / key.replace(" ", "-"), CAP_S)
                except NotPermittedError as error:
                    raise SystemExit(f"{case.name} needs rights that this user does not have: {error}") from None
                results[key] = {**vars(outcome), "folder": ""}
                print(f"{key}: {outcome.code} after {outcome.seconds:.1f} s", flush=True)
                if given.results:
                    given.results.write_text(json.dumps(results, indent=1))
            outcomes[case.name][name] = Outcome(**results[key])
    page = (
        _HEAD.replace("{count}", str(len(CASES))) + "\n".join(row(case, outcomes[case.name]) for case in CASES) + "\n"
    )
    page += "".join(whole(case, outcomes[case.name]) for case in CASES if case.name in WHOLE)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
