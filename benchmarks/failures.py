"""Writes docs/failures.md: what torchrun and `ddparity run` say of each failure of tests/failure_cases.py, and when.

python benchmarks/failures.py                            # a quarter of an hour; half of it waits for torchrun
python benchmarks/failures.py --results results.json     # keeps what has run, and runs only what is not there
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

# The cases are those of the tests, which are found once the folder above is.
from tests.launcher.failure_cases import CASES, OURS, TORCHRUN, Case, NotPermittedError, Outcome, run_case  # noqa: E402 - needs the path

PAGE = ROOT / "docs" / "failures.md"
HANG_S = 10
CAP_S = 60
WHOLE = ("raise", "loader-raises", "other-shape", "returns-early", "dead-lock")
LINES = 30  # of an end that is shown whole
LAUNCHERS = {"torchrun": TORCHRUN, "ddparity": (*OURS, "--hang-timeout", str(HANG_S))}
_LINE = 150

_HEAD = f"""# Ways to fail

What goes wrong: the job ends, or does not, and the end of its output is the launcher's own traceback; the rank that it
blames is one that was cut off by another's failure; the exit code is 1 whatever happened; a hang says nothing for the
process group's time-out, half an hour.

Each row is a job of two ranks, in which {{count}} failures are provoked, started once with `torchrun` and once with
`ddparity run`: the same script, which knows nothing of either. Seconds count from the failure until the launcher and
all that it had started have ended (or from the start, where no rank comes to run). "Above the end" counts the lines
below the cause. torchrun is ended after {CAP_S} s where it says nothing; ours has `--hang-timeout {HANG_S}`, instead of
60. `benchmarks/failures.py` writes this page; `tests/launcher/test_failures.py` holds ours to it: the cause, its rank
and line within the last 15 lines, the exit code, ten seconds, nothing left running.

Measured with torch {torch.__version__}, Gloo, Python {platform.python_version()}, on two cores that others
used too, one run of each.

| failure | torchrun | ddparity run |
| --- | --- | --- |
"""


def row(case: Case, found: dict[str, Outcome]) -> str:
    cells = [case.failure, torchruns(case, found["torchrun"]), ours(case, found["ddparity"])]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def torchruns(case: Case, outcome: Outcome) -> str:
    said = []
    blamed = re.search(
        r"Root Cause.*?rank +: (\d+).*?exitcode +: (-?\d+)[^\n]*?(?:\((SIG\w+)\))?\n", outcome.text, re.DOTALL
    )
    if blamed is not None:
        rank, code, name = blamed.groups()
        how = name or f"exit code {code}"
        victim = case.culprit is not None and int(rank) != case.culprit
        said.append(f"**blames rank {rank}**, a victim ({how})" if victim else f"names rank {rank} ({how})")
    lines = outcome.text.rstrip().splitlines()
    places = [number for number, line in enumerate(lines) if re.search(case.cause, line)]
    if places:
        above = len(lines) - 1 - places[-1]
        where = f"{above} line{'s' * (above > 1)} above the end" if above else "at the end"
        said.append(f"{quoted(lines[places[-1]])} {where}")
    elif outcome.code is not None and case.send is None:
        said.append("the cause is not said")
    return ending(case, outcome, "; ".join(said))


def ours(case: Case, outcome: Outcome) -> str:
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
    if outcome.code is None:
        return f"{said + '; then ' if said else ''}**nothing in {CAP_S} s**"
    code = outcome.code if outcome.code >= 0 else 128 - outcome.code  # as a shell shows it
    since = " from the start" if outcome.from_start else ""
    text = f"exit code {code} after {outcome.seconds:.1f} s{since}"
    if outcome.left:
        text += f"; **{len(outcome.left)} of its processes go on**"
    return f"{said}<br>{text}" if said else text


def quoted(text: str) -> str:
    text = plain(text).strip().replace("`", "'")
    return f"`{text if len(text) <= _LINE else text[: _LINE - 1] + '…'}`"


def plain(text: str) -> str:
    """Without what is this machine's own."""
    text = re.sub(r"^\[rank\d+\]: ?", "", text) if "\n" not in text else text
    text = re.sub(r"/\S*/(?:site-packages|lib/python3\.\d+)/", "", text)
    text = re.sub(r"/\S*/(?:src/(?=ddparity/)|bin/(?=python))", "", text)
    return re.sub(rf"\b{re.escape(socket.gethostname())}\b", "n0", text)


def whole(case: Case, found: dict[str, Outcome]) -> str:
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
    place = Path(tempfile.mkdtemp(prefix="failures-"))
    outcomes: dict[str, dict[str, Outcome]] = {}
    for case in CASES:
        outcomes[case.name] = {}
        for name, launcher in LAUNCHERS.items():
            key = f"{case.name} {name}"
            if key not in results:
                try:
                    outcome = run_case(case, launcher, place / key.replace(" ", "-"), CAP_S)
                except NotPermittedError as error:
                    raise SystemExit(f"{case.name} needs rights that there are not here: {error}") from None
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
