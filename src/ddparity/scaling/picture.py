"""Draw a report as SVG: a bar of stages for each rank, and the speed-up over the number of ranks for each link."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from pathlib import Path

from .bench import RANKS, WANTED, Forecast, Report
from .measure import Stages
from .model import Variant
from .report import STAGES

_WIDTH, _LEFT, _ROW = 900, 70, 30  # pixels
_COLOURS = ("#8c8c8c", "#6f9bc8", "#24466f", "#c2571a", "#e6b36a", "#3b7a57", "#d9d9d9")
_LINES: dict[Variant, str] = {"fast": "#24466f", "strict": "#c2571a", "SyncBatchNorm": "#3b7a57"}
_PANEL_WIDTH, _PANEL_HEIGHT = 360, 300


def write_picture(report: Report, path: Path) -> None:
    """Write the picture to a file."""
    path.write_text(picture(report))


def picture(report: Report) -> str:
    """Return the picture as SVG."""
    bars, height = _bars(report.measured.stages, 70)
    panels = []
    for number, forecast in enumerate(report.forecasts):
        x, y = (number % 2) * (_PANEL_WIDTH + 65) + _LEFT - 10, height + 60 + (number // 2) * (_PANEL_HEIGHT + 75)
        panels += _panel(forecast, x, y)
    rows = -(-len(report.forecasts) // 2)
    total = height + 40 + rows * (_PANEL_HEIGHT + 75)
    below = (
        f"Solid: each rank has {report.each} micro-batches. Dotted: the ranks share the Task's global batch. Dashed: "
        f"the speed-up is the number of ranks."
    )
    processes = f"{len(report.measured.shares)} processes ({report.measured.device})"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {total}" font-family="sans-serif" '
            f'font-size="13">',
            f'<rect width="{_WIDTH}" height="{total}" fill="#fff"/>',
            _text(10, 24, f"{report.title}: a step of the fast reduction on {processes}", size=17),
            *bars,
            *panels,
            _text(_LEFT - 10, total - 14, below, size=12),
            "</svg>\n",
        ]
    )


def _bars(stages: Sequence[Stages], top: float) -> tuple[list[str], float]:
    """Return a bar for each rank, with a legend above and a scale below, and where they end."""
    longest = max(one.total_s for one in stages)
    scale = (_WIDTH - _LEFT - 30) / longest
    lines, x = [], float(_LEFT)
    for colour, name in zip(_COLOURS, STAGES.values(), strict=True):
        lines += [f'<rect x="{x:.0f}" y="{top - 27}" width="12" height="12" fill="{colour}"/>']
        lines += [_text(x + 17, top - 16, name)]
        x += 35 + 7.2 * len(name)
    for rank, one in enumerate(stages):
        y, at = top + rank * _ROW, float(_LEFT)
        lines.append(_text(10, y + 16, f"rank {rank}"))
        for colour, name, seconds in zip(_COLOURS, STAGES.values(), dataclasses.astuple(one), strict=True):
            width = seconds * scale
            lines.append(
                f'<rect x="{at:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - 8}" fill="{colour}">'
                f"<title>{name}: {1e3 * seconds:.3f} ms</title></rect>"
            )
            at += width
    bottom = top + len(stages) * _ROW
    step = _nice(longest / 5)
    for number in range(int(longest / step) + 1):
        at = _LEFT + number * step * scale
        lines.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{bottom - 4}" y2="{bottom + 2}" stroke="#555"/>')
        lines.append(_text(at, bottom + 17, f"{1e3 * number * step:g}{' ms' * (number == 0)}", anchor="middle"))
    return lines, bottom + 25


def _nice(value: float) -> float:
    """Return 1, 2 or 5 times a power of ten, not far below a value."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= value)


def _panel(forecast: Forecast, x: float, y: float) -> list[str]:
    """Return the speed-up over the number of ranks, both in powers of two."""
    top = math.log2(RANKS[-1])

    def at(ranks: float, speed_up: float) -> str:
        up = min(max(math.log2(max(speed_up, 1e-9)), -0.5), top)
        return f"{x + _PANEL_WIDTH * math.log2(ranks) / top:.1f},{y + _PANEL_HEIGHT * (1 - max(up, 0.0) / top):.1f}"

    lines = [
        _text(x, y - 14, f"over {forecast.link.name}: speed-up over the ranks", size=14),
        f'<rect x="{x}" y="{y}" width="{_PANEL_WIDTH}" height="{_PANEL_HEIGHT}" fill="none" stroke="#aaa"/>',
        f'<polyline points="{at(1, 1)} {at(RANKS[-1], RANKS[-1])}" stroke="#aaa" stroke-dasharray="4 4" fill="none"/>',
    ]
    for ranks in RANKS[::2]:
        across, up = (float(value) for value in at(ranks, ranks).split(","))
        lines.append(_text(across, y + _PANEL_HEIGHT + 16, f"{ranks:,}", anchor="middle"))
        lines.append(_text(x - 6, up + 4, f"{ranks:,}", anchor="end"))
    for number, (variant, scaled) in enumerate(forecast.grown.items()):
        for dash, rows in (("", scaled), (' stroke-dasharray="2 3"', forecast.same[variant])):
            points = " ".join(at(one.prediction.ranks, one.speed_up) for one in rows)
            lines.append(f'<polyline points="{points}" stroke="{_LINES[variant]}" stroke-width="2" fill="none"{dash}/>')
        most = forecast.most[variant]
        reach = f"up to {most:,} ranks{' or more' * (most == RANKS[-1])}" if most > 1 else "nowhere"
        said = f"{variant}: {100 * WANTED:.0f} % efficiency {reach}"
        lines.append(f'<rect x="{x + 12}" y="{y + 12 + 20 * number}" width="14" height="4" fill="{_LINES[variant]}"/>')
        lines.append(_text(x + 32, y + 19 + 20 * number, said))
    return lines


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="#222">'
        f"{html.escape(text)}</text>"
    )
