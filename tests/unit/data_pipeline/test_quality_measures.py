"""Every measure against its definition, computed word by word and line by line in plain Python."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.filters.gopher import STOP_WORDS
from data_pipeline.filters.measures import TextMeasures
from data_pipeline.words import WordTable

WORDS = [
    "the",
    "of",
    "To",
    "a",
    "42",
    "7",
    "café",
    "Größe",
    "한국어를",
    "그리고",
    "東京",
    "かな",
    "river",
    "don't",
    "x1",
]
MARKS = [
    " ",
    " ",
    " ",
    ", ",
    "\n",
    "\n",
    "\n\n",
    "\n \n",
    "...",
    "…",
    " # ",
    "\n- ",
    "\n• ",
    ".\n",
    " -- ",
    "\t",
    " 🙂 ",
]
TEXT = st.lists(st.sampled_from(WORDS) | st.sampled_from(MARKS), max_size=40).map("".join)
REPETITIVE = st.lists(st.sampled_from(["a ", "b ", "café ", "b c "]), max_size=60).map("".join)
BATCH = st.lists(TEXT | REPETITIVE | st.builds("".join, st.tuples(REPETITIVE, REPETITIVE, REPETITIVE)), max_size=4)


def words_of(text: str) -> list[str]:
    return re.findall(r"[0-9a-zäöüßé가-힣]+|[぀-ヿ一-鿿]|🙂", text.lower())


def fraction(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def repeated(parts: list[str]) -> tuple[float, float]:
    later = [part for index, part in enumerate(parts) if part in parts[:index]]
    return fraction(len(later), len(parts)), fraction(sum(map(len, later)), sum(map(len, parts)))


def frequent_ngram(words: list[str], n: int) -> float:
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0.0
    longest = max(len("".join(ngram)) for ngram, count in counts.items() if count == most)
    return most * longest / len("".join(words))


def repeated_ngram(words: list[str], n: int) -> float:
    seen, covered = set[tuple[str, ...]](), set[int]()
    for i in range(len(words) - n + 1):
        ngram = tuple(words[i : i + n])
        if ngram in seen:
            covered.update(range(i, i + n))
        seen.add(ngram)
    return fraction(sum(len(words[i]) for i in covered), len("".join(words)))


@given(BATCH)
def test_words(texts: list[str]) -> None:
    measures = TextMeasures(texts)
    all_words = [words_of(text) for text in texts]
    chars = ["".join(words) for words in all_words]
    assert measures.num_words.tolist() == [len(words) for words in all_words]
    for measured, expected in [
        (measures.mean_word_chars, [fraction(len(c), len(w)) for c, w in zip(chars, all_words, strict=True)]),
        (measures.wide_letters, [fraction(sum(x >= "\u0800" for x in c), len(c)) for c in chars]),
        (measures.ascii_letters, [fraction(sum(x.isascii() for x in c), len(c)) for c in chars]),
        (measures.hashes_per_word, [t.count("#") / max(len(w), 1) for t, w in zip(texts, all_words, strict=True)]),
        (
            measures.ellipses_per_word,
            [len(re.findall(r"\.\.\.|…", t)) / max(len(w), 1) for t, w in zip(texts, all_words, strict=True)],
        ),
        (
            measures.alphabetic_tokens,
            [fraction(sum(any(map(str.isalpha, t)) for t in text.split()), len(text.split())) for text in texts],
        ),
    ]:
        assert measured.tolist() == pytest.approx(expected)
    distinct = [len(set(words) & set(STOP_WORDS)) for words in all_words]
    assert measures.num_distinct(WordTable.of(STOP_WORDS).hashes).tolist() == distinct


@given(BATCH)
def test_lines(texts: list[str]) -> None:
    measured = TextMeasures(texts).lines
    for index, text in enumerate(texts):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        paragraphs = [part.strip() for part in re.sub("\n[ \t]+\n", "\n\n", text).split("\n\n") if part.strip()]
        line_fractions, paragraph_fractions = repeated(lines), repeated(paragraphs)
        expected = {
            "repeated_lines": line_fractions[0],
            "repeated_line_chars": line_fractions[1],
            "repeated_paragraphs": paragraph_fractions[0],
            "repeated_paragraph_chars": paragraph_fractions[1],
            "bullets": fraction(sum(bool(re.match("[•-]", line)) for line in lines), len(lines)),
            "ellipses": fraction(sum(bool(re.search(r"(\.\.\.|…)$", line)) for line in lines), len(lines)),
        }
        assert {name: values[index] for name, values in measured.items()} == pytest.approx(expected)


@given(BATCH)
def test_ngrams(texts: list[str]) -> None:
    measured = TextMeasures(texts).ngrams
    all_words = [words_of(text) for text in texts]
    for n in (2, 3, 4):
        assert measured[n].tolist() == pytest.approx([frequent_ngram(words, n) for words in all_words])
    for n in range(5, 11):
        assert measured[n].tolist() == pytest.approx([repeated_ngram(words, n) for words in all_words])


def test_the_same_ngram_in_two_documents_is_no_repetition() -> None:
    text = "one two three four five six seven eight nine ten eleven twelve"
    measured = TextMeasures([text, text, f"{text} {text}"]).ngrams
    assert all(measured[n].tolist()[:2] == [0.0, 0.0] for n in measured)
    assert all(measured[n][2] == 0.5 for n in range(5, 11))


def test_real_prose_against_the_definitions() -> None:
    texts = [text for _, text in sorted(_topics().items()) if len(text) < 20_000][:60]
    measures = TextMeasures(texts)
    words = [re.findall(r"[0-9a-z]+", text.lower()) for text in texts if text.isascii()]
    at = [index for index, text in enumerate(texts) if text.isascii()]
    assert len(at) > 20
    for n in (2, 4, 5, 10):
        expected = [frequent_ngram(w, n) if n < 5 else repeated_ngram(w, n) for w in words]
        assert measures.ngrams[n][at].tolist() == pytest.approx(expected)
    assert max(measures.ngrams[5][at]) > 0


def _topics() -> dict[str, str]:
    return pytest.importorskip("pydoc_data.topics").topics
