"""Parse JSON that anybody may have written: strictly, and in an amount of memory that is known before.

The parser itself would find out too late how much a text needs: an empty list of 3 bytes takes 64. And it recurses in
C, as deeply as the program allows its own functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

_DEEPEST = 512  # levels; a node of a checkpoint has two
_PIECE = 1 << 14  # characters that are looked at at a time
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# Of a text without its strings: the lists, and the small dicts, that have no others inside.
_INNER_LIST = re.compile(rb"\[[^\[\]{}]*\]")
_SMALL_DICT = re.compile(rb"\{(?:[^\[\]{}:]*:){0,5}[^\[\]{}:]*\}")
# What values take in CPython while they are parsed, at most. Lists and dicts have room for more entries than they have.
_VALUE_BYTES = 48  # a number, and its place in a list
_LIST_BYTES = 72
_DICT_BYTES = 208  # with up to five entries
_ENTRY_BYTES = 110  # a pair, and its place in a large dict
_KEY_BYTES = 66  # its place in the parser's own dict of all keys
_STRING_BYTES = 64  # and its characters


def parse_json(text: str, allowed: int, known: Iterable[str] = (), nan: bool = False) -> tuple[Any, int]:
    """Return the value of a JSON text, and how many bytes of memory it took at most, without the text.

    Args:
        allowed: bytes of memory that the text and its values may take.
        known: keys that many dicts have. Each is in memory once.
        nan: also read NaN and infinite numbers.

    Raises:
        ValueError: it is no JSON, has a key twice, or NaN without `nan`, is nested too deeply, or would take too much
            memory.
    """
    need = parsed_bytes(text, known)
    if len(text) + need > allowed:
        raise ValueError(
            f"its {len(text):,} bytes of JSON have too many values to be read in {max(allowed, 0):,} bytes of memory"
        )
    return json.loads(text, object_pairs_hook=_distinct, parse_constant=float if nan else _refuse), need


def parsed_bytes(text: str, known: Iterable[str] = ()) -> int:
    """Return how many bytes the values of a JSON text take at most while it is parsed, without the text.

    Raises:
        ValueError: it is nested too deeply.
    """
    wide = not text.isascii() or "\\u" in text  # a string with one such character takes 4 bytes for each
    need = others = depth = deepest = 0
    for outside in _outside_strings(text):
        others += len(outside)
        lists, dicts = outside.count(b"["), outside.count(b"{")
        need += (outside.count(b",") + lists + dicts) * _VALUE_BYTES
        entries = outside.count(b":")
        large = entries - sum(one.count(b":") for one in _SMALL_DICT.findall(_INNER_LIST.sub(b"", outside)))
        need += lists * _LIST_BYTES + dicts * _DICT_BYTES + entries * _KEY_BYTES + large * _ENTRY_BYTES
        brackets = np.frombuffer(outside.translate(None, _NO_BRACKETS), np.uint8)
        steps = np.where((brackets == ord("[")) | (brackets == ord("{")), np.int32(1), np.int32(-1)).cumsum()
        deepest = max(deepest, depth + int(steps.max(initial=0)))
        depth += int(steps[-1]) if len(steps) else 0
    if deepest > _DEEPEST:
        raise ValueError(f"its JSON is nested more than {_DEEPEST} levels deep")
    # The parser has room for a quarter more than a string, and copies it at its first wide character. Of the other
    # characters, the digits of long numbers take memory.
    characters = max(0, len(text) - others) * (28 if wide else 5) // 4
    same = sum(text.count(f'"{key}":') for key in known)
    return need + characters + (text.count('"') // 2 - same) * _STRING_BYTES - same * _KEY_BYTES + others // 2


def _outside_strings(text: str) -> Iterator[bytes]:
    """Yield the bytes of a JSON text that are in no string, in pieces. `re.sub` would take up to 60 times its size."""
    inside, run = 0, 0  # whether the last byte was in a string, and how many backslashes were the last bytes
    for start in range(0, len(text), _PIECE):
        piece = np.frombuffer(text[start : start + _PIECE].encode(errors="replace"), np.uint8)
        quotes = piece == ord('"')
        if run or ord("\\") in piece:
            numbers = np.arange(1, len(piece) + 1, dtype=np.int32)
            others = np.maximum.accumulate(np.where(piece == ord("\\"), -run, numbers))
            runs = np.concatenate([np.array([run], np.int32), numbers - others])  # of backslashes before each byte
            quotes &= runs[:-1] % 2 == 0
            run = int(runs[-1])
        strings = (np.cumsum(quotes, dtype=np.int32) + inside) % 2 == 1
        inside = int(strings[-1])
        yield piece[~(strings | quotes)].tobytes()


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in its JSON")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"its JSON has the number {constant}")
