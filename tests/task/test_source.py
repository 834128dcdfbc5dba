"""Scripts without a Task are told apart without running them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddparity.task.source import check_source

OTHERS = {"with_task.py": "import ddparity as dp\ndigits = dp.Task", "without.py": "import torch\ndef net(): pass"}
COMMON = "import json, torch.nn as nn, numpy as np\nimport ddparity as dp\nfrom torch.utils.data import DataLoader\n"


@pytest.mark.parametrize(
    ("source", "name", "may"),
    [
        ("task = dp.Task()", "", True),
        ("class Mine(dp.Task): pass", "", True),
        ("def task(): return 1", "", True),
        ("def main():\n    def task(): pass", "", False),
        ("from with_task import digits", "", True),
        ("from without import net\nnet()", "", False),
        ("import sys\nsys.path.insert(0, '/elsewhere')\nfrom unknown_module import digits", "", True),
        ("from everywhere import *", "", True),
        ("task_to_keys = {'cola': 1}\nargs = parse()\nargs.task_name", "", False),
        ("digits = make_task()", "", True),
        ("if True:\n    x, (y, *z) = 1, (2,)", "z", True),
        ("def f():\n    x = 1", "x", False),
        ("def f():\n    global x\n    x = 1", "x", True),
        ("import torch as x", "x", True),
        ("globals()['x'] = 1", "x", True),
        ("def __getattr__(name): return 1", "x", True),
    ],
)
def test_what_may_have_a_task_is_run(source: str, name: str, may: bool, tmp_path: Path) -> None:
    for file, text in {**OTHERS, "script.py": COMMON + source}.items():
        (tmp_path / file).write_text(text)
    if may:
        check_source(tmp_path / "script.py", "script.py", name)
        return
    with pytest.raises(ValueError, match="was not run"):
        check_source(tmp_path / "script.py", "script.py", name)
