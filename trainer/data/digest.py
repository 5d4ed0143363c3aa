"""A number for the samples that a step trained on, whichever replicas read them and in whatever order.

The digest of a sample is xxh3-64 of its token ids as little-endian int64, so that the type a shard stores plays no
part; that of several samples is the sum of theirs modulo 2^64. A sum, unlike xor, also tells a sample that came twice
from one that did not come. It finds mistakes, not forgery: xxh3 is no cryptographic hash.

Digests of replicas, and of steps, are added up the same way.
"""

import numpy as np
import torch
import xxhash

_MODULUS = 1 << 64


def sample_digests(tokens: torch.Tensor) -> np.ndarray:
    """The digest of every sample: uint64 [n] of token ids [n, s + 1] on the host."""
    rows = np.ascontiguousarray(tokens.numpy(), dtype="<i8")
    return np.fromiter((xxhash.xxh3_64_intdigest(row) for row in rows), np.uint64, len(rows))


def digest(tokens: torch.Tensor) -> int:
    """The digest of all samples together, 0 to 2^64 - 1, of token ids [n, s + 1] on the host; 0 for no samples."""
    return int(sample_digests(tokens).sum(dtype=np.uint64))


def together(*digests: int) -> int:
    """The digest of all samples that these are of."""
    return sum(digests) % _MODULUS


def as_hex(value: int) -> str:
    """16 hex digits, as events and manifests state it, of a digest."""
    return f"{value % _MODULUS:016x}"


def from_hex(text: str) -> int:
    """The digest, 0 to 2^64 - 1, that `as_hex` wrote."""
    return int(text, 16)
