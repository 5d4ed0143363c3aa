"""Shuffled orders that are computed and never stored."""

import hashlib
from collections.abc import Sequence

import numpy as np

_ROUNDS = 6


def permute(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """A pseudo-random permutation of range(size), evaluated at `indices` alone."""
    return permute_groups(indices, np.zeros(len(indices), np.int64), [size], [key])


def permute_groups(indices: np.ndarray, groups: np.ndarray, sizes: Sequence[int], keys: Sequence[str]) -> np.ndarray:
    """Several permutations at once: index i goes through that of range(sizes[g]) named by keys[g], with g = groups[i].

    A Feistel network over the smallest even number of bits that holds the size; results outside the range are sent
    through again until they fall inside (cycle walking), which keeps it one to one.
    """
    limits = np.array(sizes, np.uint64)[groups]
    half_bits = np.array([max(1, ((size - 1).bit_length() + 1) // 2) for size in sizes], np.uint64)[groups]
    round_keys = np.array([_round_keys(key) for key in keys])[groups].T
    result = indices.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        result[outside] = _feistel(result[outside], round_keys[:, outside], half_bits[outside])
        outside = outside[result[outside] >= limits[outside]]
    return result.astype(np.int64)


def _round_keys(key: str) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), dtype=np.uint64)


def _feistel(values: np.ndarray, round_keys: np.ndarray, half_bits: np.ndarray) -> np.ndarray:
    """One pass; `values` and `half_bits` are [n], `round_keys` [rounds, n]."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for keys in round_keys:
        left, right = right, left ^ (_mix(right + keys) & mask)
    return (left << half_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
