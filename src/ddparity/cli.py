"""The command line."""

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

from .errors import RankFailure
from .launcher import find_submission, parse, run_command, run_launch, submit_job
from .launcher.doctor import doctor as examine_machine
from .parity import plot, show
from .parity.report import pyplot_of_matplotlib
from .parity.verify import compare_runs
from .runtime.environment import find_placement
from .task.task import Task, check_task, load_task
from .task.train import Refused, Saves, predict_task
from .task.train import train as train_task

app = typer.Typer(
    help="Train on one process or on a thousand, and get the same model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

_STRICT_SYNCHRONISED = (
    "--reduction strict --sync-batchnorm: synchronised statistics depend on the number of processes: leave one of the "
    "two out"
)
TaskName = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="`file.py:name` or `package.module:name`; the name may be left out where there is one Task.",
    ),
]
Nproc = Annotated[
    int | None,
    typer.Option(
        "--nproc", "-n", metavar="N", help="Processes on this machine. Default: one a GPU, or one.", show_default=False
    ),
]


class _Raw(typer.core.TyperCommand):
    """A command that reads its arguments itself, each as it was typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


@app.command(cls=_Raw)
def run(context: typer.Context) -> None:
    """Run any script on N processes, of one machine or several, on torch's elastic agent."""
    try:
        job = find_submission(context.args)
        if job is not None:
            raise SystemExit(submit_job(job))
        wanted = parse(context.args)
    except ValueError as error:
        _refuse(str(error))
    raise _Ended(run_launch(wanted))


@app.command()
def doctor(
    rendezvous: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where machines of a job would meet.", show_default=False),
    ] = None,
) -> None:
    """Show what a job would find on this machine and why, and test a group of two processes."""
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
            help="Where the checkpoint goes. Default: runs/NAME/checkpoint.safetensors.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Data-loader workers of each process.")] = 0,
    sync_batchnorm: Annotated[
        bool, typer.Option("--sync-batchnorm", help="Batch-norm statistics over all processes.")
    ] = False,
    reduction: Annotated[
        Literal["fast", "strict"],
        typer.Option(help="`strict`: the same bits on any number of processes."),
    ] = "fast",
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Threads of each process, which the bits depend on. Default: 1 with `--reduction strict`, else the "
            "cores shared out.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint, or from the start where there is none yet.")
    ] = False,
    save_every: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Write the checkpoint every K steps, too.", show_default=False),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Keep the N last checkpoints, as FILE, FILE.1, …", show_default=False),
    ] = None,
) -> None:
    """Train a TASK: one progress display, exact accuracy after each epoch, a checkpoint and a table at the end."""
    if sync_batchnorm and reduction == "strict":
        _refuse(_STRICT_SYNCHRONISED)
    loaded, count = _checked(task, nproc)
    target = checkpoint or Path("runs") / _title(task) / "checkpoint.safetensors"
    if count > 1:
        options = ["--checkpoint", str(target), "--workers", str(workers), "--reduction", reduction]
        options += ["--sync-batchnorm"] * sync_batchnorm
        options += ["--threads", str(threads)] if threads is not None else []
        options += ["--resume"] * resume
        options += ["--save-every", str(save_every)] if save_every is not None else []
        options += ["--keep", str(keep)] if keep is not None else []
        _launch(["-m", "ddparity", "train", task, *options], count)
    saving = Saves(save_every, keep, resume)
    _in_this_process(
        lambda: train_task(loaded, target, workers, _title(task), sync_batchnorm, reduction, threads, saving)
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
            help="Write the outputs there as a Parquet data set; the same command completes one that was interrupted.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        bool, typer.Option("--metric", help="Show the TASK's metric, also with `--to`. Without `--to` it always is.")
    ] = False,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Data-loader workers of each process.")] = 0,
) -> None:
    """Predict the held-out set of a TASK: each sample once, in order."""
    loaded, count = _checked(task, nproc)
    if not checkpoint.is_file():
        _refuse(f"there is no checkpoint at {checkpoint}: train one with `ddparity train {task}`")
    if metric and loaded.metric is None and (to is not None or loaded.sums is None):
        _refuse(f"--metric: {task} has no metric{' of outputs' if loaded.sums is not None else ''}")
    if count > 1:
        options = [*(["--to", str(to)] if to is not None else []), *["--metric"] * metric, "--workers", str(workers)]
        _launch(["-m", "ddparity", "predict", task, "--checkpoint", str(checkpoint), *options], count)
    _in_this_process(lambda: predict_task(loaded, checkpoint, to, metric, workers))


@app.command()
def verify(
    task: TaskName,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", "-n", metavar="N", help="Compare one process with N. Default: 2.", show_default=False),
    ] = None,
    world_sizes: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Compare one process with each of these numbers.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Optimizer steps of each run.")] = 20,
    reduction: Annotated[
        Literal["fast", "strict"],
        typer.Option(help="`strict`: every bit must be equal. `fast`: rounding, as measured, is tolerated."),
    ] = "fast",
    sync_batchnorm: Annotated[
        bool, typer.Option("--sync-batchnorm", help="Batch-norm statistics over all processes.")
    ] = False,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Data-loader workers of each process.")] = 0,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="Threads of each process.")] = 1,
    permutations: Annotated[
        int, typer.Option(metavar="N", min=2, help="Runs that measure the noise of rounding, in `fast`.")
    ] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else.")] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw the divergence against the noise.", show_default=False),
    ] = None,
) -> None:
    """Prove that a TASK trains as one process on several: run its steps on each, and compare.

    Exit code 0: parity. 1: the runs part. 2: a wrong argument. 3: a run failed.
    """
    if sync_batchnorm and reduction == "strict":
        _refuse(_STRICT_SYNCHRONISED)
    try:
        sizes = _world_sizes(nproc, world_sizes)
        if picture is not None:
            pyplot_of_matplotlib()
        with _told_on_stderr(), redirect_stdout(sys.stderr):  # what a Task's file prints when it is imported
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
        except (OSError, ValueError) as error:  # no such folder, no such kind of picture
            _refuse(f"--plot {picture}: {error}")
    raise SystemExit(0 if found.parity else 1)


@contextmanager
def _told_on_stderr() -> Iterator[None]:
    """Write what the library reports meanwhile to standard error."""
    logger, speaker = logging.getLogger("ddparity"), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(speaker)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(speaker)


def _world_sizes(nproc: int | None, listed: str | None) -> list[int]:
    if nproc is not None and listed is not None:
        raise ValueError(f"--nproc {nproc} --world-sizes {listed}: give one of the two")
    if listed is None:
        return [1, _count(nproc if nproc is not None else 2)]
    try:
        sizes = [int(size) for size in listed.split(",")]
    except ValueError:
        raise ValueError(f"--world-sizes {listed}: give numbers of processes, as in 1,2,4") from None
    if min(sizes) < 1:
        raise ValueError(f"--world-sizes {listed}: numbers of processes are at least 1")
    return sizes


def _checked(spec: str, nproc: int | None) -> tuple[Task, int]:
    """The Task, and how many processes to start: one, this one, inside a job that a launcher started."""
    try:
        task, count, placement = load_task(spec), _count(nproc), find_placement()
        if placement is not None and nproc is not None:
            raise ValueError(f"--nproc {nproc}: {placement.engine} started {placement.world_size} processes already")
        check_task(task, count if placement is None else placement.world_size)
    except (ValueError, TypeError) as error:
        _refuse(str(error))
    return task, count if placement is None else 1


def _count(nproc: int | None) -> int:
    if nproc is None:
        return max(1, torch.cuda.device_count())
    if nproc < 1:
        raise ValueError(f"--nproc {nproc}: start at least 1 process")
    return nproc


def _launch(arguments: list[str], nproc: int | None) -> NoReturn:
    try:
        count = _count(nproc)
        placement = find_placement()
    except ValueError as error:
        _refuse(str(error))
    if placement is not None:
        _refuse(
            f"{placement.engine} started this process already, as rank {placement.rank} of {placement.world_size}: "
            f"run the script itself"
        )
    raise _Ended(run_command(arguments, count))


def _in_this_process(work: Callable[[], object]) -> None:
    try:
        work()
    except Refused as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        if find_placement() is not None:  # the launcher says it, once for all ranks
            raise
        print("ddparity: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _title(spec: str) -> str:
    place, _, name = spec.partition(":")
    return name or Path(place).stem.rpartition(".")[2]


def _refuse(message: str) -> NoReturn:
    print(f"ddparity: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class _Ended(SystemExit):
    """All that this launcher had started has ended."""


def main() -> None:
    try:
        app()
    except _Ended as ending:
        # At once: taking torch's modules apart takes half a second.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(ending.code or 0))
