"""The rules of Gopher's data set, MassiveText (Rae et al. 2021, appendix A.1.1; numbers from there and from table A1).

The paper filters English. Here other languages pass the same rules, except where a rule measures English itself:

- Mean word length: scripts whose characters are syllables or words (Hangul, kana, Chinese), or that write without
  spaces (Thai), have other lengths; documents with a tenth of their characters in such scripts are not judged by it.
- Stop words: the list is English, so it is asked only of documents that are identified as English. No Korean or German
  text is dropped for want of "the".

Words are those of `WordTable`, a Chinese or kana character being one; "word with a letter" alone looks at what stands
between white space, to see lone symbols. Repetition is counted as occurrences after the first.
"""

import functools

import numpy as np

from data_pipeline.filters.language import identify
from data_pipeline.filters.measures import Bools, Rule, TextMeasures
from data_pipeline.words import UInt64s, WordTable

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_WIDE_SCRIPT = 0.1  # of the characters: with more one-character words, the mean length falls below 3
_ASCII_SCRIPT = 0.995  # of the characters: English has more; most texts with accents need no identification


def _odd_word_length(measures: TextMeasures) -> Bools:
    mean = measures.mean_word_chars
    return ((mean < 3) | (mean > 10)) & (measures.wide_letters < _WIDE_SCRIPT)


def _no_stop_words(measures: TextMeasures) -> Bools:
    suspects = (measures.num_distinct(_stop_word_hashes()) < 2) & (measures.ascii_letters >= _ASCII_SCRIPT)
    for index in np.flatnonzero(suspects).tolist():
        language, _ = identify(measures.texts[index])
        suspects[index] = language == "en"
    return suspects


@functools.cache
def _stop_word_hashes() -> UInt64s:
    return WordTable.of(STOP_WORDS).hashes


QUALITY_RULES = (
    Rule("gopher_word_count", lambda m: (m.num_words < 50) | (m.num_words > 100_000)),
    Rule("gopher_word_length", _odd_word_length),
    Rule("gopher_hashes", lambda m: m.hashes_per_word > 0.1),
    Rule("gopher_ellipses", lambda m: m.ellipses_per_word > 0.1),
    Rule("gopher_bullet_lines", lambda m: m.lines["bullets"] > 0.9),
    Rule("gopher_ellipsis_lines", lambda m: m.lines["ellipses"] > 0.3),
    Rule("gopher_no_letters", lambda m: m.alphabetic_tokens < 0.8),
    Rule("gopher_stop_words", _no_stop_words),
)


def _line_rule(name: str, most: float) -> Rule:
    return Rule(f"gopher_{name}", lambda m: m.lines[name] > most)


def _ngram_rule(n: int, most: float) -> Rule:
    return Rule(f"gopher_{'frequent' if n <= 4 else 'repeated'}_{n}grams", lambda m: m.ngrams[n] > most)


REPETITION_RULES = (
    _line_rule("repeated_lines", 0.30),
    _line_rule("repeated_paragraphs", 0.30),
    _line_rule("repeated_line_chars", 0.20),
    _line_rule("repeated_paragraph_chars", 0.20),
    _ngram_rule(2, 0.20),
    _ngram_rule(3, 0.18),
    _ngram_rule(4, 0.16),
    _ngram_rule(5, 0.15),
    _ngram_rule(6, 0.14),
    _ngram_rule(7, 0.13),
    _ngram_rule(8, 0.12),
    _ngram_rule(9, 0.11),
    _ngram_rule(10, 0.10),
)
