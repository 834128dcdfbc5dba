"""Test files that an attacker makes: one error that names the file, no import, in bounded memory and time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import resource
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ddparity as dp
from ddparity.checkpoint import format as file_format
from ddparity.checkpoint.sharded import MAIN
from tests.checkpoint import fuzz
from tests.checkpoint.test_checkpoint import Held
from tests.ranks import outcomes


def _file(node: Any, tensors: dict[str, bytes], text: str | None = None, version: int = 3) -> bytes:
    """Return a file with right checksums. `text`: of the description, in place of what belongs to the node."""
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in tensors.items()}
    described = {"nodes": {"model": node}, "versions": {}, "about": {}, "torch": "2.14.0", "sha256": sha256}
    text = text or json.dumps(described)
    digest = hashlib.sha256(text.encode()).hexdigest()
    header: dict[str, Any] = {"__metadata__": {"format": f"ddparity {version}", "states": text, "sha256": digest}}
    start = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [start, start + len(data)]}
        start += len(data)
    return _raw(json.dumps(header), b"".join(tensors.values()))


def _raw(header: str, body: bytes = b"") -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + body


def _entry(first: Any, last: Any, shape: Any = (1,)) -> str:
    return json.dumps({"dtype": "U8", "shape": shape, "data_offsets": [first, last]})


def _names(**entries: str) -> str:
    return "{" + ",".join(f'"{name}":{entry}' for name, entry in entries.items()) + "}"


COMMAND = json.dumps(["touch RAN"]).encode()
TOKENS = "import os\nfrom dataclasses import dataclass\nopen('RAN', 'w')\n@dataclass\nclass T:\n    command: str\n"
TENSOR = {"kind": "tensor", "name": "model.0", "dtype": "float32", "shape": [2]}
SHARD = "shard-0123456789abcdef-0.safetensors"

CRAFTED = {
    # An earlier version took an unknown kind for a dataclass, imported its module and called it.
    **{
        f"kind {kind!r} in format {version}": _file(
            {
                "kind": kind, "type": "tokens:T", "keys": ["command"],
                "items": [{"kind": "plain", "leaf": 0, "dtype": "uint8", "shape": [len(COMMAND)]}],
            },
            {"model.0": COMMAND}, version=version,
        )
        for kind in ("x", "record", "fields", None, [], "enum")
        for version in (2, 3)
    },
    "record": _file({"kind": "record", "type": "tokens:T", "keys": ["command"], "items": ["touch RAN"]}, {}),
    "fields": _file({"kind": "fields", "type": "tokens:T", "keys": ["command"], "items": ["touch RAN"]}, {}),
    "enum": _file({"kind": "enum", "type": "tokens:T", "member": "x"}, {}),
    "factory": _file({"kind": "dict", "type": "defaultdict", "factory": "eval", "keys": [], "items": []}, {}),
    "header of terabytes": (2**43).to_bytes(8, "little") + b"{}",
    "header of 2**64 - 1 bytes": b"\xff" * 8 + b"{}",
    "empty": b"",
    "zeros": bytes(64),
    "sizes of 2**63": _file({**TENSOR, "shape": [2**63]}, {"model.0": bytes(8)}),
    "sizes whose strides overflow": _file({**TENSOR, "shape": [2**62, 0, 2**62]}, {"model.0": b""}),
    "sizes that multiply to 2**64": _file({**TENSOR, "shape": [2**32, 2**32]}, {"model.0": b""}),
    "negative sizes": _file({**TENSOR, "shape": [-1, -2]}, {"model.0": bytes(8)}),
    "true as a size": _file({**TENSOR, "shape": [True, 2]}, {"model.0": bytes(8)}),
    "too many dimensions": _file({**TENSOR, "shape": [2] + [1] * 5000}, {"model.0": bytes(8)}),
    "unknown dtype": _file({**TENSOR, "dtype": "load"}, {"model.0": bytes(8)}),
    "other size": _file({**TENSOR, "shape": [3]}, {"model.0": bytes(8)}),
    "no such tensor": _file(TENSOR, {"other": bytes(8)}),
    "one tensor twice": _file({"kind": "list", "items": [TENSOR] * 1000}, {"model.0": bytes(8)}),
    "keys twice in the description": _file({"kind": "dict", "keys": ["a", "a"], "items": [1, 2]}, {}),
    "100,000 nested nodes": _file(
        None, {}, '{"nodes":{"model":' + '{"kind":"list","items":[' * 100_000 + "]}" * 100_000 + "}}"
    ),
    "100,000 nested lists in the header": _raw("[" * 100_000 + "]" * 100_000),
    "a key twice in the header": _raw(_names(a=_entry(0, 1), b=_entry(0, 1)).replace('"b"', '"a"'), b"x"),
    "NaN": _raw('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"x"),
    "infinite": _raw('{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}', b"x"),
    "NaN in the description": _file(None, {}, '{"nodes":{"model":NaN}}'),
    "overlapping tensors": _raw(_names(a=_entry(0, 2, (2,)), b=_entry(1, 3, (2,))), b"xyz"),
    "a gap": _raw(_names(a=_entry(0, 1), b=_entry(2, 3)), b"xyz"),
    "negative offsets": _raw(_names(a=_entry(-1, 1)), b"x"),
    "offsets behind the end": _raw(_names(a=_entry(0, 2**62)), b"x"),
    "a number of 5000 digits": _raw(_names(a="9" * 5000)),
    "no UTF-8": (4).to_bytes(8, "little") + b"\xff\xfe{}",
    "a lone surrogate": _raw('{"__metadata__":{"format":"ddparity 3","states":"\\ud800","sha256":"x"}}'),
    "shards elsewhere": _file(
        None, {}, json.dumps(
            {
                "nodes": {"model": {**TENSOR, "chunks": [[0, [0], [2]]]}}, "versions": {}, "about": {}, "torch": "2",
                "sha256": {}, "files": [["../../etc/passwd", ""]],
            }
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("tokens.py").write_text(TOKENS)
    Path("c").write_bytes(CRAFTED[name])
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"^c(:| is (not a complete checkpoint|not a ddparity checkpoint|damaged))"
    ) as told:
        dp.load_checkpoint("c", model=Held())
    assert time.monotonic() - start < 5
    assert len(str(told.value)) < 600, "the error has the file's own text in it"
    assert not Path("RAN").exists()
    assert "tokens" not in sys.modules


@pytest.mark.parametrize(
    "about",
    [
        {"names": []}, {"names": [[None, None]]}, {"shapes": [[[1, 1], [1]]], "names": [[[], {}]]},
        {"shapes": [[[1, 1], [1]]], "names": [[None]]}, {"shapes": [["x"]]}, {"shapes": []}, {"shapes": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_file_says_of_an_optimizer_is_checked(about: dict[str, Any], tmp_path: Path) -> None:
    described = {
        "nodes": {"model": None}, "versions": {}, "about": {"model": about}, "torch": "2.14.0", "sha256": {},
    }  # fmt: skip
    (tmp_path / "c").write_bytes(_file(None, {}, json.dumps(described)))
    with pytest.raises(ValueError, match=r"c does not fit model, a SGD: (the file does not say|its groups have)"):
        dp.load_checkpoint(tmp_path / "c", model=torch.optim.SGD(nn.Linear(1, 1).parameters()))


@pytest.mark.parametrize(
    ("shape", "chunks", "message"),
    [
        ([10**15], [[0, [0], [10**15]]], f"{SHARD} is damaged: it has not the part of x"),
        ([2], [[0, [0], [2]]], f"{SHARD} is damaged: it has not the part of x"),
        ([2], [[0, [0], [1]], [0, [1], [1]]], f"{MAIN} is damaged: ValueError: x has two chunks in one file"),
    ],
)
def test_forged_shards_are_refused(shape: Any, chunks: Any, message: str, tmp_path: Path) -> None:
    """The shapes in the main file are those of no shard, or would use one twice."""
    content = _file({**TENSOR, "name": "x", "shape": [1]}, {"x": bytes(4)})
    (tmp_path / SHARD).write_bytes(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    described = {
        "nodes": {"model": {**TENSOR, "name": "x", "shape": shape, "chunks": chunks}}, "versions": {},
        "about": {"model": {"value": True}}, "torch": "2", "sha256": {},
        "files": [[SHARD, header["__metadata__"]["sha256"]]],
    }  # fmt: skip
    (tmp_path / MAIN).write_bytes(_file(None, {}, json.dumps(described)))
    with pytest.raises(ValueError, match=message):
        dp.load_checkpoint(tmp_path)


def test_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return os.mkdir, ("hostile",)

    monkeypatch.chdir(tmp_path)
    for protocol in (0, 2, 5):
        Path("c").write_bytes(pickle.dumps(Hostile(), protocol))
        with pytest.raises(ValueError, match="c is not a"):
            dp.load_checkpoint("c", model=nn.Linear(1, 1))
    assert os.listdir() == ["c"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # a reader would wait for a writer
    for name in ("pipe", "absent", "pipe/below", "."):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
            dp.load_checkpoint(tmp_path / name)
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="its format is None"):
        dp.load_checkpoint(tmp_path / "other")


PART = 4  # of what a load may take: so much smaller are these files
LARGE = {
    "empty lists": lambda: _raw("[" + "[]," * (300_000 // PART) + "[]]"),
    "empty strings": lambda: _raw("[" + '"",' * (400_000 // PART) + '""]'),
    "a wide character": lambda: _raw('{"a":"' + "a" * (8_000_000 // PART) + '\U0001f600"}'),
    "quotes": lambda: _raw('"' * (2_000_000 // PART)),
    "escapes": lambda: _raw('"' + '\\"' * (1_000_000 // PART)),
    "brackets": lambda: _raw("[" * (2_000_000 // PART)),
    "entries": lambda: _raw("{" + ",".join(f'"{n}":{_entry(0, 0, ())}' for n in range(30_000 // PART)) + "}"),
    "a long key above many tensors": lambda: _file(
        {"kind": "dict", "keys": ["A" * 25_000], "items": [{"kind": "list", "items": [{"leaf": 0}] * 10_000}]},
        {}, version=2,
    ),
    "long keys on many levels": lambda: _nested_keys(),
    "numbers": lambda: _cannot_be_built(_numbers()),
}  # fmt: skip


HONEST = {
    "numbers": lambda: [number / 7 for number in range(300_000 // PART)],
    "small numbers": lambda: (0,) * (600_000 // PART),
    "lists": lambda: [[number] for number in range(60_000 // PART)],
    "a dict": lambda: {str(number): number for number in range(170_000 // PART)},
    "an OrderedDict": lambda: OrderedDict((number, 0) for number in range(87_000 // PART)),
    "tensors": lambda: [torch.zeros(()) for _ in range(20_000 // PART)],
    "a wide character": lambda: "a" * (4_000_000 // PART) + "\U0001f600",
}  # fmt: skip
ARRAY = {"kind": "array", "name": "x", "dtype": "bfloat16", "shape": [0]}  # NumPy has no such array


def _nested_keys() -> bytes:
    """Return a file with a value whose path is 1 MB long, and which cannot be built."""
    node: dict[str, Any] = ARRAY
    for _ in range(99):
        node = {"kind": "dict", "keys": ["A" * (40_000 // PART)], "items": [node]}
    return _cannot_be_built(node)


def _numbers() -> dict[str, Any]:
    return {"kind": "list", "items": [1] * (200_000 // PART) + [ARRAY]}


def _cannot_be_built(node: dict[str, Any]) -> bytes:
    """Return a file with a value that has ARRAY in it, so that everything else is read before it is refused."""
    described = {
        "nodes": {"model": node}, "versions": {}, "about": {"model": {"value": True}}, "torch": "2.14.0",
        "sha256": {"x": hashlib.sha256().hexdigest()},
    }  # fmt: skip
    return _file(node, {"x": b""}, json.dumps(described))


def _memory_of_loads(folder: str) -> dict[str, list[Any]]:
    """Return by the file how its load ended, the bytes of memory it took, the file's size, and the seconds.

    Each file is written and loaded in processes of their own, since a process uses memory again that it has freed.
    """
    assert file_format._SLACK == 2**24
    file_format._SLACK //= PART
    found = {}
    dp.save_checkpoint(f"{folder}/small", values=[torch.zeros(1)])
    for kind, files in (("hostile", LARGE), ("honest", HONEST)):
        for name in files:
            path = Path(folder, f"{kind}, {name}")
            _in_a_child(_write, path, files[name], kind == "honest")
            _in_a_child(_load_and_tell, path)
            found[path.name] = [*json.loads(Path(f"{path}.told").read_text()), os.stat(path).st_size]
            path.unlink()
    return found


def _in_a_child(function: Any, *arguments: Any) -> None:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, arguments
        return
    code = 1
    with contextlib.suppress(BaseException):
        function(*arguments)
        code = 0
    os._exit(code)


def _write(path: Path, make: Any, is_value: bool) -> None:
    if is_value:
        dp.save_checkpoint(path, value=make())
    else:
        path.write_bytes(make())


def _load_and_tell(path: Path) -> None:
    dp.load_checkpoint(path.parent / "small")
    Path("/proc/self/clear_refs").write_text("5")
    before, start, said = _resident("VmRSS"), time.monotonic(), ""
    try:
        dp.load_checkpoint(path)
    except ValueError as error:
        said = str(error)
    Path(f"{path}.told").write_text(json.dumps([said, _resident("VmHWM") - before, time.monotonic() - start]))


def _resident(which: str) -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(which)) * 1024


def test_a_load_takes_memory_of_twice_the_files_size(tmp_path: Path) -> None:
    """And 16 MiB; here a part of that. A hostile file that would take more is refused, an honest one is made longer."""
    (outcome,) = outcomes(_memory_of_loads, 1, str(tmp_path), in_world=False)
    assert outcome.error is None, outcome.trace
    for name, (said, memory, seconds, size) in outcome.value.items():
        print(f"{name}: {memory / 2**20:.0f} MiB for {size / 2**20:.0f} MiB, {seconds:.2f} s")
        # Resident memory moves by some pages, whatever is loaded.
        assert memory < 2 * size + 2**24 // PART + 2**20, (name, memory, size)
        assert bool(said) == name.startswith("hostile"), (name, said)
        assert len(said) < 600, "the error has the file's own text in it"
        assert seconds < 30


def test_names_of_a_file_are_one_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = {"kind": "enum", "type": "\x1b[2Jrank 0 failed\n" * 1000, "member": "A"}
    about = {"model": {"value": True}}
    described = {"nodes": {"model": node}, "versions": {}, "about": about, "torch": "2.14.0", "sha256": {}}
    (tmp_path / "c").write_bytes(_file(None, {}, json.dumps(described)))
    with caplog.at_level("WARNING"):
        assert dp.load_checkpoint(tmp_path / "c") == {}
    (record,) = caplog.records
    assert record.getMessage().isprintable() and len(record.getMessage()) < 600 + len(str(tmp_path))


def test_a_tensor_that_memory_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    """Of a sparse file, for example, which takes no place on the disk."""
    size, node = 1 << 33, {"kind": "tensor", "name": "x", "dtype": "uint8", "shape": [1 << 33]}
    whole = _file(node, {"x": b""}).replace(b'"shape": [0], "data_offsets": [0, 0]', b"%s")
    header = whole[8:] % f'"shape": [{size}], "data_offsets": [0, {size}]'.encode()
    (tmp_path / "c").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(tmp_path / "c", 8 + len(header) + size)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"/c: x has 8,589,934,592 bytes, more than this process can have"):
            dp.load_checkpoint(tmp_path / "c", model=Held())
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_mutated_files(tmp_path: Path) -> None:
    """`make fuzz` loads 200,000 of them."""
    ended = fuzz.run(300, 0, tmp_path)
    assert ended["refused"] > 200 and ended["loaded"] > 5
