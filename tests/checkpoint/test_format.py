"""The file of a checkpoint: what is read, what is refused, and how threads share the work. In one process."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
import tracemalloc
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ddparity as dp
from ddparity.checkpoint import format as file_format
from ddparity.checkpoint import json_text
from ddparity.checkpoint.json_text import parse_json
from tests.checkpoint.test_checkpoint import Held
from tests.checkpoint.test_hostile import SHARD, TENSOR, _file

SHARDED = {**TENSOR, "name": "x", "chunks": [[0, [0], [2]]]}


def _described(node: Any, tensors: dict[str, bytes] | None = None, **other: Any) -> bytes:
    """Return a file with right checksums and some other parts of its description."""
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in (tensors or {}).items()}
    described = {"nodes": {"model": node}, "versions": {}, "about": {}, "torch": "2.14.0", "sha256": sha256, **other}
    return _file(None, tensors or {}, json.dumps(described))


DATA = {"model.0": bytes(8)}
HEADER = b'"shape": [8], "data_offsets": [0, 8]'
REFUSED = {
    "a version that is no object": (_described(None, versions={"model": {"": 3}}), "the versions of a module's layers"),
    "versions that are no object": (_described(None, versions={"model": [3]}), "the versions of a module's layers"),
    "parts that are lists": (_described(None, about=[]), "a part of its description is no object"),
    "no version of torch": (_described(None, torch=2), "its version of torch is no text"),
    "files that are no list": (_described(None, files={}), "the files of its shards are not named"),
    "a file without a digest": (_described(None, files=[[SHARD]]), "the files of its shards are not named"),
    "a file twice": (_described(None, files=[[SHARD, ""], [SHARD, ""]]), "the files of its shards are not named"),
    "a file elsewhere": (_described(None, files=[["../" + SHARD, ""]]), "the files of its shards are not named"),
    "no tensor behind a sharded one": (
        _described({"kind": "list", "items": [SHARDED, TENSOR]}, files=[[SHARD, ""]]),
        "its description lists model.0, which the file does not have once",
    ),
    "no digest of a tensor": (_described(TENSOR, DATA, sha256={}), "lists model.0, which the file does not have once"),
    "a tensor twice": (_described({"kind": "list", "items": [TENSOR] * 2}, DATA), "lists model.0, which the file does"),
    "other bytes": (_described({**TENSOR, "shape": [3]}, DATA), r"model.0 has 8 bytes, not those of \[3\] in float32"),
    "a negative size": (_described(TENSOR, DATA).replace(HEADER, HEADER.replace(b": [8]", b":[-8]")), "its entry"),
    "a size that is no integer": (
        _described(TENSOR, DATA).replace(HEADER, HEADER.replace(b" [8], ", b"[8e0],")), "its entry for model.0"
    ),
    "another end": (_described(TENSOR, DATA) + b"x", "its tensors end at byte .* and the file at"),
    "an empty header": (bytes(8), "c is not a complete checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_whose_parts_do_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        dp.load_checkpoint(tmp_path / "c", model=Held())


def test_a_header_of_any_length_is_read(tmp_path: Path) -> None:
    """The length of a header is how a file begins, and so does a pickle's mark."""
    lengths, path = set(), tmp_path / "c"
    for letters in range(0, 1600, 8):
        with open(path, "wb") as file:
            file_format.write_states(file, file_format.describe_states({"x": "a" * letters}, {}))
        lengths.add(int.from_bytes(path.read_bytes()[:8], "little"))
        with file_format.opened(path) as checkpoint:
            assert len(checkpoint.nodes["x"]) == letters
    assert lengths >= {0x280, 0x380, 0x480, 0x580}


def test_what_a_layer_says_of_its_version_must_be_json(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        _version = frozenset({1})  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"a layer's version in the states of model cannot be written as JSON: .*set"):
        dp.save_checkpoint(tmp_path / "c", model=Odd(1, 1))


def test_json_of_any_length_but_not_of_any_size_in_memory() -> None:
    value, took = parse_json("[" + "[]," * 600 + "0]", 10**6)
    assert value == [[]] * 600 + [0] and 56 * 600 < took < 10**6
    with pytest.raises(ValueError, match="have too many values to be read in 50,000 bytes of memory"):
        parse_json("[" + "[]," * 600 + "0]", 50_000)
    wide = '"' + "a" * 1000 + "\U0001f600" + '"'
    assert parse_json(wide, 10_000)[0] == wide[1:-1]
    with pytest.raises(ValueError, match="have too many values"):
        parse_json(wide, 4000)
    deep = "[" * 512 + "]" * 512
    parse_json(deep, 10**6)
    with pytest.raises(ValueError, match="nested more than 512 levels deep"):
        parse_json("[" + deep + "]", 10**6)
    assert parse_json('"' + '[\\"{' * 600 + '"', 10**6)[0] == '["{' * 600
    with pytest.raises(ValueError, match="a key stands twice"):
        parse_json('{"a": 1, "a": 1}', 10**6)
    with pytest.raises(ValueError, match="has the number NaN"):
        parse_json("[NaN]", 10**6)
    assert parse_json("[Infinity]", 10**6, nan=True)[0] == [float("inf")]


@pytest.mark.parametrize(
    "value",
    [
        0, [0] * 9000, [[]] * 9000, [[1e9]] * 9000, [{}] * 9000, [{"a": 1.5}] * 9000, [{"kind": "x"}] * 9000,
        {str(n): 300 + n for n in range(9000)}, [{f"a{n}": n, f"b{n}": []} for n in range(3000)], ["abc"] * 9000,
        {str(n): 0 for n in range(10923)}, [{str(n): n for n in range(6)}] * 2000, "\0" * 90_000, '"' * 90_000,
        ["\U0001f600" + "a" * 90] * 900, [10**4000] * 90, [{"shape": [1, 2], "name": "x", "kind": "tensor"}] * 9000,
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode(),
)  # fmt: skip
def test_values_take_no_more_memory_than_was_computed(value: Any) -> None:
    text = json.dumps(value)
    tracemalloc.start()
    try:
        _, need = parse_json(text, 2**40, ("kind", "name", "shape"))
        took = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert took < need + 2**17, (took, need)  # what it takes to compute it


def _outside(text: bytes) -> bytes:
    """Return the bytes that are in no string, one after the other."""
    found, inside, escaped = bytearray(), False, False
    for byte in text:
        if not inside and byte != 34:
            found.append(byte)
        if byte == 34 and not escaped:
            inside = not inside
        escaped = byte == 92 and not escaped
    return bytes(found)


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 1000])
def test_what_is_outside_of_strings(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is looked at in pieces, which may end between a backslash and its character."""
    monkeypatch.setattr(json_text, "_PIECE", piece)
    draw = random.Random(piece)
    for _ in range(300):
        strings = (json.dumps("".join(draw.choices('a"\\,[{', k=draw.randrange(6)))) for _ in range(9))
        text = "".join("".join(draw.choices(",[]{}:1 ", k=draw.randrange(4))) + one for one in strings).encode()
        text = text[: draw.choice((len(text), draw.randrange(len(text))))]
        assert b"".join(json_text._outside_strings(text.decode())) == _outside(text), text


def test_threads_share_the_work_and_end_before_the_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_format, "_THREADS", 2)
    together, done = threading.Barrier(2, timeout=30), list[int]()

    def work(item: int) -> None:
        together.wait()  # breaks if there is one thread only
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.2)  # so that the call would return before it
        done.append(item)

    file_format._in_threads(work, [1, 2], 2**24 + 1, lambda: done.append(0))
    assert done[0] == 0 and sorted(done) == [0, 1, 2]

    def fail(item: int) -> None:
        raise OSError(f"item {item}")

    with pytest.raises(OSError, match="item 1"):
        file_format._in_threads(fail, [1, 2, 3], 0)


def test_an_item_that_another_thread_has_taken_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Raced(deque[int]):
        def __bool__(self) -> bool:
            return True  # it was not empty when this thread looked

    monkeypatch.setattr(file_format, "deque", Raced)
    done: list[int] = []
    file_format._in_threads(done.append, [1, 2], 0)
    assert done == [1, 2]


def test_tensors_that_take_several_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_format, "_CHUNK", 7)
    state = {name: torch.arange(size, dtype=torch.float64) for name, size in (("a", 0), ("b", 1), ("c", 50))}
    dp.save_checkpoint(tmp_path / "c", state=state)
    found = dp.load_checkpoint(tmp_path / "c")["state"]
    assert all(torch.equal(found[name], value) for name, value in state.items())
