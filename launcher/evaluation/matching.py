"""Whether a text that a model wrote is the answer: exactly, or as SQuAD grades (Rajpurkar et al. 2016).

SQuAD's normal form is lower-case words, without ASCII punctuation and the articles a, an and the.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def cut_at(text: str, stops: Iterable[str]) -> str:
    """The text before the first of the stop texts."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def exact_match(text: str, answers: Iterable[str]) -> float:
    return float(any(text.strip() == answer.strip() for answer in answers))


def normalized_match(text: str, answers: Iterable[str]) -> float:
    """SQuAD's exact match. It drops signs as well: -19 matches 19."""
    return float(any(_words(text) == _words(answer) for answer in answers))


def f1(text: str, answers: Iterable[str]) -> float:
    """The best over the answers."""
    return max(_f1(_words(text), _words(answer)) for answer in answers)


def _f1(found: list[str], wanted: list[str]) -> float:
    """The harmonic mean of precision and recall, of words counted as often as they stand there."""
    if not found or not wanted:
        return float(found == wanted)
    num_shared = (Counter(found) & Counter(wanted)).total()
    return 2 * num_shared / (len(found) + len(wanted))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
