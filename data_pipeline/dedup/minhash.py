"""Signatures of documents whose equal entries estimate how much two documents have in common.

A document is the set of its shingles (every n words in a row); the similarity of two is the Jaccard index of their
sets. Entry k of a signature is the least of all shingles under hash function k, which two documents share with a
probability equal to their similarity (Broder 1997). Documents that agree on all `rows` entries of one of the `bands`
are candidates: of similarity s, a share of 1 - (1 - s^rows)^bands (Leskovec et al., Mining of Massive Datasets, 3.4).

Shapes: `d` documents, `w` words, `p` permutations (hash functions).
"""

import numpy as np
import rensa
from numpy.typing import NDArray

from data_pipeline.words import UInt64s, WordTable, mix
from trainer.data_config import FuzzyConfig

UInt32s = NDArray[np.uint32]

_SEED = 1234  # of the hash functions: signatures of all parts must agree, so no setting changes it
_BASE = np.uint64(0xD1342543DE82EF95)  # odd; Steele and Vigna 2021, table of multipliers
_SLACK_DEVIATIONS = 2.0


def signatures(table: WordTable, config: FuzzyConfig) -> UInt32s:
    """Signatures [d, p]; of a document without words all entries are 2^32 - 1."""
    shingles, first_shingles = _shingles(table, config.ngram)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, first_shingles, config.permutations, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(table.num_documents, config.permutations)


def _shingles(table: WordTable, ngram: int) -> tuple[UInt64s, UInt64s]:
    """All shingles, and the index [d + 1] of each document's first; a document shorter than one has itself as one."""
    values, is_first = np.zeros(len(table.hashes), np.uint64), np.zeros(len(table.hashes), bool)
    hashes, at = table.ngrams(ngram)
    values[at], is_first[at] = hashes, True
    num_words = np.diff(table.first_words)
    for length in range(1, ngram):
        firsts = table.first_words[:-1][num_words == length]
        rolled = np.zeros(len(firsts), np.uint64)
        for k in range(length):
            rolled = mix(rolled * _BASE + table.hashes[firsts + k])
        values[firsts], is_first[firsts] = rolled, True
    counts = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(is_first, out=counts[1:])
    return values[is_first], counts[table.first_words]


def band_keys(signatures: UInt32s, config: FuzzyConfig, band: int) -> tuple[UInt64s, UInt32s]:
    """A hash [d] of the band's entries, and the entry [d] that follows them.

    Where very many documents share a key, the entry behind brings the more similar of them side by side.
    """
    first, behind = band * config.rows, (band + 1) * config.rows
    keys = np.zeros(len(signatures), np.uint64)
    for column in range(first, behind):
        keys = mix(keys * _BASE + signatures[:, column])
    return keys, np.ascontiguousarray(signatures[:, behind % config.permutations])


def least_agreement(config: FuzzyConfig) -> float:
    """Share of equal entries from which two candidates count as the same: the threshold less a slack.

    The share of equal entries estimates a similarity t with a standard deviation of sqrt(t (1 - t) / p). Without slack
    half of the pairs right at the threshold would be missed; two deviations below it 2.3 % are (normal
    approximation). In return pairs up to that much less similar count as the same: with 128 permutations and a
    threshold of 0.8 the line is drawn at 0.729.
    """
    deviation = (config.threshold * (1.0 - config.threshold) / config.permutations) ** 0.5
    return config.threshold - _SLACK_DEVIATIONS * deviation
