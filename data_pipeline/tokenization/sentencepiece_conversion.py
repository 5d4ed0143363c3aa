"""A SentencePiece model (tokenizer.model) written as the tokenizer.json of exactly the same tokenizer.

What trains on our ids later reads text through transformers, which opens tokenizer.json. Both must be one tokenizer,
so the converted file is the tokenizer, here too, and `verify_conversion` compares it with `sentencepiece` itself.

SentencePiece writes a space as `▁` (U+2581) in its pieces, so a `▁` of the text comes back as a space: the one
character that it cannot tell, with every model.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from numpy.typing import NDArray
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made on import
from tokenizers import AddedToken, Regex, decoders, models, normalizers

SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
CONTROL_CHARS = frozenset("<s></s><unk><0x0123456789ABCDEF>")
"""What the names of control and byte pieces are spelled with."""


class ConversionError(ValueError):
    """The model cannot be written as a tokenizer.json of the same tokenizer; one line says why."""


def convert_sentencepiece(content: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.model's bytes.

    Raises:
        ConversionError: it is no SentencePiece model, or of a kind that has no exact counterpart.
    """
    try:
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ConversionError("it is not a SentencePiece model") from error
    proto = ModelProto.FromString(content)
    _check_supported(proto)
    backend = tokenizers.Tokenizer(_unigram(proto) if proto.trainer_spec.model_type == _UNIGRAM else _bpe(proto))
    backend.normalizer = normalizers.Sequence(_normalizers(proto))
    backend.decoder = decoders.Sequence(_decoders(proto))
    backend.add_special_tokens(
        [AddedToken(p.piece, special=True, normalized=False) for p in proto.pieces if p.type in (_CONTROL, _UNKNOWN)]
    )
    return backend


def verify_conversion(content: bytes, backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Compare with `sentencepiece` itself.

    Raises:
        ConversionError: some text gets other ids (for a unigram model: ids that are less, or more, probable).
    """
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    score = _scores_of(content)
    backend.encode_special_tokens = True
    for text in texts:
        expected: Sequence[int] = reference.encode(text)
        ids = backend.encode(text, add_special_tokens=False).ids
        if ids != expected and not (score is not None and np.isclose(score[ids].sum(), score[expected].sum(), 1e-5)):
            raise ConversionError(f"tokenizer.json would give other ids for {text[:80]!r}")


def _scores_of(content: bytes) -> NDArray[np.float64] | None:
    """Log-probabilities of a unigram model's pieces, `[vocab]`; None for BPE, where every choice has a strict order.

    Of several best ways to cut a text `sentencepiece` finds another one than `tokenizers`, and it adds in float32:
    on a hundred kilobytes of code, a cut or two differs.
    """
    proto = ModelProto.FromString(content)
    if proto.trainer_spec.model_type == _BPE:
        return None
    return np.array([piece.score for piece in proto.pieces], dtype=np.float64)


def _check_supported(proto: Any) -> None:
    if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise ConversionError("it is neither a BPE nor a unigram model")
    if not proto.trainer_spec.byte_fallback:
        raise ConversionError("it has no byte fallback, so some text would be lost; train one with byte_fallback")
    if any(piece.type in (_USER_DEFINED, _UNUSED) for piece in proto.pieces):
        raise ConversionError("it has user-defined or unused pieces; save it as tokenizer.json with transformers")
    if proto.normalizer_spec.precompiled_charsmap:
        raise ConversionError("it normalizes text by a table, which `tokenizers` applies in another way")
    if proto.trainer_spec.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise ConversionError("it marks spaces in another way than by a leading ▁")


def _bpe(proto: Any) -> models.BPE:
    """Every way to make a piece of two others is a merge, the piece with the best score first.

    SentencePiece joins by the score of what comes out, the leftmost first. In `tokenizers` each merge has a rank of
    its own; those of one piece follow each other.
    """
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    normal = {piece.piece for piece in proto.pieces if piece.type == _NORMAL}
    by_score = sorted((p for p in proto.pieces if p.type == _NORMAL), key=lambda p: -p.score)  # stable: by id
    merges = [
        (p.piece[:cut], p.piece[cut:])
        for p in by_score
        for cut in range(1, len(p.piece))
        if p.piece[:cut] in normal and p.piece[cut:] in normal
    ]
    return models.BPE(vocab=ids, merges=merges, unk_token=_unknown(proto), fuse_unk=True, byte_fallback=True)


def _unigram(proto: Any) -> models.Unigram:
    """Scores as they are, but for what is no text: `tokenizers` would take a literal `<0x41>` of a text for the byte.

    Those get a score below any way to write them with other pieces, so there must be one. Unknown characters then
    cost more than in SentencePiece, which changes nothing where no piece holds one.
    """
    normal = {piece.piece for piece in proto.pieces if piece.type == _NORMAL}
    if not set("".join(normal)) | CONTROL_CHARS <= normal:
        raise ConversionError("it lacks pieces for single characters that it needs")
    least = min(piece.score for piece in proto.pieces if piece.type == _NORMAL)
    never = least * (max(len(piece.piece) for piece in proto.pieces if piece.type != _NORMAL) + 1)
    scores = [(piece.piece, piece.score if piece.type == _NORMAL else never) for piece in proto.pieces]
    unknown_id = next(index for index, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    return models.Unigram(scores, unk_id=unknown_id, byte_fallback=True)


def _normalizers(proto: Any) -> list[Any]:
    steps: list[Any] = []
    if proto.normalizer_spec.remove_extra_whitespaces:  # of which it also takes a literal sign at the end
        steps += [normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _decoders(proto: Any) -> list[Any]:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return [*steps, decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else steps


def _unknown(proto: Any) -> str:
    return next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
