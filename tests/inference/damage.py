"""Random damage to a directory of predictions: each is refused with the file's name, or harmless, and then mended.

`make damage` runs all of it and writes the figures to benchmarks/RESULTS.md. test_damage.py runs a small part.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ddparity as dp

LENGTH, ROWS = 96, 32
FLIPS, SWAPS = 500, 250  # of a whole run
MENDED = 0.1  # of the damages are followed by another predict()
Contents = dict[str, bytes]


def _model(x: torch.Tensor) -> dict[str, Any]:
    numbers = x.tolist()
    return {
        "logits": x[:, None].float() * torch.tensor([0.1, 1.0, 10.0, 1e9]),
        "text": [f"sample {n}" if n % 5 else None for n in numbers],
        "boxes": [torch.full((n % 3, 4), float(n)) for n in numbers],
    }


def _predict(path: Path) -> None:
    dp.predict(_model, torch.arange(LENGTH), 8, path, rows_per_file=ROWS, key="a")


def damages(contents: Contents, flips: int, swaps: int, seed: int) -> Iterator[tuple[str, Contents]]:
    """Yield kinds of damage, and the files that are damaged with what they hold then."""
    draw = random.Random(seed)
    parts = [name for name in contents if name.startswith("part-")]
    for name, count in [*((None, flips),), ("_run.json", flips // 5), ("_common_metadata", flips // 5)]:
        for _ in range(count):
            one = draw.choice(parts) if name is None else name
            data = bytearray(contents[one])
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            yield f"a bit of {'a part' if name is None else name}", {one: bytes(data)}
    for _ in range(swaps):
        one = draw.choice(parts)
        data, size = bytearray(contents[one]), draw.choice([1, 4, 16, 64])
        a, b = sorted(draw.sample(range(0, len(data) - size, size), 2))
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
        yield "two blocks of a part exchanged", {one: bytes(data)}
    for _ in range(swaps):
        one = draw.choice(parts)
        yield "a part cut off", {one: contents[one][: draw.randrange(len(contents[one]))]}
        yield "bytes behind a part", {one: contents[one] + draw.randbytes(draw.choice([1, 8, 64]))}
    for one in parts:
        for other in parts:
            if one != other:
                yield "a part in place of another", {one: contents[other]}
            if one < other:
                yield "names of two parts exchanged", {one: contents[other], other: contents[one]}


def run(folder: Path, flips: int = FLIPS, swaps: int = SWAPS, seed: int = 7) -> dict[str, Counter[str]]:
    """Return for each kind of damage how often reading refused it, returned exactly what was written, or "silent".

    Raises:
        AssertionError: an error is none of the documented ones or does not name the file; or the next predict() does
            not write the same bytes again.
    """
    path = folder / "out"
    _predict(path)
    expected = dp.read_predictions(path)
    contents = {file.name: file.read_bytes() for file in sorted(path.iterdir())}
    draw = random.Random(seed)
    counts: dict[str, Counter[str]] = {}
    for kind, damaged in damages(contents, flips, swaps, seed):
        for name, data in damaged.items():
            (path / name).write_bytes(data)
        counts.setdefault(kind, Counter())[_read(path, expected, damaged)] += 1
        if "_run.json" in damaged:
            with pytest.raises(ValueError, match=r"_run\.json is damaged"):  # it is unknown what the directory holds
                _predict(path)
        elif draw.random() < MENDED:
            _predict(path)
            found = {file.name: file.read_bytes() for file in sorted(path.iterdir())}
            for name in damaged:
                assert name == "_common_metadata" or found[name] == contents[name], f"{kind}: {name} is not mended"
            assert found.keys() == contents.keys() and _read(path, expected, {}) == "exact", kind
            counts[kind]["mended"] += 1
        for name, data in contents.items():
            (path / name).write_bytes(data)
    return counts


def _read(path: Path, expected: Any, damaged: Contents) -> str:
    try:
        found = dp.read_predictions(path)
    except ValueError as error:
        refused = str(error)
    else:
        return "exact" if _same(found, expected) else "silent"
    assert all(name in refused for name in damaged), f"{refused} does not name {list(damaged)}"
    return "refused"


def _same(found: Any, expected: Any) -> bool:
    if found.keys() != expected.keys() or found["text"] != expected["text"]:
        return False
    pairs = [(found["logits"], expected["logits"]), *zip(found["boxes"], expected["boxes"], strict=False)]
    return len(found["boxes"]) == len(expected["boxes"]) and all(
        isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs
    )


def main() -> None:
    from benchmarks.results import machine, table, write_section

    facts = machine("pyarrow")
    with tempfile.TemporaryDirectory() as folder:
        counts = run(Path(folder))
    ways = ("refused", "exact", "silent", "mended")
    rows = [
        [kind, str(count.total() - count["mended"]), *(str(count[way]) for way in ways)]
        for kind, count in counts.items()
    ]
    text = "\n\n".join(
        [
            "## Damaged predictions",
            facts,
            f"`make damage`: a directory of {LENGTH} samples in {LENGTH // ROWS} parts, damaged and read. Refused: an "
            "error names the file. Exact: what was written came back, since the damage is in bytes that are not read, "
            "or exchanges equal bytes. Mended: after a tenth of the damages, the next `predict` wrote the same bytes "
            "again; of `_run.json` no damage can be mended, and `predict` refuses the directory.",
            table(["damage", "cases", *ways], rows),
        ]
    )
    print(text)
    write_section("damaged predictions", text)
    sys.exit(any(count["silent"] for count in counts.values()))


if __name__ == "__main__":
    main()
