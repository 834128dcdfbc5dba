"""The command `ddparity`, with its subcommands run, doctor, train, predict, verify, bench and audit."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import typer
import typer.core

from . import __version__
from .auditing.page import write_page
from .auditing.report import github_lines, show_catalogue, write_json
from .auditing.report import show as show_audit
from .auditing.run import STEPS, inspect_script
from .errors import RankFailure
from .launcher import find_submission, parse, run_command, run_launch, submit_job
from .launcher.doctor import doctor as examine_machine
from .parity import plot, show
from .parity.verify import compare_runs
from .runtime.environment import find_placement
from .scaling.bench import bench as bench_task
from .scaling.links import read_link
from .scaling.picture import write_picture
from .scaling.report import show as show_bench
from .task.curves import check_picture, pyplot_of_matplotlib
from .task.record import need_tensorboard
from .task.task import Task, check_task, load_task, source_digest
from .task.train import CheckpointOptions, InvalidInput, predict_task
from .task.train import train as train_task

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

_STRICT_AND_SYNCHRONISED = (
    "--reduction strict --sync-batchnorm: synchronised statistics depend on the number of processes, but strict "
    "results do not: leave one of the two out"
)
TaskName = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="`file.py:name` or `package.module:name`. You may leave the name out if there is only one Task.",
    ),
]
Nproc = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        "-n",
        metavar="N",
        help="Processes on this machine. Default: one for each GPU, or one without GPUs.",
        show_default=False,
    ),
]


class _UnparsedCommand(typer.core.TyperCommand):
    """A command that gets all of its arguments as they were typed, `--help` too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


def _show_version(wanted: bool) -> None:
    """Print the version and end the command."""
    if wanted:
        print(f"ddparity {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train on one process or on a thousand, and get the same model."""


@app.command(cls=_UnparsedCommand)
def run(context: typer.Context) -> None:
    """Run a script on N processes, on one machine or several, with torch's elastic agent."""
    try:
        job = find_submission(context.args)
        if job is not None:
            raise SystemExit(submit_job(job))
        launch = parse(context.args)
    except ValueError as error:
        _refuse(str(error))
    raise _LauncherExit(run_launch(launch))


@app.command()
def doctor(
    rendezvous: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the machines of a job meet. Shows this machine's route to it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what a job finds on this machine, and why, and test a process group of two processes."""
    try:
        code = examine_machine(rendezvous)
    except ValueError as error:
        _refuse(f"--rendezvous: {error}")
    raise SystemExit(code)


@app.command()
def train(
    task: TaskName,
    nproc: Nproc = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The checkpoint file. Default: runs/NAME/checkpoint.safetensors.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Data-loader workers for each process.")] = 0,
    sync_batchnorm: Annotated[
        bool, typer.Option("--sync-batchnorm", help="Take batch-norm statistics over all processes.")
    ] = False,
    reduction: Annotated[
        Literal["fast", "strict"],
        typer.Option(help="`strict` gives the same bits on any number of processes."),
    ] = "fast",
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Threads for each process. The bits of the result depend on this number. Default: 1 with "
            "`--reduction strict`, else all cores, shared between the processes.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint. Without a checkpoint, train from the start.")
    ] = False,
    save_every: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Also write the checkpoint every K steps.", show_default=False),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Keep the last N checkpoints, as FILE, FILE.1, …", show_default=False),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw the losses and metrics at the end.", show_default=False),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write event files for TensorBoard, beside the checkpoint.")
    ] = False,
) -> None:
    """Train a TASK on one process or several, and write checkpoints.

    Each epoch ends with the exact metric of the held-out set and a checkpoint. The training ends with a table. Beside
    the checkpoint, metrics.jsonl has the loss of each step and the metrics.
    """
    if sync_batchnorm and reduction == "strict":
        _refuse(_STRICT_AND_SYNCHRONISED)
    try:
        if picture is not None:
            check_picture(picture)
        if tensorboard:
            need_tensorboard()
    except (ValueError, ImportError) as error:
        _refuse(str(error))
    loaded, count = _load(task, nproc)
    target = checkpoint or Path("runs") / _title(task) / "checkpoint.safetensors"
    if count > 1:
        options = ["--checkpoint", str(target), "--workers", str(workers), "--reduction", reduction]
        options += ["--sync-batchnorm"] * sync_batchnorm
        options += ["--threads", str(threads)] if threads is not None else []
        options += ["--resume"] * resume
        options += ["--save-every", str(save_every)] if save_every is not None else []
        options += ["--keep", str(keep)] if keep is not None else []
        options += ["--plot", str(picture)] if picture is not None else []
        options += ["--tensorboard"] * tensorboard
        raise _LauncherExit(run_command(["-m", "ddparity", "train", task, *options], count))
    saving = CheckpointOptions(save_every, keep, resume)
    title = _title(task)
    _in_this_process(
        lambda: train_task(
            loaded, target, workers, title, sync_batchnorm, reduction, threads, saving, tensorboard, picture
        )
    )


@app.command()
def predict(
    task: TaskName,
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="A checkpoint that `ddparity train` wrote.")],
    nproc: Nproc = None,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write the outputs to this directory, as a Parquet data set. To complete an interrupted prediction, "
            "give the same command again.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        bool,
        typer.Option("--metric", help="Show the TASK's metric with `--to`, too. Without `--to` it is always shown."),
    ] = False,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Data-loader workers for each process.")] = 0,
) -> None:
    """Predict the held-out set of a TASK: each sample once, in the order of the data set."""
    loaded, count = _load(task, nproc)
    if not checkpoint.is_file():
        _refuse(f"there is no checkpoint at {checkpoint}: train one with `ddparity train {task}`")
    if metric and loaded.metric is None and (to is not None or loaded.sums is None):
        what = "metric of outputs" if loaded.sums is not None else "metric"
        _refuse(f"--metric: {task} has no {what}: give the Task one, or leave --metric out")
    if count > 1:
        options = [*(["--to", str(to)] if to is not None else []), *["--metric"] * metric, "--workers", str(workers)]
        command = ["-m", "ddparity", "predict", task, "--checkpoint", str(checkpoint), *options]
        raise _LauncherExit(run_command(command, count))
    _in_this_process(lambda: predict_task(loaded, checkpoint, to, metric, workers, source_digest(task)))


@app.command()
def verify(
    task: TaskName,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc", "-n", metavar="N", help="Compare one process with N processes. Default: 2.", show_default=False
        ),
    ] = None,
    world_sizes: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Compare one process with each of these numbers.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Optimizer steps of each run.")] = 20,
    reduction: Annotated[
        Literal["fast", "strict"],
        typer.Option(
            help="`strict`: every bit must be equal. `fast`: differences that measured rounding explains are tolerated."
        ),
    ] = "fast",
    sync_batchnorm: Annotated[
        bool, typer.Option("--sync-batchnorm", help="Take batch-norm statistics over all processes.")
    ] = False,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Data-loader workers for each process.")] = 0,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="Threads for each process.")] = 1,
    permutations: Annotated[
        int, typer.Option(metavar="N", min=2, help="How many runs measure the noise of rounding in `fast` mode.")
    ] = 4,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw the differences and the noise, and write the plot to FILE.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Prove that a TASK trains on several processes as on one: run its steps on each number of processes, and compare.

    `file.py:name` may also be a function that trains and returns its model: the models are compared. It gets `steps`
    and `reduction` if it has parameters of these names.

    Exit code 0: parity. 1: the runs diverge. 2: a wrong argument. 3: a run failed.
    """
    if sync_batchnorm and reduction == "strict":
        _refuse(_STRICT_AND_SYNCHRONISED)
    try:
        sizes = _world_sizes(nproc, world_sizes)
        if picture is not None:
            pyplot_of_matplotlib()
        with _log_to_stderr(), redirect_stdout(sys.stderr):  # a Task's file may print when it is imported
            found = compare_runs(
                task,
                sizes,
                steps,
                reduction=reduction,
                sync_batchnorm=sync_batchnorm,
                num_workers=workers,
                threads=threads,
                permutations=permutations,
            )
    except (ValueError, TypeError, ImportError) as error:
        _refuse(str(error))
    except RankFailure as error:
        print("\n".join([f"ddparity: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        raise SystemExit(3) from None
    except KeyboardInterrupt:
        print("ddparity: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        show(found, _title(task))
    if picture is not None:
        try:
            picture.parent.mkdir(parents=True, exist_ok=True)
            plot(found, picture, _title(task))
        except (OSError, ValueError) as error:  # an unwritable folder, or an unknown image format
            _refuse(f"--plot {picture}: {error}")
    raise SystemExit(0 if found.parity else 1)


@app.command()
def bench(
    task: TaskName,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            "-n",
            metavar="N",
            help="Processes on this machine, at least 2. Default: one for each GPU, or 2.",
            show_default=False,
        ),
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RATE,LATENCY",
            help="Predict for ranks that such a link connects, as in 25Gbit,20us: what one rank can send, and the "
            "latency of one message. May be given several times.",
            show_default=False,
        ),
    ] = None,
    each: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="Micro-batches of each rank in the predictions whose global batch grows. Default: as many as here.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Data-loader workers for each process.")] = 0,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Threads for each process. Default: as `train`.", show_default=False),
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", min=1.0, help="How long to measure, about, after the first steps.")
    ] = 60.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.svg", help="Draw the stages and the speed-ups.", show_default=False),
    ] = None,
) -> None:
    """Measure where a training step of a TASK spends its time, and predict it for more ranks and other links.

    It takes about a minute and a half. Exit code 2: a wrong argument.
    """
    try:
        links = [read_link(one) for one in link or ()]
    except ValueError as error:
        _refuse(str(error))
    for path in (json_file, picture):
        if path is not None and not path.absolute().parent.is_dir():
            _refuse(f"{path}: there is no folder {path.absolute().parent}")
    if picture is not None and picture.suffix != ".svg":
        _refuse(f"--plot {picture}: the picture is an SVG, so give a name that ends in .svg")
    loaded, count = _load(task, nproc, least=2)
    if count > 1:
        options = ["--workers", str(workers), "--seconds", str(seconds)]
        options += [word for one in link or () for word in ("--link", one)]
        for name, value in (("each", each), ("threads", threads), ("json", json_file), ("plot", picture)):
            options += [f"--{name}", str(value)] if value is not None else []
        raise _LauncherExit(run_command(["-m", "ddparity", "bench", task, *options], count))

    def work() -> None:
        report = bench_task(loaded, _title(task), links, workers, threads, seconds, each)
        if report is None:
            return
        show_bench(report)
        if json_file is not None:
            json_file.write_text(json.dumps(report.to_json()) + "\n")
        if picture is not None:
            write_picture(report, picture)

    _in_this_process(work)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def audit(
    script: Annotated[
        Path | None, typer.Argument(metavar="SCRIPT", help="A training script.", show_default=False)
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGUMENTS", help="The script's arguments.", show_default=False)
    ] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", "-n", metavar="N", help="Processes. Default: 2.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="S",
            help=f"End the training loop of an epoch after S optimizer steps. Default: {STEPS}.",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the findings as JSON.", show_default=False)
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with pictures.", show_default=False)
    ] = None,
    select: Annotated[
        str, typer.Option(metavar="CODES", help="Show only codes that begin so, as in DDP1,DDP301.", show_default=False)
    ] = "",
    ignore: Annotated[
        str, typer.Option(metavar="CODES", help="Leave codes out that begin so.", show_default=False)
    ] = "",
    github: Annotated[bool, typer.Option("--github", help="Print annotations for GitHub's workflows.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Show the catalogue of codes and exit.")] = False,
) -> None:
    """Run anybody's training script on N processes, and show what is wrong with its data parallelism.

    Exit code 0: no error was proved. 1: at least one. 2: a wrong argument. 3: the script failed.
    """
    if listed:
        show_catalogue()
        return
    if script is None:
        _refuse("audit: name a script, or give --list")
    for path in (json_file, html_file):
        if path is not None and not path.absolute().parent.is_dir():
            _refuse(f"{path}: there is no folder {path.absolute().parent}")
    try:
        report = inspect_script(
            script, arguments or [], nproc=nproc, steps=steps, select=_listed(select), ignore=_listed(ignore)
        )
    except ValueError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        print("ddparity: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    sys.stdout.flush()
    if github:
        print(github_lines(report))
    else:
        show_audit(report)
    try:
        if json_file is not None:
            write_json(report, json_file)
        if html_file is not None:
            write_page(report, html_file)
    except OSError as error:
        _refuse(f"{error.filename}: {error.strerror}")
    raise _LauncherExit(report.exit_code)


def _listed(text: str) -> list[str]:
    return [one for one in text.split(",") if one.strip()]


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Write the log of the library, from INFO up, to standard error."""
    logger, handler = logging.getLogger("ddparity"), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _world_sizes(nproc: int | None, listed: str | None) -> list[int]:
    """Return the numbers of processes that --nproc or --world-sizes gives."""
    if nproc is not None and listed is not None:
        raise ValueError(f"--nproc {nproc} --world-sizes {listed}: give one of the two")
    if listed is None:
        return [1, _count(nproc if nproc is not None else 2)]
    try:
        sizes = [int(size) for size in listed.split(",")]
    except ValueError:
        raise ValueError(f"--world-sizes {listed}: give numbers of processes, as in 1,2,4") from None
    if min(sizes) < 1:
        raise ValueError(f"--world-sizes {listed}: a number of processes must be at least 1")
    return sizes


def _load(spec: str, nproc: int | None, least: int = 1) -> tuple[Task, int]:
    """Return the Task, and how many processes to run it on, `least` or more.

    The number is 1, for this process, if a launcher started it. A wrong Task or number ends the command.
    """
    try:
        task, count, placement = load_task(spec), _count(nproc, least), find_placement()
        if placement is not None and nproc is not None:
            raise ValueError(
                f"--nproc {nproc}: {placement.engine} started {placement.world_size} processes already: leave --nproc "
                f"out"
            )
        check_task(task, count if placement is None else placement.world_size)
    except (ValueError, TypeError) as error:
        _refuse(str(error))
    return task, count if placement is None else 1


def _count(nproc: int | None, least: int = 1) -> int:
    """Return how many processes to start on this machine."""
    if nproc is None:
        return max(least, torch.cuda.device_count())
    if nproc < least:
        raise ValueError(f"--nproc {nproc}: start at least {least} process{'es' * (least > 1)}")
    return nproc


def _in_this_process(work: Callable[[], object]) -> None:
    """Call `work`, and turn the user's mistakes and Ctrl+C into one line and an exit code."""
    try:
        work()
    except InvalidInput as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        if find_placement() is not None:  # the launcher reports it, once for all ranks
            raise
        print("ddparity: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _title(spec: str) -> str:
    """Return the name of a Task, or else that of its file or module."""
    source, _, name = spec.partition(":")
    return name or Path(source).stem.rpartition(".")[2]


def _refuse(message: str) -> NoReturn:
    """Print an error of the user's in one line, and exit with code 2."""
    print(f"ddparity: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class _LauncherExit(SystemExit):
    """The exit of a launcher, after all processes that it started have ended."""


def main() -> None:
    try:
        app()
    except _LauncherExit as end:
        # Python needs half a second to take torch's modules apart, so exit without that.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # Python sets None for one that is closed, as in `>&-`
                stream.flush()
        os._exit(int(end.code or 0))
