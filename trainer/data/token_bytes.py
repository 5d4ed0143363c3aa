"""How many bytes of text a token spells, read off the tokenizer.json of prepared data.

Over the tokens of a document the bytes add up to those of its text in UTF-8, for the two kinds of tokenizer that lose
nothing: byte-level ones (GPT-2's), and SentencePiece's with bytes for what no piece holds. Three things they count
otherwise than the text has them: a space that the tokenizer sets before each text is a byte more, what it normalizes
away counts as it is afterwards, and of SentencePiece a literal `▁`, which is its sign for a space, is one byte.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orjson

from trainer.data.prepared import PreparedFolder

_SPACE = "▁"  # as SentencePiece spells it
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(folder: PreparedFolder) -> np.ndarray | None:
    """Bytes by token id, int64; 0 for tokens that stand for no text, like the end of one.

    None where the folder has no tokenizer, or one whose tokens do not say it: nothing but a measure depends on it.
    """
    try:
        found = bytes_per_token(orjson.loads((folder.path / "tokenizer" / "tokenizer.json").read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    if found is not None and folder.end_of_text_id is not None:
        found[folder.end_of_text_id] = 0
    return found


def bytes_per_token(tokenizer: Mapping[str, Any]) -> np.ndarray | None:
    """As `token_bytes`, of the content of a tokenizer.json; special tokens stand for no text."""
    model, num_bytes = tokenizer["model"], _spelling(tokenizer)
    if num_bytes is None:
        return None
    vocab = model["vocab"]
    ids = vocab if isinstance(vocab, dict) else {piece: number for number, (piece, _) in enumerate(vocab)}
    added = tokenizer.get("added_tokens") or []
    found = np.zeros(1 + max(*ids.values(), *(token["id"] for token in added)), dtype=np.int64)
    for token, number in ids.items():
        found[number] = num_bytes(token)
    for token in added:
        found[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    return found


def _spelling(tokenizer: Mapping[str, Any]) -> Callable[[str], int] | None:
    """Bytes of a token as the vocabulary spells it; None for a kind that cannot be told."""
    model, decoder = tokenizer["model"], tokenizer.get("decoder") or {"type": "none"}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if "ByteLevel" in steps:
        return len  # each character is the sign of a byte
    is_space_spelled = "Metaspace" in steps or steps.get("Replace", {}).get("pattern") == {"String": _SPACE}
    return _piece_bytes if model.get("byte_fallback") and "ByteFallback" in steps and is_space_spelled else None


def _piece_bytes(piece: str) -> int:
    return 1 if _BYTE.fullmatch(piece) else len(piece.replace(_SPACE, " ").encode())
