"""Pure functions that turn whatever bytes and strings a source holds into clean text.

Clean text is valid Unicode (no lone surrogates) in composed form (NFC), has no control characters but tabs and line
feeds, and never spells a control token of the tokenizer, so that no document can end itself, or start another, from
inside its text.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from data_pipeline.document import Document
from data_pipeline.tally import Tally
from trainer.section import UserError

END_OF_TEXT = "<|endoftext|>"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_BROKEN_FRACTION = 0.01  # above this the text is in another encoding (Latin-1 German has about 5 %), not damaged

_KEPT_CONTROLS = b"\t\n"
_C0_AND_DELETE = bytes(byte for byte in (*range(0x20), 0x7F) if byte not in _KEPT_CONTROLS)
_C1 = re.compile(rb"\xc2[\x80-\x9f]")  # U+0080 to U+009F in UTF-8
_LINE_ENDS = re.compile(
    "\r\n?|[\v\f\x85]"
)  # all that Unicode (UAX 14, class BK and NL) and its text files end lines by
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def decode_utf8(data: bytes) -> tuple[str, int]:
    """Text of UTF-8 bytes without a byte-order mark, and the number of broken sequences replaced by U+FFFD."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="replace")
    genuine = data.count(_REPLACEMENT.encode())
    return text, text.count(_REPLACEMENT) - genuine


def is_text(text: str, num_broken: int) -> bool:
    """Whether decoded bytes were UTF-8 text at all: no NUL, and hardly a broken sequence."""
    return "\0" not in text and num_broken <= _MAX_BROKEN_FRACTION * len(text)


def repair_surrogates(text: str) -> str:
    """Join surrogate pairs into their character and replace lone halves by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", errors="surrogatepass").decode("utf-16-le", errors="replace")
    return text


def remove_controls(text: str) -> tuple[str, int]:
    """Text whose only control characters are tabs and line feeds, and the number of characters taken out.

    Whatever ends a line (carriage return, form feed, vertical tab, next line: words on its two sides do not belong
    together) becomes a line feed and does not count. Joiners (U+200C, U+200D) and other format characters stay:
    Persian, the Indic scripts and emoji are spelled with them.
    """
    data = text.encode()  # searching bytes costs a tenth of searching characters
    if len(data.translate(None, _C0_AND_DELETE)) == len(data) and (text.isascii() or not _C1.search(data)):
        return text, 0
    return _CONTROLS.subn("", _LINE_ENDS.sub("\n", text))


class ControlTokens:
    """Sets space inside every control token that a text spells out.

    The space goes behind the first character of every place where a token begins, overlapping places included. None is
    left or made by that: a token in the result either holds no inserted space, and then it was in the text and is
    broken, or it holds a whole insertion, which is longer than any run of spaces in a token.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        """
        Raises:
            UserError: a token has no two characters, or a space at an end, so that no space inside would break it.
        """
        self._tokens = sorted(set(tokens))
        for token in self._tokens:
            if len(token) < 2 or token != token.strip(" "):
                raise UserError(
                    f"tokenizer: the control token {token!r} cannot be kept out of texts: it needs two characters and "
                    f"no space at its ends; rename it in the tokenizer"
                )
        self._first_characters = sorted({token[0] for token in self._tokens})
        self._pattern = re.compile("|".join(self._alternatives()))
        self._space = " " * (1 + max((len(run) for t in self._tokens for run in re.findall(" +", t)), default=0))

    def _alternatives(self) -> Iterable[str]:
        for first, tokens in groupby(self._tokens, key=lambda token: token[0]):
            rests = "|".join(re.escape(token[1:]) for token in tokens)
            yield f"{re.escape(first)}(?={rests})"

    def neutralize(self, text: str) -> tuple[str, int]:
        """The text without control tokens, and at how many places they stood."""
        if not any(first in text for first in self._first_characters):
            return text, 0
        return self._pattern.subn(lambda match: match[0] + self._space, text)


class Normalizer:
    """The first step of cleaning; also drops texts that are empty or nothing but white space."""

    def __init__(self, control_tokens: Sequence[str]) -> None:
        """
        Args:
            control_tokens: as the tokenizer spells them: `<|endoftext|>`, `<s>`, `</s>`, ...

        Raises:
            UserError: one of them cannot be broken by a space.
        """
        self._control_tokens = ControlTokens(control_tokens)

    def __call__(self, documents: list[Document], tally: Tally) -> list[Document]:
        kept = []
        for document in documents:
            text, repairs = self.normalize(document.text)
            for reason, count in repairs.items():
                tally.repair(reason, document.id, count)
            if not text or text.isspace():
                tally.drop("empty_text", document.id)
            else:
                kept.append(document if text is document.text else replace(document, text=text))
        return kept

    def normalize(self, text: str) -> tuple[str, dict[str, int]]:
        """Clean text, and what had to be repaired to get it. Idempotent."""
        repairs: dict[str, int] = {}
        valid = repair_surrogates(text)
        if valid != text:
            repairs["lone_surrogates"] = 1
        # before NFC: what stood on both sides of a control character may compose
        controlled, num_controls = remove_controls(valid)
        if num_controls:
            repairs["control_characters"] = num_controls
        composed = controlled
        if not unicodedata.is_normalized("NFC", controlled):
            composed = unicodedata.normalize("NFC", controlled)
            repairs["not_nfc"] = 1
        clean, num_tokens = self._control_tokens.neutralize(composed)  # after NFC, which may spell one
        if num_tokens:
            repairs["control_token"] = num_tokens
        return clean, repairs
