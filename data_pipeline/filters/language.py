"""Keeps documents of the languages that the config names."""

import difflib
import functools

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from data_pipeline.document import Document
from data_pipeline.tally import Tally
from trainer.data_config import LanguageConfig
from trainer.section import UserError

_EXCERPT_PIECES = 3
_PIECE_CHARS = 150


class LanguageFilter:
    """A step. A document stays if its most probable language is one to keep, with at least that one's probability.

    The identifier (py3langid, a naive Bayes model over byte n-grams of 140 languages) reads an excerpt only: it walks
    the text byte by byte in Python, and more text makes it no more accurate (see `excerpt`). Its probabilities are
    normalised over all languages, also those not to keep; digits and symbols alone belong to none (`zxx`).

    There is no faster first stage: resiliparse's detector, 20 times as fast, is right wherever this one is only where
    its first two guesses lie far apart (over 120), which is one document in twelve.
    """

    def __init__(self, config: LanguageConfig) -> None:
        """
        Raises:
            UserError: a language that the identifier does not know.
        """
        self._least_probability = config.keep
        if config.keep:
            for code in config.keep:
                _check_known(code, _identifier().labels)

    def __call__(self, documents: list[Document], tally: Tally) -> list[Document]:
        if not self._least_probability:
            return documents
        kept = []
        for document in documents:
            language, probability = identify(document.text)
            if probability >= self._least_probability.get(language, 2.0):
                kept.append(document)
            else:
                tally.drop("language", document.id, document.text)
        return kept


def identify(text: str) -> tuple[str, float]:
    """The most probable language of a text (ISO 639 code) and its probability."""
    language, probability = _identifier().classify(excerpt(text))
    return language, probability


def excerpt(text: str) -> str:
    """Pieces from the beginning, the middle and the end, 450 characters in all.

    On 1,560 pages of Debian's manuals in 19 languages (some left in English) 98.4 % come out as labelled,
    and 98.3 to 99.1 % for 300 to 1,000 characters from three places; but 97.2 % for the first 1,000, misled by what
    stands at the top of a page, and 97.6 % for the whole text, at a fraction of the speed.
    """
    if len(text) <= _EXCERPT_PIECES * _PIECE_CHARS:
        return text
    stride = (len(text) - _PIECE_CHARS) // (_EXCERPT_PIECES - 1)
    return "\n".join(text[piece * stride : piece * stride + _PIECE_CHARS] for piece in range(_EXCERPT_PIECES))


def _check_known(code: str, known: list[str]) -> None:
    if code not in known:
        nearest = difflib.get_close_matches(code.lower(), known, n=3, cutoff=0.0)
        raise UserError(
            f"data.language.keep: unknown language {code!r}; use an ISO 639 code such as {', '.join(nearest)} "
            f"(all: {' '.join(sorted(known))})"
        )


@functools.cache
def _identifier() -> LanguageIdentifier:
    """Loaded on first use: 30 MB, a third of a second."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
