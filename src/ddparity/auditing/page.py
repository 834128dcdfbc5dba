"""The report as one HTML file, which needs no network: findings, a timeline of each rank, and the samples by epoch."""

from __future__ import annotations

import html
from pathlib import Path

from .records import Pass, Rank, Run
from .report import place, summary
from .run import Report

_WIDTH, _ROW = 900, 18  # pixels
_MOST_MARKS = 2_000  # of a rank
_MOST_CELLS = 300  # samples in a picture, each of which stands for several where there are more
_MOST_PICTURES = 12
_COLOURS = ("#24466f", "#c2571a", "#3b7a57", "#8a3b72", "#6b6b1f", "#2a7f9e", "#a33", "#555")
_MARKS = {"step": "#24466f", "collective": "#c2571a", "iter": "#3b7a57"}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 60em; color: #222; padding: 0 1em }
article { border-left: 4px solid #888; margin: 1em 0; padding: .2em 1em; background: #f7f7f7 }
article.error { border-color: #b00020 } article.warning { border-color: #c80 } article.note { border-color: #24466f }
code, pre { font: 13px ui-monospace, monospace } h2 { margin-top: 2em } small { color: #666 }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } article { background: #222 } }
"""


def write_page(report: Report, path: Path) -> None:
    """Write the report to one file."""
    body = [f"<h1>ddparity audit {html.escape(report.script.name)}</h1>", f"<pre>{html.escape(summary(report))}</pre>"]
    for one in report.findings:
        cause = (
            "" if (one.cause_file, one.cause_line) == (one.file, one.line) else place(one.cause_file, one.cause_line)
        )
        body.append(
            f'<article class="{one.severity}"><h3>{one.code} {html.escape(one.title)} '
            f"<small>{one.severity}, {one.certainty}, ranks {', '.join(map(str, one.ranks))}</small></h3>"
            f"<p><code>{html.escape(place(one.file, one.line))}</code>"
            + (f" caused at <code>{html.escape(cause)}</code>" if cause else "")
            + f"</p><p>{html.escape(one.message)}</p><p><b>Repair:</b> {html.escape(one.fix)}</p></article>"
        )
    body += ["<h2>Timeline</h2>", _timeline(report.run), "<h2>Samples</h2>", *_samples(report.run)]
    title = html.escape(f"ddparity audit {report.script.name}")
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        + "\n".join(body)
        + "</html>\n"
    )


def _timeline(run: Run) -> str:
    """Return a row a rank, with a mark for each step, collective and begin of a pass over a loader."""
    times = [one["t"] for rank in run.ranks for one in rank.records if one["k"] in _MARKS]
    if not times:
        return "<p>No step and no collective was seen.</p>"
    begin, span = min(times), max(max(times) - min(times), 1e-6)
    rows = [_marks(rank, i, begin, span) for i, rank in enumerate(run.ranks)]
    legend = ", ".join(f'<span style="color:{colour}">■</span> {kind}' for kind, colour in _MARKS.items())
    height = _ROW * len(run.ranks) + 4
    return f'<p>{legend}, over {span:.1f} s</p><svg width="{_WIDTH}" height="{height}" role="img">{"".join(rows)}</svg>'


def _marks(rank: Rank, row: int, begin: float, span: float) -> str:
    shown = [one for one in rank.records if one["k"] in _MARKS][:_MOST_MARKS]
    marks = [
        f'<rect x="{60 + (one["t"] - begin) / span * (_WIDTH - 70):.1f}" y="{row * _ROW + 2}" width="1.5" '
        f'height="{_ROW - 5}" fill="{_MARKS[one["k"]]}"><title>{one["k"]} {html.escape(str(one.get("name") or ""))} '
        f"{html.escape(str(one.get('site')))}</title></rect>"
        for one in shown
    ]
    return f'<text x="0" y="{row * _ROW + 13}" font-size="12" fill="currentColor">rank {rank.rank}</text>' + "".join(
        marks
    )


def _samples(run: Run) -> list[str]:
    """Return a picture a pass: a column a sample, a row a rank."""
    pairs = [pair for pair in run.pairs if not pair[0].loader["stream"] and pair[0].indices][:_MOST_PICTURES]
    if not pairs:
        return ["<p>No data set with indices was seen.</p>"]
    return [_picture(pair) for pair in pairs]


def _picture(pair: list[Pass]) -> str:
    first = pair[0]
    size = max(max(one.indices, default=0) for one in pair) + 1
    each = -(-size // _MOST_CELLS)
    cells = -(-size // each)
    width = (_WIDTH - 60) / cells
    rects = []
    for row, one in enumerate(pair):
        for cell in sorted({i // each for i in one.indices}):
            rects.append(
                f'<rect x="{60 + cell * width:.1f}" y="{row * _ROW}" width="{max(width - 0.3, 0.5):.1f}" '
                f'height="{_ROW - 3}" fill="{_COLOURS[one.rank % len(_COLOURS)]}"/>'
            )
        rects.append(f'<text x="0" y="{row * _ROW + 12}" font-size="12" fill="currentColor">rank {one.rank}</text>')
    what = "training" if first.training else "evaluation"
    where = html.escape(str(first.loader["site"]).rpartition("/")[2])
    return (
        f"<p>{what}, loader at <code>{where}</code>, pass {first.number + 1}: {size} samples, a column for {each}</p>"
        f'<svg width="{_WIDTH}" height="{_ROW * len(pair)}" role="img">{"".join(rects)}</svg>'
    )
