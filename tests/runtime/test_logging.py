from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import loguru
import pytest
import rich
import rich.progress
import structlog
import torch
import torch.distributed as dist
from rich.logging import RichHandler
from torch.utils.data import DataLoader

import ddparity as dp
from ddparity.runtime.log_libraries import restore_method
from tests.ranks import outcomes

log = logging.getLogger("app.training")


def _with_output_in(path: str, body: Callable[[], object], joined: bool) -> None:
    """Run `body`; this process's standard output and error go to a file to which all ranks append, as to a terminal."""
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.resetwarnings()
    with dp.world(device="cpu", timeout=30) if joined else contextlib.nullcontext():
        body()
        sys.stdout.flush()
        sys.stderr.flush()


def _lines(tmp_path: Path, body: Callable[[], object], ranks: int = 3, joined: bool = True) -> list[str]:
    """Return the lines of all ranks, sorted."""
    path = tmp_path / "terminal"
    for outcome in outcomes(_with_output_in, ranks, str(path), body, joined, in_world=False):
        assert outcome.error is None, outcome.trace
    return sorted(path.read_text().splitlines())


def _rank() -> int:
    return int(os.environ["RANK"])


def _each_level() -> None:
    dp.setup_logging()
    for level in ("debug", "info", "warning", "error"):
        getattr(log, level)(f"a {level}")


EACH_LEVEL = sorted(
    ["INFO app.training: a info", "WARNING app.training: a warning", "ERROR app.training: a error"]
    + [f"[rank {rank}] {level.upper()} app.training: a {level}" for rank in (1, 2) for level in ("warning", "error")]
)


@pytest.mark.parametrize("joined", [True, False], ids=["in the world", "before it"])
def test_each_line_appears_once(tmp_path: Path, joined: bool) -> None:
    assert _lines(tmp_path, _each_level, joined=joined) == EACH_LEVEL


def _first_before_then_in_the_world() -> None:
    dp.setup_logging()
    with dp.world(device="cpu", timeout=30):
        dp.setup_logging()
        _each_level()


def test_a_second_call_changes_nothing(tmp_path: Path) -> None:
    assert _lines(tmp_path, _first_before_then_in_the_world, joined=False) == EACH_LEVEL


def _levels() -> None:
    dp.setup_logging("debug", others=logging.ERROR)
    for level in ("debug", "info", "warning", "error"):
        getattr(log, level)(f"a {level}")


def test_levels(tmp_path: Path) -> None:
    lines = [f"{level.upper()} app.training: a {level}" for level in ("debug", "info", "warning", "error")]
    assert _lines(tmp_path, _levels, ranks=2) == sorted([*lines, "[rank 1] ERROR app.training: a error"])


@pytest.mark.parametrize("level", ["loud", ""])
def test_an_unknown_level_is_refused(level: str) -> None:
    with pytest.raises(ValueError, match=f"unknown logging level '{level}': use one of .*WARNING"):
        dp.setup_logging(level)


def _with_handlers() -> None:
    logging.basicConfig(format="root %(message)s", level=logging.WARNING)
    library = logging.getLogger("library")  # as transformers and other libraries do at import
    library.propagate = False
    library.setLevel(logging.INFO)
    library.addHandler(logging.StreamHandler())
    library.handlers[0].setFormatter(logging.Formatter("library %(message)s"))
    bare = logging.getLogger("bare")
    bare.propagate = False
    bare.addHandler(logging.StreamHandler())
    dp.setup_logging()
    dp.setup_logging()
    for logger in (log, library, bare):
        logger.info("info")
        logger.warning("warning")


def test_existing_handlers_follow_the_levels(tmp_path: Path) -> None:
    """`basicConfig` and a library's handler keep their formats; no second handler and no second prefix is added."""
    rank_0 = ["root info", "root warning", "library info", "library warning", "info", "warning"]
    others = [f"[rank 1] {text}" for text in ("root warning", "library warning", "warning")]
    assert _lines(tmp_path, _with_handlers, ranks=2) == sorted(rank_0 + others)


def _with_rich_handler() -> None:
    """Log through rich's handler, which writes to rich's shared console."""
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(show_time=False, show_path=False)])
    dp.setup_logging()
    log.info("an info")
    log.warning("a warning")


def test_richs_handler_follows_the_levels_on_every_rank(tmp_path: Path) -> None:
    lines = [re.sub(" +", " ", line).strip() for line in _lines(tmp_path, _with_rich_handler, ranks=2)]
    assert sorted(lines) == ["INFO an info", "WARNING [rank 1] a warning", "WARNING a warning"]


def _with_files(folder: Path) -> None:
    for logger, name in ((logging.getLogger(), "root"), (log, "own")):
        handler = logging.FileHandler(folder / f"{name}{_rank()}")
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)
    dp.setup_logging()
    log.info("an info")
    log.warning("a warning")


def test_log_files_do_not_change(tmp_path: Path) -> None:
    """Each rank's file has all of the rank's lines, without a prefix; nothing goes to the terminal."""
    assert _lines(tmp_path, functools.partial(_with_files, tmp_path), ranks=2) == []
    for rank in range(2):
        for name in ("root", "own"):
            assert (tmp_path / f"{name}{rank}").read_text() == "INFO an info\nWARNING a warning\n"


def _warns() -> None:
    dp.setup_logging()
    dist.barrier()
    warnings.warn("the same on all ranks", stacklevel=1)
    warnings.warn(f"only of rank {_rank()}", stacklevel=1)
    if _rank() == 1:
        warnings.warn("one rank has this", stacklevel=1)
    warnings.warn("x" * 600 + f"{_rank()}", stacklevel=1)  # the difference is at the end


def test_warnings_appear_once(tmp_path: Path) -> None:
    lines = [line for line in _lines(tmp_path, _warns) if "UserWarning" in line]  # the source line of each follows it
    for text, count in (("the same on all ranks", 1), ("only of rank", 3), ("one rank has this", 1), ("xxx", 3)):
        assert sum(text in line for line in lines) == count, text
    [line] = [line for line in lines if "one rank has this" in line]
    assert re.match(r"\[rank 1\] WARNING py.warnings: .*test_logging\.py:\d+: UserWarning: one rank has this$", line)


def _warns_before_the_world() -> None:
    dp.setup_logging()
    warnings.warn("at import", stacklevel=1)


def test_warnings_before_the_world_come_from_rank_0(tmp_path: Path) -> None:
    lines = [line for line in _lines(tmp_path, _warns_before_the_world, joined=False) if "UserWarning" in line]
    assert sum("at import" in line for line in lines) == 1
    assert not any(line.startswith("[rank") for line in lines)


class _WarningSet(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        warnings.warn("in a worker", stacklevel=1)
        warnings.warn(f"of sample {index} on rank {_rank()}", stacklevel=1)
        return index


def _warns_in_workers() -> None:
    dp.setup_logging()
    loader = DataLoader(_WarningSet(), batch_size=1, num_workers=2, multiprocessing_context="fork")
    for _ in loader:
        with dp.first("world"):  # sends requests to the store while the workers do
            pass
    warnings.warn("after the workers", stacklevel=1)
    one = torch.ones(1)
    dist.all_reduce(one)
    assert float(one) == 2


def test_workers_warn_through_their_own_connections(tmp_path: Path) -> None:
    lines = [line for line in _lines(tmp_path, _warns_in_workers, ranks=2) if "UserWarning" in line]
    assert sum("in a worker" in line for line in lines) == 1
    assert sum("of sample" in line for line in lines) == 16
    assert sum("after the workers" in line for line in lines) == 1
    assert len(lines) == 18


def _warns_without_a_store() -> None:
    dp.setup_logging()
    with dp.world(device="cpu", timeout=30):
        pass
    warnings.warn("after the world", stacklevel=1)


def test_warnings_after_the_world(tmp_path: Path) -> None:
    lines = _lines(tmp_path, _warns_without_a_store, ranks=2, joined=False)
    assert sum("after the world" in line for line in lines if "UserWarning" in line) == 1


def _bars(imported: str) -> None:
    """Show progress bars of tqdm, which is imported before or after `setup_logging`, and of rich."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tqdm"]:
        del sys.modules[name]  # the fork server has imported it with torch
    if imported == "before":
        importlib.import_module("tqdm.auto")
    dp.setup_logging()
    tqdm = importlib.import_module("tqdm.auto")
    for _ in tqdm.tqdm(range(3), desc=f"plain {_rank()}"):
        pass
    for _ in tqdm.tqdm(range(3), desc=f"wanted {_rank()}", disable=False):
        pass
    for _ in tqdm.trange(3, desc=f"range {_rank()}", disable=None, file=_Terminal()):
        pass
    for _ in rich.progress.track(range(3), description=f"rich {_rank()}", disable=False):
        pass
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bars:
        bars.update(bars.add_task(f"own {_rank()}", total=3), completed=3)
    rich.print(f"printed {_rank()}")


class _Terminal(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(os.fdopen(os.dup(2), "wb"))

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("imported", ["before", "after"])
def test_progress_bars_of_other_ranks_are_disabled(tmp_path: Path, imported: str) -> None:
    text = "\n".join(_lines(tmp_path, functools.partial(_bars, imported), ranks=2))
    for bar in ("plain", "wanted", "range", "rich", "own"):
        assert f"{bar} 0" in text
        assert f"{bar} 1" not in text
    assert "printed 0" in text and "printed 1" in text


def _long_lines() -> None:
    dp.setup_logging()
    for number in range(500):
        log.warning("%d %s", number, str(_rank()) * 1000)


def test_lines_of_several_ranks_do_not_mix(tmp_path: Path) -> None:
    """Failures 15."""
    lines = _lines(tmp_path, _long_lines, ranks=4)
    pattern = re.compile(r"(?:\[rank ([123])\] )?WARNING app.training: \d+ (?:0{1000}|1{1000}|2{1000}|3{1000})")
    assert len(lines) == 2000
    assert all(pattern.fullmatch(line) for line in lines)


def _configures_later() -> None:
    dp.setup_logging()
    for text in ("first", "again"):
        logging.basicConfig(format=f"{text} %(message)s", level=logging.DEBUG, force=True)
        log.info("info")
        log.warning("warning")
    library = logging.getLogger("late")
    library.propagate = False
    library.handlers = [logging.StreamHandler()]
    library.handlers[0].setFormatter(logging.Formatter("late %(message)s"))
    library.warning("warning")
    library.handlers[0].setFormatter(logging.Formatter("later %(message)s"))
    library.warning("warning")


def test_handlers_that_are_added_later_follow_the_levels(tmp_path: Path) -> None:
    own = ["first info", "first warning", "again info", "again warning", "late warning", "later warning"]
    others = [f"[rank 1] {line}" for line in own if "info" not in line]
    assert _lines(tmp_path, _configures_later, ranks=2) == sorted(own + others)


def _with_loguru(folder: Path) -> None:
    loguru.logger.remove()
    loguru.logger.add(sys.stderr, format="before {message}")
    dp.setup_logging()
    loguru.logger.add(sys.stdout, format="after {message}", level="DEBUG")
    loguru.logger.add(folder / f"loguru{_rank()}", format="{message}", level="INFO")
    loguru.logger.debug("a debug")
    loguru.logger.success("a success")
    loguru.logger.error("an error")


def test_loguru_follows_the_levels(tmp_path: Path) -> None:
    lines = [f"{when} {text}" for when in ("before", "after") for text in ("a success", "an error")]
    others = [f"[rank 1] {when} an error" for when in ("before", "after")]
    assert _lines(tmp_path, functools.partial(_with_loguru, tmp_path), ranks=2) == sorted(lines + others)
    for rank in range(2):
        assert (tmp_path / f"loguru{rank}").read_text() == "a success\nan error\n"


def _with_structlog(folder: Path) -> None:
    dp.setup_logging()
    structlog.configure([structlog.processors.add_log_level, structlog.processors.JSONRenderer()])
    with open(folder / f"structlog{_rank()}", "w") as file:
        for logger in (structlog.get_logger(), structlog.wrap_logger(structlog.WriteLogger(file))):
            for level in ("debug", "info", "warning"):
                getattr(logger, level)(f"a {level}", step=3)


def test_structlog_follows_the_levels(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in _lines(tmp_path, functools.partial(_with_structlog, tmp_path), ranks=2)]
    found = sorted((line.get("rank"), line["level"], line["event"], line["step"]) for line in lines if "rank" in line)
    assert found == [(1, "warning", "a warning", 3)]
    assert sorted(line["event"] for line in lines if "rank" not in line) == ["a info", "a warning"]
    for rank in range(2):
        assert len((tmp_path / f"structlog{rank}").read_text().splitlines()) == 3


def _prints(folder: Path) -> None:
    dp.setup_logging(prints="first")
    print(f"out {_rank()}")
    print(f"err {_rank()}", file=sys.stderr)
    with open(folder / f"printed{_rank()}", "w") as file:
        print("to a file", file=file)
    with contextlib.redirect_stdout(io.StringIO()) as kept:
        print("kept")
    assert kept.getvalue() == "kept\n"
    dp.setup_logging()
    print(f"again {_rank()}")


def test_only_rank_0_prints_if_asked(tmp_path: Path) -> None:
    assert _lines(tmp_path, functools.partial(_prints, tmp_path), ranks=2) == ["again 0", "again 1", "err 0", "out 0"]
    assert all((tmp_path / f"printed{rank}").read_text() == "to a file\n" for rank in range(2))
    with pytest.raises(ValueError, match="prints='none': give"):
        dp.setup_logging(prints="none")


# The next tests run in this process, where handlers exist already, as in a notebook.


@pytest.fixture
def _logging() -> Iterator[None]:
    """Restore what `setup_logging` changes on rank 0."""
    root = logging.getLogger()
    loggers = [root, *(logger for logger in root.manager.loggerDict.values() if isinstance(logger, logging.Logger))]
    before = {
        logger: (logger.level, [(handler, handler.formatter, list(handler.filters)) for handler in logger.handlers])
        for logger in loggers
    }
    showwarning = warnings.showwarning
    yield
    restore_method(logging.Logger, "callHandlers")
    restore_method(importlib.import_module("loguru._simple_sinks").StreamSink, "write")
    restore_method(structlog.BoundLoggerBase, "_proxy_to_logger")
    logging.captureWarnings(False)
    warnings.showwarning = showwarning
    for logger, (level, handlers) in before.items():
        logger.setLevel(level)
        logger.handlers = [handler for handler, _, _ in handlers]
        for handler, formatter, filters in handlers:
            handler.setFormatter(formatter)
            handler.filters = filters


@pytest.mark.usefixtures("_logging")
def test_under_pytest(caplog: pytest.LogCaptureFixture) -> None:
    handlers = list(logging.getLogger().handlers)
    assert handlers, "pytest has its own"
    for _ in range(2):
        dp.setup_logging()
        assert logging.getLogger().handlers == handlers
        for handler in handlers:  # one of them writes a log file
            assert len(handler.filters) == (0 if isinstance(handler, logging.FileHandler) else 1)
    log.debug("a debug line")
    log.info("an info line")
    assert [record.message for record in caplog.records] == ["an info line"]


@pytest.mark.usefixtures("_logging")
def test_the_users_filters_stay() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(lambda record: "secret" not in record.getMessage())
    logging.getLogger().addHandler(handler)
    dp.setup_logging()
    log.info("a secret")
    log.info("an info")
    assert stream.getvalue() == "an info\n"


@pytest.mark.usefixtures("_logging")
def test_standard_error_may_be_replaced_later(capsys: pytest.CaptureFixture[str]) -> None:
    """A live display or a notebook may replace sys.stderr."""
    logging.getLogger().handlers = []
    dp.setup_logging()
    with contextlib.redirect_stderr(io.StringIO()) as other:
        log.info("an info")
    assert other.getvalue() == "INFO app.training: an info\n"
    log.info("another")
    assert capsys.readouterr().err == "INFO app.training: another\n"


def test_a_script_without_a_launcher() -> None:
    """A user's script without a handler and without a launcher logs to standard error."""
    script = (
        "import logging, warnings, ddparity as dp; dp.setup_logging(); logging.info('hello'); warnings.warn('look')"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert ended.stderr.splitlines()[0] == "INFO root: hello"
    assert "WARNING py.warnings: <string>:1: UserWarning: look" in ended.stderr
