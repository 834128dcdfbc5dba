"""Run many random programs in processes that are started once. `python -m tests.gradients.program_pool 20000`."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import pickle
import queue
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from ddparity.comm import allreduce
from tests.gradients.programs import ByHand, Loop, Model, Observed, Program, Ranks, Step, difference, draw, run
from tests.ranks import _context, _main, torchrun_env

HANG_S = 120.0  # without an answer: on a busy machine a process may wait long for a core
GRACE_S = 1.0  # for the other ranks, after one has failed


def failures(programs: Sequence[Program]) -> Iterator[tuple[Program, str | None]]:
    """Yield each program, all of one world size, and what is wrong with it; after an error start processes anew."""
    left = list(programs)
    while left:
        crew = _Crew(left[0].world_size)
        try:
            for program, problem in crew.run(tuple(left)):
                left.pop(0)
                yield program, problem
                if crew.broken:
                    break
        finally:
            crew.end()


class _Crew:
    """The ranks of one world size, and a process that runs each program by hand, and if strict with ddparity, alone."""

    def __init__(self, world_size: int) -> None:
        self._store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        env = torchrun_env(world_size, self._store.port, agent_store=True)
        self._pipes: list[Connection] = []
        self._processes = []
        self.broken = False  # a rank has raised, or does not answer
        for rank in range(world_size + 1):
            in_world = rank < world_size
            ours, theirs = _context.Pipe()
            result, unused = _context.Pipe()
            variables = env(rank) if in_world else {}
            process = _context.Process(target=_main, args=(unused, variables, _serve, (theirs, not in_world), in_world))
            process.start()
            theirs.close()
            unused.close()
            result.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, programs: Sequence[Program]) -> Iterator[tuple[Program, str | None]]:
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps(list(programs)))
        for program in programs:
            answers = self._answers()
            errors = [f"rank {rank}: {one}" for rank, one in enumerate(answers) if isinstance(one, str)]
            problem: str | None
            if errors or None in answers:
                self.broken = True
                for process, one in zip(self._processes, answers, strict=True):
                    if one is None and process.pid is not None:
                        os.kill(process.pid, signal.SIGUSR1)  # its stack goes to stderr
                        time.sleep(0.2)
                silent = [rank for rank, one in enumerate(answers) if one is None]
                problem = "\n".join(errors) + (f"\nno answer from ranks {silent}" if silent else "")
            else:
                *ours, (by_hand, alone) = answers
                problem = difference(program, [one for one, _ in ours], by_hand, alone)
            yield program, None if problem is None else f"{program}\n{problem}"

    def _answers(self) -> list[Any]:
        """The next answer of each process: what it observed, an error as text, or None after a hang."""
        answers: list[Any] = [None] * len(self._pipes)
        waiting = {pipe: number for number, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + HANG_S
        while waiting and (remaining := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), timeout=remaining):
                number = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    answers[number] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    answers[number] = "the process has ended"
                if isinstance(answers[number], str):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def end(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            process.kill()
            process.join()
            pipe.close()


def _serve(pipe: Connection, alone: bool) -> None:
    logging.disable(logging.WARNING)
    faulthandler.register(signal.SIGUSR1)
    allreduce.YIELDS = 0  # more processes than cores: a rank that waits leaves its core at once
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    programs: list[Program] = pickle.loads(pipe.recv_bytes())
    gc.collect()
    gc.freeze()
    for program in programs:
        answer: tuple[Observed, Observed | None] | str
        try:
            if not alone:
                answer = run(program, Ranks(program, rank, world_size)), None
            else:
                strict = program.reduction == "strict"
                answer = run(program, ByHand(program)), run(program, Ranks(program, 0, 1)) if strict else None
        except BaseException:
            answer = traceback.format_exc()
        gc.collect()
        pipe.send_bytes(pickle.dumps(answer))
        if isinstance(answer, str):
            time.sleep(2 * HANG_S)  # until it is killed: its end would be an error on the other ranks
    pipe.recv_bytes()  # until it is killed


def smaller(program: Program) -> Program:
    """Take parts out of a program for as long as it fails."""

    def runs(candidate: Program) -> bool:
        try:
            run(candidate, ByHand(candidate))
        except Exception:
            return False
        return True

    while True:
        candidates = list(filter(runs, _parts_left_out(program)))
        found = next((candidate for candidate, problem in failures(candidates) if problem is not None), None)
        if found is None:
            return program
        program = found


def _parts_left_out(program: Program) -> Iterator[Program]:
    for number in range(len(program.steps)) if program.plan is None else range(len(program.steps) - 1, 0, -1):
        if len(program.steps) > 1:
            yield replace(program, steps=(*program.steps[:number], *program.steps[number + 1 :]))
    for number, step in enumerate(program.steps):
        for other in _smaller_values(step, Step((), stepped=step.stepped)):
            if other.loops:
                yield replace(program, steps=(*program.steps[:number], other, *program.steps[number + 1 :]))
        for position, loop in enumerate(step.loops):
            for less in _smaller_values(loop, Loop(loop.given, loop.loss, loop.sizes)):
                loops = (*step.loops[:position], less, *step.loops[position + 1 :])
                yield replace(
                    program, steps=(*program.steps[:number], replace(step, loops=loops), *program.steps[number + 1 :])
                )
    for number, model in enumerate(program.models):
        for other_model in _smaller_values(model, Model(("linear",))):
            yield replace(program, models=(*program.models[:number], other_model, *program.models[number + 1 :]))
    for other_program in _smaller_values(program, Program(0, 0, "fast", (), ())):
        if other_program.world_size and other_program.models and other_program.steps:
            yield other_program


def _smaller_values(value: Any, usual: Any) -> Iterator[Any]:
    """The value with one field as usual, or with one entry of a field left out."""
    for one in fields(value):
        held, default = getattr(value, one.name), getattr(usual, one.name)
        if held == default or one.name in (
            "sizes",
            "given",
            "stepped",
            "seed",
            "world_size",
            "models",
            "steps",
            "plan",
        ):
            continue
        yield replace(value, **{one.name: default})
        if isinstance(held, tuple):
            for position in range(len(held)):
                yield replace(value, **{one.name: held[:position] + held[position + 1 :]})
        elif isinstance(held, dict):
            for key in held:
                yield replace(value, **{one.name: {k: v for k, v in held.items() if k != key}})


def run_all(programs: Sequence[Program], workers: int = 4) -> Iterator[tuple[Program, str | None]]:
    """Yield each program and what is wrong with it, as they end; the ranks of `workers` world sizes work at a time.

    Ranks mostly wait for each other, so these are more processes than the machine has cores.
    """
    by_size: dict[int, list[Program]] = {}
    for program in programs:
        by_size.setdefault(program.world_size, []).append(program)
    most = min(500, max(50, len(programs) // 8))
    parts = [
        of_one_size[begin : begin + most]
        for _, of_one_size in sorted(by_size.items(), reverse=True)
        for begin in range(0, len(of_one_size), most)
    ]
    ended: queue.SimpleQueue[tuple[Program, str | None] | BaseException] = queue.SimpleQueue()

    def one(part: list[Program]) -> None:
        try:
            for pair in failures(part):
                ended.put(pair)
        except BaseException as error:
            ended.put(error)

    with ThreadPoolExecutor(workers) as threads:
        for part in parts:
            threads.submit(one, part)
        for _ in programs:
            pair = ended.get()
            if isinstance(pair, BaseException):
                threads.shutdown(cancel_futures=True)
                raise pair
            yield pair


def main(count: int, first: int = 0, workers: int = 6) -> int:
    """Run the programs `first` to `first + count`; print progress, and at the end what failed."""
    failed: list[int] = []
    start = time.monotonic()
    programs = [draw(seed) for seed in range(first, first + count)]
    for done, (program, problem) in enumerate(run_all(programs, workers), 1):
        if problem is not None:
            failed.append(program.seed)
            print(f"\n--- failed: {problem}\n", end="", flush=True)
        if done % 250 == 0:
            rate = done / (time.monotonic() - start)
            print(f"{done} of {count} programs, {len(failed)} failed, {rate:.0f} a second\n", end="", flush=True)
    print(f"{count} programs in {time.monotonic() - start:.0f} s, {len(failed)} failed: {sorted(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(*map(int, sys.argv[1:])))
