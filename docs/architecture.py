"""Draws architecture.svg: the folders of src/ddparity on their floors, and an arrow from each to those it imports from.

    python docs/architecture.py

The floors are those of the table in architecture.md; the arrows come from the import statements of the source. An arrow
is left out where others lead the same way: `inference` imports from `runtime`, but also from `data`, which imports from
`runtime`.
"""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "src" / "ddparity"
WIDTH, HEIGHT, LEFT = 900, 92, 110  # of the picture, of a floor, and of the column that names the floors; pixels
BOX_WIDTH, BOX_HEIGHT = 118, 40
BLUE = "#24466f"


def floors() -> list[list[str]]:
    """Return the folders of each floor, lowest first, as the page's table has them."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)[^`]*` \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    return [[name for floor, name in rows if floor == wanted] for wanted in sorted({floor for floor, _ in rows})]


def imports() -> set[tuple[str, str]]:
    """Return pairs of folders, the first of which imports from the second.

    A file at the top counts as a folder; `__main__.py`, which only calls the command line, is left out.
    """
    found = set()
    for path in SOURCE.rglob("*.py"):
        inside = path.relative_to(SOURCE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*inside[: len(inside) - node.level], *(node.module or "").split(".")]
                names = [base[0]] if base[0] else [alias.name for alias in node.names]
                found |= {(inside[0], name if _exists(name) else "__init__") for name in names}
    return {(importer, imported) for importer, imported in found if importer not in (imported, "__main__")}


def _exists(name: str) -> bool:
    return (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").exists()


def implied(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the pairs that a way over other folders also connects."""
    below: dict[str, set[str]] = {name: set() for pair in pairs for name in pair}
    for importer, imported in pairs:
        below[importer].add(imported)

    def reached(name: str) -> set[str]:
        return below[name].union(*map(reached, below[name]))

    return {(a, b) for a, b in pairs if any(b in reached(between) for between in below[a] - {b})}


def picture() -> str:
    """Return the picture as SVG."""
    levels, pairs = floors(), imports()
    top = len(levels) - 1
    at = {  # the middle of each box
        name: (LEFT + (WIDTH - LEFT) * (number + 0.5) / len(folders), HEIGHT * (top - floor + 0.5))
        for floor, folders in enumerate(levels)
        for number, name in enumerate(folders)
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * (top + 1)}" '
        'font-family="sans-serif" font-size="15" text-anchor="middle">',
        '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{BLUE}"/></marker>',
        f'<rect width="{WIDTH}" height="{HEIGHT * (top + 1)}" fill="#fff"/>',
    ]
    for floor in range(top + 1):
        y = HEIGHT * (top - floor)
        lines.append(f'<rect y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="{("#f3f5f8", "#fff")[floor % 2]}"/>')
        lines.append(f'<text x="{LEFT // 2}" y="{y + HEIGHT / 2 + 5:.0f}" fill="#667">floor {floor}</text>')
    for importer, imported in sorted(pairs - implied(pairs)):
        (x1, y1), (x2, y2) = at[importer], at[imported]
        if y2 - y1 > HEIGHT and abs(x2 - x1) > BOX_WIDTH:  # around the boxes of the floors between
            x1, bend1, bend2 = x1 + math.copysign(BOX_WIDTH / 2, x2 - x1), (x2, y1), (x2, y1)
        else:  # arrows leave and reach a box side by side, in the order of where they go
            x1, x2, y1 = x1 + (x2 - x1) * 0.07, x2 + (x1 - x2) * 0.07, y1 + BOX_HEIGHT / 2
            bend1, bend2 = (x1, y1 + (y2 - y1) * 0.4), (x2, y2 - (y2 - y1) * 0.6)
        points = [(x1, y1), bend1, bend2, (x2, y2 - BOX_HEIGHT / 2)]
        path = "M{} C{} {} {}".format(*(f"{x:.0f} {y:.0f}" for x, y in points))
        lines.append(f'<path d="{path}" fill="none" stroke="{BLUE}" stroke-width="1.6" marker-end="url(#head)"/>')
    for name, (x, y) in at.items():
        shown = f"{name}/" if (SOURCE / name).is_dir() else f"{name}.py"
        lines.append(
            f'<rect x="{x - BOX_WIDTH / 2:.0f}" y="{y - BOX_HEIGHT / 2:.0f}" width="{BOX_WIDTH}" '
            f'height="{BOX_HEIGHT}" rx="6" fill="#fff" stroke="{BLUE}" stroke-width="1.5"/>'
            f'<text x="{x:.0f}" y="{y + 5:.0f}">{shown}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    (DOCS / "architecture.svg").write_text(picture())
