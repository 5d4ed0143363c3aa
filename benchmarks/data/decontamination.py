"""Looking for evaluation n-grams, beside a loop over tuples of words and a set of them."""

import random
import re
from collections.abc import Sequence

import numpy as np

from benchmarks.data.corpus import Corpus
from benchmarks.data.timing import megabytes_per_second, show
from data_pipeline.decontamination import EvaluationNgrams
from data_pipeline.words import WordTable

NGRAM = 13
NUM_NGRAMS = 2_000_000
TEXT_BYTES = 12_000_000
NUM_PLANTED = 100
_WORD = re.compile(r"\w+")


def compare(corpus: Corpus, rounds: int) -> None:
    """Evaluation texts are random words of the corpus; a planted phrase, at a document's end, is one n-gram of them."""
    draw = random.Random(1)
    vocabulary = sorted(
        {word.lower() for text in corpus.texts(TEXT_BYTES // 4) for word in _WORD.findall(text) if word.isascii()}
    )
    phrases = [" ".join(draw.choices(vocabulary, k=NGRAM)) for _ in range(NUM_PLANTED)]
    questions = [" ".join(draw.choices(vocabulary, k=1000 + NGRAM - 1)) for _ in range(NUM_NGRAMS // 1000)]
    texts = corpus.texts(TEXT_BYTES)
    places = draw.sample(range(len(texts)), NUM_PLANTED)
    for place, phrase in zip(places, phrases, strict=True):
        texts[place] = f"{texts[place]}\n{phrase}\n"
    hashes = np.unique(np.concatenate([WordTable.of([text]).ngrams(NGRAM)[0] for text in [*questions, *phrases]]))
    ours = EvaluationNgrams(hashes, NGRAM, len(questions) + NUM_PLANTED, 0)
    tuples = {ngram for text in [*questions, *phrases] for ngram in _tuples(text)}
    found: dict[str, set[int]] = {}

    def plain() -> None:
        found["plain Python"] = {index for index, text in enumerate(texts) if any(n in tuples for n in _tuples(text))}

    def mine() -> None:
        found["ours"] = _overlapping(ours, texts)

    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(hashes):,} n-grams of {NGRAM} words, {megabytes:.1f} MB of text, rates of processor time")
    rates = megabytes_per_second({"ours": mine, "plain Python": plain}, megabytes, rounds)
    planted = set(places)
    show(rates, "ours", {name: f"found {len(which & planted)} of {len(planted)}" for name, which in found.items()})


def _tuples(text: str) -> list[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return [tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)]


def _overlapping(ngrams: EvaluationNgrams, texts: Sequence[str], batch: int = 100) -> set[int]:
    found: set[int] = set()
    for first in range(0, len(texts), batch):
        found |= set((ngrams.overlaps(texts[first : first + batch])["document"] + first).tolist())
    return found
