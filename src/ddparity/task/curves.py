"""Draw the losses and metrics of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .record import HELD_OUT, read_lines

_POINTS = 500  # a curve of more steps is drawn as means over as many groups of steps


def pyplot_of_matplotlib() -> Any:
    """Return matplotlib's pyplot, with the backend that needs no display.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "matplotlib is not installed, but a plot needs it: pip install 'ddparity[plot]', or leave --plot out"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_picture(path: Path) -> None:
    """Check that a picture can be written to a path, before the training.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no such folder, or the name's ending is no format of matplotlib.
    """
    pyplot_of_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.absolute().parent}")
    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in endings:
        raise ValueError(f"--plot {path}: give a name that ends in .png, .svg or another of {', '.join(endings)}")


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw the loss, and each metric below it, over the steps of a file of metrics.

    Raises:
        OSError: the picture cannot be written.
    """
    lines = read_lines(metrics)
    names = ["loss", *dict.fromkeys(name for line in lines for name in line if name.startswith(HELD_OUT))]
    pyplot = pyplot_of_matplotlib()
    figure, rows = pyplot.subplots(
        len(names), sharex=True, squeeze=False, figsize=(7, 2.6 * len(names)), layout="constrained"
    )
    for axes, name in zip(rows[:, 0], names, strict=True):
        found = [line for line in lines if name in line]
        steps = [float(line["step"]) for line in found]
        values = [math.nan if line[name] is None else float(line[name]) for line in found]
        each = -(-len(steps) // _POINTS) if name == "loss" else 1
        marker = "." if len(steps) < 100 else None
        axes.plot(_means(steps, each), _means(values, each), marker=marker, color="tab:blue", linewidth=1.2)
        axes.set_ylabel(name if each < 2 else f"{name}, mean of {each} steps")
        axes.grid(alpha=0.3)
    rows[0, 0].set_title(title)
    rows[-1, 0].set_xlabel("step")
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)


def _means(values: Sequence[float], each: int) -> list[float]:
    """Return the means of groups of `each` values."""
    groups = (values[start : start + each] for start in range(0, len(values), max(each, 1)))
    return [sum(group) / len(group) for group in groups]
