"""MinHash beside datasketch: words and signatures of the same documents, and near copies planted among them."""

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from benchmarks.data.corpus import Corpus
from benchmarks.data.timing import megabytes_per_second, show
from data_pipeline.dedup.minhash import UInt32s, band_keys, least_agreement, signatures
from data_pipeline.words import WordTable
from trainer.data_config import FuzzyConfig

CONFIG = FuzzyConfig()
TEXT_BYTES = 6_000_000
NUM_PLANTED = 300
_MAX_CHARS = 20_000
_BATCH_CHARS = 1 << 20
_WORD = re.compile(r"\w+")
Pairs = set[tuple[int, int]]


def compare(corpus: Corpus, rounds: int) -> None:
    texts, planted = plant([text[:_MAX_CHARS] for text in corpus.texts(TEXT_BYTES)])
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"{len(texts):,} documents, {megabytes:.1f} MB, {len(planted)} planted pairs of similarity 0.8 or more; "
        f"{CONFIG.permutations} permutations, {CONFIG.bands} bands of {CONFIG.rows}, {CONFIG.ngram} words a shingle; "
        f"words and signatures, rates of processor time"
    )
    contestants = {"ours": lambda: our_signatures(texts), "datasketch": lambda: their_signatures(texts)}
    rates = megabytes_per_second(contestants, megabytes, rounds)
    found = {"ours": our_pairs(our_signatures(texts)), "datasketch": their_pairs(their_signatures(texts))}
    show(rates, "ours", {name: f"recall {len(pairs & planted) / len(planted):.3f}" for name, pairs in found.items()})


def plant(texts: Sequence[str]) -> tuple[list[str], Pairs]:
    """Copies with a few words replaced behind the documents, and which pairs of them have a similarity of 0.8."""
    draw, copies, planted = random.Random(1), [], set()
    sources = [index for index, text in enumerate(texts) if len(text.split()) > 60]
    for source in draw.sample(sources, min(NUM_PLANTED, len(sources))):
        words = texts[source].split(" ")
        for at in draw.sample(range(len(words)), max(1, int(len(words) * draw.uniform(0.001, 0.03)))):
            words[at] = f"changed{draw.randrange(10**6)}"
        copy = " ".join(words)
        if jaccard(texts[source], copy) >= CONFIG.threshold:
            planted.add((source, len(texts) + len(copies)))
        copies.append(copy)
    return [*texts, *copies], planted


def jaccard(one: str, other: str) -> float:
    """Of the shingles as our words make them, exactly."""
    tables = [set(WordTable.of([text]).ngrams(CONFIG.ngram)[0].tolist()) for text in (one, other)]
    return len(tables[0] & tables[1]) / max(1, len(tables[0] | tables[1]))


def our_signatures(texts: Sequence[str]) -> UInt32s:
    """In batches as the pipeline makes them."""
    found, batch, num_chars = [], list[str](), 0
    for text in texts:
        batch.append(text)
        num_chars += len(text)
        if num_chars > _BATCH_CHARS:
            found.append(signatures(WordTable.of(batch), CONFIG))
            batch, num_chars = [], 0
    return np.concatenate([*found, signatures(WordTable.of(batch), CONFIG)] if batch else found)


def our_pairs(rows: UInt32s) -> Pairs:
    """Candidates of any band that agree enough."""
    pairs: Pairs = set()
    for band in range(CONFIG.bands):
        groups: dict[int, list[int]] = {}
        for document, key in enumerate(band_keys(rows, CONFIG, band)[0].tolist()):
            for other in groups.setdefault(key, []):
                if (rows[other] == rows[document]).mean() >= least_agreement(CONFIG):
                    pairs.add((other, document))
            groups[key].append(document)
    return pairs


def their_signatures(texts: Sequence[str]) -> list[Any]:
    from datasketch import MinHash

    found = []
    for text in texts:
        words = _WORD.findall(text.lower())
        shingles = {
            " ".join(words[at : at + CONFIG.ngram]).encode() for at in range(max(1, len(words) - CONFIG.ngram + 1))
        }
        signature = MinHash(num_perm=CONFIG.permutations, hashfunc=xxhash.xxh32_intdigest)
        signature.update_batch(list(shingles))
        found.append(signature)
    return found


def their_pairs(rows: Sequence[Any]) -> Pairs:
    from datasketch import MinHashLSH

    index = MinHashLSH(num_perm=CONFIG.permutations, params=(CONFIG.bands, CONFIG.rows))
    pairs: Pairs = set()
    for document, signature in enumerate(rows):
        pairs |= {(other, document) for other in index.query(signature)}
        index.insert(document, signature)
    return pairs
