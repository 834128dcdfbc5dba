"""The notebook's cells run one after another, print what the file shows, and draw.

`make docs-notebook` runs them in a real kernel. Here `launch` takes its processes from the fork server, so that none of
them imports torch again; the agent and the reports are the same.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from typing import Any

import cloudpickle
import matplotlib
import pytest
import sklearn.datasets  # noqa: F401 - it sets environment variables when it is imported

import ddparity as dp
from ddparity.launcher import launch_forked
from tests.pages import ROOT

CELLS = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())["cells"]


class _Carried:
    """A function of the notebook, which pickle does not carry."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__name__ = self.__qualname__ = function.__name__
        self.text = cloudpickle.dumps(function)

    def __call__(self, *args: Any) -> Any:
        return cloudpickle.loads(self.text)(*args)


def _launch(function: Callable[..., Any], *args: Any, nproc: int = 2) -> list[Any]:
    return launch_forked(_Carried(function), *args, nproc=nproc)


def test_the_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.setattr(dp, "launch", _launch)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    drawn = []
    for number, cell in enumerate(CELLS):
        if cell["cell_type"] != "code":
            continue
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        stored = "".join(text for one in cell["outputs"] if one.get("name") == "stdout" for text in one["text"])
        assert shown.getvalue() == stored, f"run `make docs-notebook`: cell {number}"
        pictures = [one for one in cell["outputs"] if "image/png" in one.get("data", {})]
        assert len(pictures) == len(pyplot.get_fignums())
        drawn += pyplot.get_fignums()
        pyplot.close("all")
    assert len(drawn) == 2
    assert namespace["one"]["losses"] == namespace["two"]["losses"]
    assert namespace["one"]["losses"][-1] < 0.5
