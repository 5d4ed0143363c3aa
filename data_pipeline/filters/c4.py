"""The rules of C4 (Raffel et al. 2020, section 2.2).

C4 edits lines and drops pages. Here:

- Lines about JavaScript, cookies and policies are cut, as there: they are the site's, not the text's.
- Lines that do not end in punctuation, or have fewer than five words, are cut by C4 but stay here, for they include
  headings, lists and verse; they only do not count as sentences.
- Pages with "lorem ipsum", with a curly bracket, or with fewer than three sentences are dropped, as there. The bracket
  stands for source code: leave this set of rules out where code is wanted.

Not here: the list of obscene words (it removes texts about minorities and medicine: Dodge et al. 2021), spans that
repeat (see deduplication), and the language (see `language`).
"""

import re

import numpy as np

from data_pipeline.filters.measures import Bools, Rule, TextMeasures

_BOILERPLATE = (
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_LEAST_SENTENCES = 3
_LEAST_LINE_WORDS = 5
_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？", "।", "؟", "۔")  # noqa: RUF001
_CLOSING = "\"'”’»」』)"  # noqa: RUF001
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff]")  # kana and Chinese characters: a word each
_SENTENCE_END = re.compile(f"(?:[{''.join(_SENTENCE_ENDS[:3])}؟۔।]+[{_CLOSING}]*(?=\\s|$))|[。！？]+")  # noqa: RUF001


def cut_boilerplate_lines(text: str) -> tuple[str, int]:
    """The text without the lines that C4 takes for the site's own, and how many they were."""
    lowered = text.lower()
    if not any(phrase in lowered for phrase in _BOILERPLATE):
        return text, 0
    lines = text.split("\n")
    kept = [line for line in lines if not _is_boilerplate(line.lower())]
    return "\n".join(kept), len(lines) - len(kept)


def _is_boilerplate(lowered_line: str) -> bool:
    return any(phrase in lowered_line for phrase in _BOILERPLATE)


def has_sentences(text: str, least: int = _LEAST_SENTENCES) -> bool:
    """Whether lines of five words and more that end in punctuation hold so many sentences."""
    num_sentences = 0
    for line in text.split("\n"):
        if line.rstrip().rstrip(_CLOSING).endswith(_SENTENCE_ENDS) and _has_words(line):
            num_sentences += len(_SENTENCE_END.findall(line))
            if num_sentences >= least:
                return True
    return False


def _has_words(line: str) -> bool:
    return len(line.split()) + len(_UNSPACED.findall(line)) >= _LEAST_LINE_WORDS


def _few_sentences(measures: TextMeasures) -> Bools:
    return np.array([not has_sentences(text) for text in measures.texts], bool)


def _lorem_ipsum(measures: TextMeasures) -> Bools:
    return np.array(["lorem ipsum" in text.lower() for text in measures.texts], bool)


def _curly_bracket(measures: TextMeasures) -> Bools:
    return np.array(["{" in text for text in measures.texts], bool)


RULES = (
    Rule("c4_lorem_ipsum", _lorem_ipsum),
    Rule("c4_curly_bracket", _curly_bracket),
    Rule("c4_few_sentences", _few_sentences),
)
