"""Load mutated checkpoints: python -m tests.checkpoint.fuzz COUNT FIRST

Each file is an honest one with random damage: bits, bytes and blocks of the whole file, or values of its JSON, whose
checksum is then made right, as an attacker would. A load must end with an error that names the file, or with states.
Nothing may be imported or run. A load may take memory of at most twice the file's size and 1 MiB: of the first tenth of
the files as Python counts it, and of the others together as the kernel does.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import faulthandler
import hashlib
import json
import random
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import ddparity as dp

SLACK = 1 << 20  # bytes of a load of a file of any size
PATIENCE_S = 5.0
OLD = Path(__file__).parent / "data" / "format_2.safetensors"
HOSTILE: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 2**64, 1e308, "", "os:system", "this:s", "\ud800", [], [[]], {}, [None] * 3,
    {"kind": "x", "type": "os:system", "keys": ["command"], "items": ["true"]},
    {"kind": "record", "type": "os:system", "keys": ["command"], "items": ["true"]},
    {"kind": "fields", "type": "this:s", "keys": [], "items": []},
    {"kind": "tensor", "name": "x", "dtype": "float32", "shape": [2**62, 0, 2**62]},
    {"kind": "tensor", "name": "held.a.0", "dtype": "float32", "shape": [-1]},
    {"kind": "array", "name": "held.a.0", "dtype": "bfloat16", "shape": [2**63]},
    {"kind": "list", "items": []}, {"kind": ["list"], "items": []}, {"kind": "float", "text": "1e999"},
    {"kind": "complex", "parts": [1, 2]}, {"kind": "dict", "keys": [[]], "items": [1]},
    {"kind": "dict", "keys": ["a"], "items": [1], "type": "defaultdict", "factory": "eval"},
    {"kind": "tuple", "items": [-1], "type": "Size"}, {"kind": "enum", "type": "Colour", "member": "__class__"},
]  # fmt: skip
TEXTS = [b"NaN", b"Infinity", b"1e999", b'{"a":1,"a":2}', b"[" * 3000, b'"\\ud800"', b"9" * 5000, b"-", b'"']


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: int
    y: Any


Pair = collections.namedtuple("Pair", "one two")


class Held:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def honest(folder: Path) -> list[bytes]:
    """Return the content of files to start from."""
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    values = {
        "a": [torch.arange(3.0), np.arange(2), np.float64(2), 1 + 2j, float("nan"), torch.Size([1])],
        "b": collections.Counter("aab"), "c": collections.defaultdict(list, {"x": (1, None)}), "d": Colour.RED,
        "e": Point(1, torch.ones(1)), "f": Pair(1, "two"), "g": collections.OrderedDict(a=nn.Parameter(torch.ones(2))),
    }  # fmt: skip
    dp.save_checkpoint(folder / "1", model=model, optimizer=optimizer)
    dp.save_checkpoint(folder / "2", held=Held(values), epoch=3, meta={"best": 0.5})
    dp.save_checkpoint(folder / "3", held=Held({"nested": [{"a": [i, str(i)]} for i in range(20)]}))
    return [(folder / name).read_bytes() for name in "123"] + [OLD.read_bytes()]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return a file with random damage."""
    way = rng.randrange(8)
    data = bytearray(content)
    header = 8 + int.from_bytes(data[:8], "little")
    if way == 0:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == 1:
        del data[rng.randrange(len(data)) :]
    elif way == 2:
        where, length = rng.randrange(header), rng.choice((1, 4, 64))
        data[where : where + rng.choice((0, length))] = rng.randbytes(length)
    elif way == 3:
        data[:8] = rng.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1, header - 9, header)).to_bytes(8, "little")
    elif way == 4:
        where = rng.randrange(8, header)
        data[where:where] = rng.choice(TEXTS)
        data[:8] = (int.from_bytes(data[:8], "little") + len(data) - len(content)).to_bytes(8, "little")
    else:
        return rebuilt(content, rng)
    return bytes(data)


def rebuilt(content: bytes, rng: random.Random) -> bytes:
    """Return a file whose header or description has other values, with the right checksum of it."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    states = json.loads(header["__metadata__"]["states"])
    target = header if rng.random() < 0.2 else states
    for _ in range(rng.choice((1, 1, 1, 3))):
        _mutate(target, rng)
    text = json.dumps(states)
    if rng.random() < 0.2:
        where = rng.randrange(len(text))
        text = text[:where] + rng.choice(TEXTS).decode() + text[where + rng.choice((0, 1)) :]
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and target is states:
        metadata |= {"states": text, "sha256": hashlib.sha256(text.encode(errors="replace")).hexdigest()}
    out = json.dumps(header).encode()
    if rng.random() < 0.1:
        where = rng.randrange(len(out))
        out = out[:where] + rng.choice(TEXTS) + out[where + 1 :]
    return len(out).to_bytes(8, "little") + out + content[8 + length :]


def _mutate(value: Any, rng: random.Random) -> None:
    """Change one value somewhere in nested dicts and lists: replace it, delete it, double it, or exchange it."""
    places = []
    waiting = [value]
    while waiting:
        inside = waiting.pop()
        for key in inside if isinstance(inside, dict) else range(len(inside)):
            places.append((inside, key))
            if isinstance(inside[key], (dict, list)):
                waiting.append(inside[key])
    if not places:
        return
    container, key = rng.choice(places)
    other, there = rng.choice(places)
    way = rng.randrange(5)
    if way == 0:
        del container[key]
    elif way == 1 and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif way == 2:
        container[key] = copy.deepcopy(other[there])
    elif way == 3 and type(container[key]) is int:
        container[key] += rng.choice((-1, 1, 2**32, -(2**40)))
    else:
        container[key] = copy.deepcopy(rng.choice(HOSTILE))


def load(path: Path, base: int, into_modules: bool) -> str:
    """Load a file that was made from an honest one, and return how it ended."""
    given: dict[str, Any] = {"held": Held({"e": Point(0, 0), "f": Pair(0, 0), "d": Colour.RED})}
    if base in (0, 3):
        given = {"model": Held({}), "optimizer": Held({})}
        if into_modules:  # torch takes a hundred times as long
            model = nn.Linear(2, 3)
            given = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    said = str(path)
    try:
        dp.load_checkpoint(path, **given)
    except ValueError as error:
        said = str(error)
    else:
        return "loaded"
    assert str(path) in said, said
    return "refused"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(count: int, first: int, folder: Path, tell: Callable[[str], None] = print) -> collections.Counter[str]:
    """Load `count` mutated files, and return how many were refused and loaded."""
    faulthandler.enable()
    files, ended, events = honest(folder), collections.Counter[str](), list[str]()
    watching = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and (event in ("import", "exec", "compile", "pickle.find_class") or event.startswith("os.s")):
            events.append(f"{event} {arguments[:1]}")

    sys.addaudithook(hook)
    path = folder / "mutated"
    for base, content in enumerate(files):  # what torch imports at its first loads
        path.write_bytes(content)
        assert load(path, base, False) == "loaded"
        load(path, base, True)
    worst, slowest, start, resident = 0, 0.0, time.monotonic(), 0
    counted = first + -(-count // 10)  # the first file that Python does not count
    tracemalloc.start()  # once: it keeps 9 kB each time that it is stopped
    for number in range(first, first + count):
        rng = random.Random(number)
        base = rng.randrange(len(files))
        content = damaged(files[base], rng)
        path.write_bytes(content)
        if number == counted:
            tracemalloc.stop()
            resident = _peak_bytes()
        elif number < counted:
            tracemalloc.clear_traces()
        began, watching = time.monotonic(), True
        try:
            ended[load(path, base, number % 41 == 0)] += 1
        except BaseException:
            tell(f"the file of seed {number} failed")
            raise
        watching = False
        slowest = max(slowest, time.monotonic() - began)
        worst = max(worst, tracemalloc.get_traced_memory()[1] - 2 * len(content))  # 0 where it is not counted
        assert not events, (number, events)
        assert worst < SLACK, (number, worst, len(content))
        assert slowest < PATIENCE_S, (number, slowest)
        if count >= 20 and (number - first + 1) % (count // 20) == 0:
            tell(f"{number - first + 1} files, {dict(ended)}, {time.monotonic() - start:.0f} s")
    tracemalloc.stop()
    grown = _peak_bytes() - resident if resident else 0
    assert grown < 64 * SLACK, grown  # all files together, so that a leak shows, too
    tell(
        f"{count} files: {dict(ended)}; 0 crashes, 0 imports; at most twice the file's size and {max(worst, 0):,} "
        f"bytes of memory, {grown / SLACK:.1f} MiB for those not counted, at most {slowest:.2f} s a file, "
        f"{time.monotonic() - start:.0f} s in all"
    )
    return ended


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        run(int(sys.argv[1]), int(sys.argv[2]), Path(temporary))
