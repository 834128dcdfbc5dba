"""The script of the README runs as it is; the examples of the pages are doctests."""

from __future__ import annotations

import json
import os
import posixpath
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from benchmarks import results

import ddparity as dp
from tests.launcher.failure_cases import CASES
from tests.pages import ENGLISH, run_file
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


SCRIPT = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]


def test_the_readmes_script_gives_the_same_accuracy_on_one_and_two_processes(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    outputs = [run_ranks(run_file, world_size, str(tmp_path), "train.py")[0] for world_size in (1, 2)]
    found = [re.fullmatch(r"accuracy (0\.\d+), (\d) processes\n", output).groups() for output in outputs]
    assert [processes for _, processes in found] == ["1", "2"]
    assert float(found[0][0]) == float(found[1][0]) > 0.85


def test_the_readmes_script_is_short() -> None:
    lines = SCRIPT.splitlines()
    assert len([line for line in lines if line and not line.startswith(("import ", "from "))]) <= 16


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [page for page in ENGLISH if f" {page.relative_to(ROOT / 'docs')}\n" not in navigation]


@pytest.mark.parametrize(
    "page", [ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "SECURITY.md")]
)
def test_every_link_of_a_file_beside_the_pages_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def _build(language: str, site: Path) -> subprocess.CompletedProcess[str]:
    config = "mkdocs.yml" if language == "en" else f"mkdocs.{language}.yml"
    # With --quiet, MkDocs would count no warning.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", str(site / language)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_the_site_builds_without_a_warning_in_both_languages(tmp_path: Path) -> None:
    """A broken link, anchor or reference is a warning. Nothing is loaded from the network when it is read."""
    with ThreadPoolExecutor() as pool:
        builds = list(pool.map(_build, ("en", "zh"), (tmp_path, tmp_path)))
    for build in builds:
        assert build.returncode == 0, build.stdout + build.stderr
        assert "Documentation built" in build.stderr
        assert "WARNING" not in build.stderr
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]*src=\"?https?:|<link[^>]*rel=\"?(?:stylesheet|preconnect)[^>]*https?:"
    )
    switch = re.compile(r'<a href="([^"]*)" hreflang="(\w+)" class="md-select__link">')
    for path in tmp_path.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not loaded.search(text), path
        language, page = path.relative_to(tmp_path).as_posix().split("/", 1)
        if page != "404.html":  # it knows no address, its own neither
            links = {
                to: posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
                for link, to in switch.findall(text)
            }
            assert links == ({"en": page, "zh": f"zh/{page}"} if language == "en" else {"en": f"../{page}", "zh": page})
            assert all((tmp_path / other / page).exists() for other in links), path
    found = json.loads((tmp_path / "zh" / "search" / "search_index.json").read_text())["docs"]
    assert [one for one in found if "梯度\u200b累积" in one["title"]], (
        "no spaces of no width between words: jieba did not run"
    )


def test_every_public_name_is_documented() -> None:
    pages = README + "".join(page.read_text() for page in ENGLISH if page.parent.name != "reference")
    # Types that other names return or raise are described in the docstrings of these names.
    returned = {"DDParityError", "LoadedMicroBatch", "MicroBatch", "Saving", "Step", "World"}
    assert not [name for name in dp.__all__ if name not in returned and name not in pages]
    assert not [name for name in dp.__all__ if not getattr(dp, name).__doc__]


def test_the_number_of_failures_is_the_same_everywhere() -> None:
    """In the README, on the page, and in the cases that are run."""
    page = (ROOT / "docs" / "failures.md").read_text()
    shown = [*re.findall(r"\b(\d+) (?:ways to fail|failures\b)", README), *re.findall(r"one of (\d+) failures", page)]
    assert len(shown) >= 2
    assert set(shown) == {str(len(CASES))}


def test_the_readme_and_the_costs_show_what_was_measured() -> None:
    report = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    for language, readme in results.READMES.items():
        shown = re.search(r"<!-- costs -->\n(.*?)\n<!-- /costs -->", readme.read_text(encoding="utf-8"), re.DOTALL)[1]
        assert shown == results.costs(report, language), "run `python benchmarks/results.py`"
        assert len(shown.splitlines()) == 6  # head, rule, four figures
    table = re.search(
        r"<!-- step_overhead -->\n(.*?)<!-- /step_overhead -->", results.COSTS_PAGE.read_text(), re.DOTALL
    )
    lines = table[1].splitlines()
    assert len(lines) == 6  # head, rule, two models with K = 1 and 4
    assert not [line for line in lines if line not in report]
