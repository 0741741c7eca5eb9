"""A frozen 64-bit hash, and what is made of it: sample seeds and random permutations without memory.

Written out here because a checkpoint is only as good as the generator behind it: numpy's `Generator` streams
    may change
between releases, this arithmetic cannot. The mixer is the finaliser of SplitMix64 (Steele, Lea and Flood,
2014).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int64]
Word = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SEEDS = 0x5EED  # keeps sample seeds apart from the keys of permutations
_ROUNDS = 6  # with 4, domains of 3 to 7 elements show a bias over 40 000 keys


def _mix(x: Word) -> Word:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*parts: int | Int) -> Word:
    """Hash integers, or arrays of them element by element.

    Args:
        parts: integers in [0, 2**63), or int64 arrays that broadcast against each other.

    Returns:
        uint64 array of the broadcast shape, at least one-dimensional.
    """
    h = np.zeros(1, np.uint64)
    for part in parts:
        h = _mix((h ^ np.asarray(part, np.int64).astype(np.uint64)) + _GOLDEN)
    return h


def sample_seeds(seed: int, epoch: int | Int, position: Int) -> Int:
    """One non-negative number per sample and epoch, from which all its random draws follow.

    Args:
        seed: the stream's seed.
        epoch: epoch of each sample.
        position: int64, positions in the epoch's order.

    Returns:
        int64 in [0, 2**63), same shape as `position`.
    """
    return (hash64(_SEEDS, seed, epoch, position) >> np.uint64(1)).astype(np.int64)


def permute(index: Int, size: Int, key: Word) -> Int:
    """Where a pseudo-random permutation of [0, size) sends an index; costs no memory, whatever the size.

    A Feistel network on Z_a x Z_b with a*b just above the size (so nearly no index has to walk on until it
    falls inside): alternating keyed shifts of the two coordinates, each a bijection, hence a bijection. Ours.

    Args:
        index: int64 [n], each in [0, size).
        size: int64 [n], size of the domain of each index, at least 1.
        key: uint64 [n] or [1]; a different key is a different permutation.

    Returns:
        int64 [n].
    """
    key = np.broadcast_to(key, index.shape)
    rows = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    columns = (size.astype(np.uint64) + rows - np.uint64(1)) // rows
    out = _feistel(index.astype(np.uint64), rows, columns, key)
    limit = size.astype(np.uint64)
    while (outside := np.flatnonzero(out >= limit)).size:
        out[outside] = _feistel(out[outside], rows[outside], columns[outside], key[outside])
    return out.astype(np.int64)


def _feistel(x: Word, rows: Word, columns: Word, key: Word) -> Word:
    left, right = x // columns, x % columns
    for _ in range(_ROUNDS):
        key = key + _GOLDEN
        left = (left + _mix(right ^ key)) % rows
        key = key + _GOLDEN
        right = (right + _mix(left ^ key)) % columns
    return left * columns + right
