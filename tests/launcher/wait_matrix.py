"""Run all healthy waits and all real hangs: `python -m tests.launcher.wait_matrix [SECONDS [NAME...]]` (`make waits`).

SECONDS is the length of a healthy wait; the launcher first reports one after 60 s. The last lines say what went wrong.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.launcher.wait_cases import HANGS, WAITS, Outcome, problem_of_hang, problem_of_wait, run_hang, run_wait

_AT_ONCE = 8
_OWN_TIME_S = 10.0  # --hang-timeout, for hangs that only look like long waits


def main() -> int:
    seconds, names = float((sys.argv[1:] or ["75"])[0]), sys.argv[2:]
    waits = {name: case for name, case in WAITS.items() if not names or name in names}
    hangs = {name: case for name, case in HANGS.items() if not names or name in names}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_AT_ONCE) as pool:
        waiting = [pool.submit(run_wait, case, Path(folder, f"w{i}"), seconds) for i, case in enumerate(waits.values())]
        hanging = [
            pool.submit(run_hang, case, Path(folder, f"h{i}"), None if case.proof else _OWN_TIME_S)
            for i, case in enumerate(hangs.values())
        ]
        problems, told, named = [], 0, {True: list[float](), False: list[float]()}
        for (name, wait), future in zip(waits.items(), waiting, strict=True):
            outcome = future.result()
            problems += _note("wait", name, outcome, problem_of_wait(outcome, wait.typed))
            told += "ddparity: for 6" in outcome.text
        for (name, hang), future in zip(hangs.items(), hanging, strict=True):
            outcome = future.result()
            problems += _note("hang", name, outcome, problem_of_hang(hang, outcome))
            named[hang.proof].append(outcome.seconds)
    print(f"{len(waits)} healthy waits of {seconds:g} s, {told} of them reported; {len(hangs)} hangs")
    for proof, times in named.items():
        if times:
            kind = "certain hangs" if proof else f"hangs ended after --hang-timeout {_OWN_TIME_S:g}"
            print(
                f"{len(times)} {kind}: named after {statistics.median(times):.1f} s (median), {max(times):.1f} s (most)"
            )
    print(f"{len(problems)} failed" + "".join(f"\n\n{one}" for one in problems))
    return 1 if problems else 0


def _note(kind: str, name: str, outcome: Outcome, problem: str) -> list[str]:
    print(f"{'FAILED' if problem else 'ok':6} {outcome.seconds:6.1f} s  {kind}: {name}", flush=True)
    return [f"{kind}: {name}: {problem}"] if problem else []


if __name__ == "__main__":
    sys.exit(main())
