"""The report as one HTML file, which needs no network: findings, a timeline of each rank, and the samples by epoch."""

from __future__ import annotations

import html
from pathlib import Path

from .catalogue import Finding
from .records import Pass, Rank, Run
from .report import place, summary
from .run import Report

_WIDTH = 1000  # units of a row, which is as wide as the page
_MOST_MARKS = 1_000  # of a rank
_MOST_CELLS = 300  # samples in a picture, each of which stands for several where there are more
_MOST_PICTURES = 12
_MARKS = {"step": "optimizer step", "collective": "collective", "iter": "begin of a pass over a loader"}
_RANKS = 8  # colours
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --quiet: #666; --paper: #fff; --box: #f5f5f5;
  --error: #b00020; --warning: #a86400; --note: #24466f; --step: #24466f; --collective: #c2571a; --iter: #2f7d52;
  --r0: #24466f; --r1: #c2571a; --r2: #2f7d52; --r3: #8a3b72; --r4: #6b6b1f; --r5: #2a7f9e; --r6: #aa3333; --r7: #555 }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --quiet: #999; --paper: #181818; --box: #242424;
  --error: #ff6b7d; --warning: #f0b04a; --note: #7fb0ea; --step: #7fb0ea; --collective: #f0935a; --iter: #6fc796;
  --r0: #7fb0ea; --r1: #f0935a; --r2: #6fc796; --r3: #d98fc2; --r4: #c9c96a; --r5: #6cc3e0; --r6: #ee8080; --r7: #aaa }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.5em } h2 { margin-top: 2em; font-size: 1.2em } h3 { margin: .6em 0; font-size: 1em }
small { color: var(--quiet); font-weight: normal }
code, pre { font: 13px/1.45 ui-monospace, monospace }
pre { white-space: pre-wrap; background: var(--box); padding: .8em }
article { border-left: 4px solid; margin: 1em 0; padding: .1em 1em; background: var(--box) }
article.error { border-color: var(--error) } article.warning { border-color: var(--warning) }
article.note { border-color: var(--note) }
figure { margin: 1.2em 0 } figcaption { margin-bottom: .4em }
.row { display: flex; align-items: center; gap: .6em; margin: 3px 0 }
.row span { flex: 0 0 3.6em; font-size: 13px; color: var(--quiet) }
.row svg { flex: 1; min-width: 0; height: 15px; background: var(--box) }
"""


def write_page(report: Report, path: Path) -> None:
    """Write the report to one file."""
    body = [f"<h1>ddparity audit {html.escape(report.script.name)}</h1>", f"<pre>{html.escape(summary(report))}</pre>"]
    body += [_article(one) for one in report.findings]
    body += ["<h2>Timeline</h2>", _timeline(report.run), "<h2>Samples</h2>", *_samples(report.run)]
    title = html.escape(f"ddparity audit {report.script.name}")
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}{_colours()}</style>'
        + "\n".join(body)
        + "</html>\n"
    )


def _article(one: Finding) -> str:
    cause = "" if (one.cause_file, one.cause_line) == (one.file, one.line) else place(one.cause_file, one.cause_line)
    ranks = f"rank{'' if len(one.ranks) == 1 else 's'} {', '.join(map(str, one.ranks))}"
    return (
        f'<article class="{one.severity}"><h3>{one.code} {html.escape(one.title)} '
        f"<small>{one.severity}, {one.certainty}, {ranks}</small></h3>"
        f"<p><code>{html.escape(place(one.file, one.line))}</code>"
        + (f" caused at <code>{html.escape(cause)}</code>" if cause else "")
        + f"</p><p>{html.escape(one.message)}</p><p><b>Repair:</b> {html.escape(one.fix)}</p></article>"
    )


def _colours() -> str:
    """Return a class of each kind of mark and of each rank."""
    return "".join(f".{name} {{ fill: var(--{name}) }} " for name in (*_MARKS, *(f"r{i}" for i in range(_RANKS))))


def _timeline(run: Run) -> str:
    """Return a row a rank, with a mark for each step, collective and begin of a pass over a loader."""
    times = [one["t"] for rank in run.ranks for one in rank.records if one["k"] in _MARKS]
    if not times:
        return "<p>No step and no collective was seen.</p>"
    begin, span = min(times), max(max(times) - min(times), 1e-6)
    rows = [_row(rank.rank, _marks(rank, begin, span)) for rank in run.ranks]
    legend = ", ".join(f'<b style="color:var(--{kind})">■</b> {name}' for kind, name in _MARKS.items())
    return f"<figure><figcaption>{legend}; {span:.1f} s from left to right</figcaption>{''.join(rows)}</figure>"


def _row(rank: int, marks: str) -> str:
    shown = (
        f'<svg viewBox="0 0 {_WIDTH} 10" preserveAspectRatio="none" role="img" aria-label="rank {rank}">{marks}</svg>'
    )
    return f'<div class="row"><span>rank {rank}</span>{shown}</div>'


def _marks(rank: Rank, begin: float, span: float) -> str:
    shown = [one for one in rank.records if one["k"] in _MARKS][:_MOST_MARKS]
    return "".join(
        f'<rect class="{one["k"]}" x="{(one["t"] - begin) / span * (_WIDTH - 3):.1f}" width="2" height="10"><title>'
        f"{html.escape(one.get('name') or _MARKS[one['k']])} {html.escape(_short(one.get('site')))}</title></rect>"
        for one in shown
    )


def _short(site: str | None) -> str:
    return str(site or "").rpartition("/")[2]


def _samples(run: Run) -> list[str]:
    """Return a picture a pass: a column a sample, a row a rank."""
    pairs = [pair for pair in run.pairs if not pair[0].loader["stream"] and pair[0].indices]
    if not pairs:
        return ["<p>No data set with indices was seen.</p>"]
    rest = len(pairs) - _MOST_PICTURES
    return [_picture(pair) for pair in pairs[:_MOST_PICTURES]] + ([f"<p>{rest} more passes.</p>"] if rest > 0 else [])


def _picture(pair: list[Pass]) -> str:
    first = pair[0]
    size = max(max(one.indices, default=0) for one in pair) + 1
    each = -(-size // _MOST_CELLS)
    width = _WIDTH / -(-size // each)
    rows = [
        _row(
            one.rank,
            "".join(
                f'<rect class="r{one.rank % _RANKS}" x="{cell * width:.1f}" width="{width * 0.85:.1f}" height="10"/>'
                for cell in sorted({i // each for i in one.indices})
            ),
        )
        for one in pair
    ]
    columns = "each column is a sample" if each == 1 else f"a column stands for {each} samples"
    what = "training" if first.training else "evaluation"
    return (
        f"<figure><figcaption>{what}, loader at <code>{html.escape(_short(first.loader['site']))}</code>, pass "
        f"{first.number + 1}: {columns}, {size} in all</figcaption>{''.join(rows)}</figure>"
    )
