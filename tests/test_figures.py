"""The figures of the README and of the pages are those of benchmarks/RESULTS.md."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from ddparity.auditing.catalogue import CATALOGUE
from tests.pages import ENGLISH

ROOT = Path(__file__).parent.parent
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text()
NUMBER = r"([\d,]+(?:\.\d+)?)"


def _section(name: str) -> str:
    """Return a section as far as its first heading below."""
    (text,) = re.findall(rf"<!-- {re.escape(name)} -->(.*?)<!-- /{re.escape(name)} -->", RESULTS, re.DOTALL)
    return str(text).partition("\n### ")[0]


def _rows(section: str, label: str) -> list[list[str]]:
    """Return the cells of the rows whose first cell matches."""
    lines = [line for line in _section(section).splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    found = [row for row in rows if re.fullmatch(label, row[0])]
    assert found, f"{section} has no row {label}"
    return found


def _one(section: str, label: str, column: int, part: int = 0) -> str:
    """Return a number of the only such row; `part`: which of the cell's numbers."""
    (row,) = _rows(section, label)
    return re.findall(NUMBER, row[column])[part]


def _range(section: str, label: str, column: int, every: bool = False) -> list[str]:
    """Return the smallest and the largest number of a column: the first of each cell, or every one of it."""
    cells = [re.findall(NUMBER, row[column]) for row in _rows(section, label)]
    numbers = [number for cell in cells for number in (cell if every else cell[:1])]
    return [min(numbers, key=float), max(numbers, key=float)]


_PLAIN = r"\(\d+, \d+, \d+, \d+\)"
_STEP = r"ResNet-18 .*whole step"
_NORM = "sync_batchnorm_cpu"

# A page, a sentence of it with # for each number, and what the numbers must be.
CLAIMS = [
    (
        "costs",
        "million parameters, take # to # times DDP's step",
        _range("sizes", "ResNet-18|GPT of 10 M|MLP of 50 M", 3),
    ),
    ("costs", "take # to # times the step of the fast reduction on 2", _range("strict", r".*, K = \d", 3)),
    (
        "costs",
        "reach rank 0 in # to # times the time of the recipe",
        _range("predict", "time to collect .*recipe.*", 1),
    ),
    ("costs", "and in # to # times that of Accelerate", _range("predict", "time to collect .*Accelerate", 1)),
    (
        "costs",
        "reach # % held-out accuracy, and # % with local statistics",
        [_one("digits_batchnorm", "synchronised", 6), _one("digits_batchnorm", "local", 6)],
    ),
    ("costs", "takes # to # times the local layer on contiguous", _range(_NORM, _PLAIN, 3, every=True)),
    ("costs", "A whole training step takes # to # times", _range(_NORM, _STEP, 3, every=True)),
    (
        "costs",
        "96 MB take # ms to save and # ms to load",
        [_one("checkpoint", "save_checkpoint", 1), _one("checkpoint", "load_checkpoint", 1)],
    ),
    (
        "costs",
        "In the background the call returns after # ms",
        [_one("checkpoint", r"save_checkpoint\(background=True\)", 1)],
    ),
    ("costs", "takes # times as long as `import torch`", [_one("imports", "ddparity", 2)]),
    (
        "sync_batchnorm",
        "accuracy is # % with synchronised and # % with local statistics",
        [_one("digits_batchnorm", "synchronised", 6), _one("digits_batchnorm", "local", 6)],
    ),
    (
        "checkpoints",
        "a save # ms, a load # ms, of which SHA-256 takes # ms each; `torch.save` with a flush # ms, safetensors' "
        "`save_file` # ms, `torch.load` # ms, safetensors' `load_file` # ms",
        [
            _one("checkpoint", "save_checkpoint", 3),
            _one("checkpoint", "load_checkpoint", 3),
            *re.findall(r"A SHA-256 of the 96 MB alone takes (\d+) ms", RESULTS),
            *(_one("checkpoint", name, 3) for name in ("torch.save", "safetensors' save_file", "torch.load")),
            _one("checkpoint", "safetensors' load_file", 3),
        ],
    ),
    (
        "checkpoints",
        "returns after # to # ms: the copy of a rank's 48 MB takes # to # ms",
        [
            _one("checkpoint", name, 1, part)
            for name in ("sharded, 2 processes, background=True", "sharded, a copy of rank 0's shards")
            for part in (1, 2)
        ],
    ),
    ("checkpoints", "process took # ms", [_one("checkpoint", "sharded, .*, the first", 1)]),
    ("checkpoints", "was killed (SIGKILL) at # random instants", [_one("checkpoint", "random instants, plain", 1)]),
    (
        "checkpoints",
        "each of the # to # system calls",
        _range("checkpoint", "before and after each system call, .*", 1),
    ),
    (
        "checkpoints",
        "of # files # were refused with one error that names the file, and # loaded",
        [_one("checkpoint_fuzz", r"200,000", column) for column in (0, 1, 2)],
    ),
    (
        "verify",
        "the largest difference of any was # times the noise, where # and # times were tolerated",
        [
            f"{float(_one('noise_floor', 'CNN, .*', 5)):.1f}",
            _one("noise_floor", "MLP, .*", 3),
            _one("noise_floor", "CNN, .*", 3),
        ],
    ),
    ("data", "the # indices of a step take less than # µs", ["256", "100"]),
]


@pytest.mark.parametrize(("page", "sentence", "numbers"), CLAIMS, ids=[f"{row[0]}: {row[1][:40]}" for row in CLAIMS])
def test_a_sentence_has_the_measured_numbers(page: str, sentence: str, numbers: list[str]) -> None:
    text = " ".join((ROOT / "docs" / f"{page}.md").read_text().split())
    found = re.findall(re.escape(sentence).replace(r"\#", NUMBER), text)
    shown = [list(one) if isinstance(one, tuple) else [one] for one in found]
    assert shown == [numbers], f"docs/{page}.md: {sentence}"


def test_the_steps_of_a_plan_are_as_short_as_the_page_says() -> None:
    for _, step, each, *_ in _rows("plan", r"[\d,]+"):
        assert float(step) < 100
        assert float(each) < 100


def test_tables_that_scripts_write_are_in_the_results() -> None:
    """Between markers that both have, a page's lines are lines of that section, but for what it says around them."""
    results = set(RESULTS.splitlines())
    checked = 0
    for page in (ROOT / "README.md", *ENGLISH):
        for name, text in re.findall(r"<!-- ([\w ]+) -->\n(.*?)<!-- /\1 -->", page.read_text(), re.DOTALL):
            if f"<!-- {name} -->" in RESULTS:
                lines = [line for line in text.splitlines() if line.startswith("|")]
                assert not [line for line in lines if line not in results], f"{page.name}: {name}"
                checked += len(lines)
    assert checked >= 6


def test_numbers_of_the_batch_norms_page_are_ranges_of_the_results() -> None:
    text = (ROOT / "docs" / "sync_batchnorm.md").read_text()
    names = {
        r"\(32, 64, 56, 56\)": r"\(32, 64, 56, 56\)",
        r"\(64, 256, 14, 14\)": r"\(64, 256, 14, 14\)",
        r"\(16, 512, 7, 7\)": r"\(16, 512, 7, 7\)",
        r"\(32, 64, 56, 56\), channels-last": r"\(32, 64, 56, 56\), channels_last",
        r"whole step.*small images": r"ResNet-18 for small images .*whole step",
        r"whole step.*ImageNet": r"ResNet-18 as for ImageNet .*whole step",
    }
    for shown, measured in names.items():
        (cells,) = re.findall(rf"^\| {shown} \| ([^|]*) \| ([^|]*) \|$", text, re.MULTILINE)
        for cell, column in zip(cells, (3, 4), strict=True):
            low, high = _range(_NORM, measured, column, every=True)
            assert cell == (low if low == high else f"{low} to {high}"), shown


def test_the_readme_counts_the_codes_of_the_audit() -> None:
    assert re.findall(r"\b(\d+) codes of the audit", (ROOT / "README.md").read_text()) == [str(len(CATALOGUE))]


def test_the_table_of_promises_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no measurement: `python benchmarks/scaling.py --tables` writes it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = importlib.import_module("scaling").promise_table()
    assert f"<!-- promise -->\n{made}\n<!-- /promise -->" in (ROOT / "docs" / "scaling.md").read_text()
