"""Pure functions that turn whatever bytes and strings a source holds into clean text.

Clean text is valid Unicode (no lone surrogates) in composed form (NFC) and never spells the control token, so that
no document can end itself, or start another, from inside its text.
"""

import unicodedata

from data_pipeline.tally import RepairReason

END_OF_TEXT = "<|endoftext|>"
_HARMLESS = "<| endoftext |>"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_BROKEN_FRACTION = 0.01  # above this the text is in another encoding (Latin-1 German has about 5 %), not damaged


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


def neutralize_control_token(text: str) -> tuple[str, int]:
    """Set a space inside every literal control token; returns the text and how many there were."""
    count = text.count(END_OF_TEXT)
    return (text.replace(END_OF_TEXT, _HARMLESS), count) if count else (text, 0)


def normalize(text: str) -> tuple[str, dict[RepairReason, int]]:
    """Clean text, and what had to be repaired to get it. Idempotent."""
    repairs: dict[RepairReason, int] = {}
    valid = repair_surrogates(text)
    if valid != text:
        repairs["lone_surrogates"] = 1
    composed = unicodedata.normalize("NFC", valid)
    if composed != valid:
        repairs["not_nfc"] = 1
    clean, num_tokens = neutralize_control_token(composed)
    if num_tokens:
        repairs["control_token"] = num_tokens
    return clean, repairs
