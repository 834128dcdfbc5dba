"""A keyed permutation of range(n), and keyed random words, computed at the positions that are needed."""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np
from numpy.typing import NDArray

# Constants of the permutation. They are 0-d arrays, because NumPy computes with 0-d and 1-element arrays in two thirds
# of the time that it needs for its scalars.
_ODD_1 = np.array(0x9E3779B97F4A7C15, np.uint64)
_ODD_2 = np.array(0xD6E8FEB86659FD93, np.uint64)
_HALF = np.array(32, np.uint64)
_HEADROOM = np.array(16, np.uint64)
_ROUNDS = 6
# Up to this size `permute` sorts random keys: it takes less than 20 µs and makes every permutation equally likely. A
# Feistel network over so few values would be measurably less random.
_SORTED = 1024


def permute(positions: NDArray[np.int64], n: int, *key: int | str) -> NDArray[np.int64]:
    """Return the elements at `positions` of the permutation of range(n) that `key` names.

    It is a Feistel network over Z_a x Z_b, with a and b near the square root of n. The few values from n to a*b are
    put through the network again (cycle walking). So it needs constant memory, and gives the same result on every
    machine and with every version of NumPy. n may be up to 2**62.

    Args:
        positions: 1-D int64, each at least 0 and less than n.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.

    Example:
        >>> sorted(permute(np.arange(5), 5, "epoch", 0).tolist())
        [0, 1, 2, 3, 4]
    """
    if n <= _SORTED:
        words = _sort_keys(np.arange(n, dtype=np.uint64), _round_keys(*key))
        return np.argsort(words, kind="stable")[positions]
    keys = _round_keys(*key)
    a, b = _factors(n)
    values = _feistel(positions.astype(np.uint64), a, b, keys)
    # The network is a permutation of range(a * b), so repeating it on a value from n on ends at a value below n.
    while values.max(initial=0) >= n:
        outside = np.flatnonzero(values >= n)
        values[outside] = _feistel(values[outside], a, b, keys)
    return values.view(np.int64)


def words(positions: NDArray[np.int64], *key: int | str) -> NDArray[np.uint64]:
    """Return 64 random bits for each position; they depend on the position and on `key` alone.

    Example:
        >>> words(np.arange(3), "draws", 0).dtype
        dtype('uint64')
    """
    return _sort_keys(positions.astype(np.uint64), _round_keys(*key))


@functools.lru_cache(maxsize=16)
def _factors(n: int) -> tuple[int, int]:
    """Return a and b near the square root of n with the least product of at least n, so that few values are outside."""
    root = math.isqrt(n - 1) + 1
    return min(((a, -(-n // a)) for a in range(root, max(root // 2, root - 256), -1)), key=lambda ab: ab[0] * ab[1])


def _round_keys(*key: int | str) -> list[NDArray[np.uint64]]:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8 * _ROUNDS).digest()
    words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return [words[number : number + 1] for number in range(_ROUNDS)]


def _feistel(values: NDArray[np.uint64], a: int, b: int, keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Return a keyed permutation of range(a * b) at `values`."""
    height, width = np.array(a, np.uint64), np.array(b, np.uint64)
    left, right = np.divmod(values, width)
    words = np.empty_like(left)
    for number in range(0, _ROUNDS, 2):
        left += _mixed(right, keys[number], words)
        left %= height
        right += _mixed(left, keys[number + 1], words)
        right %= width
    left *= width
    left += right
    return left


def _mixed(half: NDArray[np.uint64], key: NDArray[np.uint64], out: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a word of 48 bits for each value (multiply, xor-shift, multiply); a half plus a word cannot overflow."""
    np.add(half, key, out=out)
    np.multiply(out, _ODD_1, out=out)
    np.bitwise_xor(out, np.right_shift(out, _HALF), out=out)
    np.multiply(out, _ODD_2, out=out)
    return np.right_shift(out, _HEADROOM, out=out)


def _sort_keys(values: NDArray[np.uint64], keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Return a 64-bit sort key for each value, unrelated between values and between `keys`."""
    words = values * _ODD_1
    for key in keys[:4]:
        words += key
        words ^= words >> _HALF
        words *= _ODD_2
    words ^= words >> _HALF
    return words
