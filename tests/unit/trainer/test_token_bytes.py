"""Bytes that tokens spell add up to those of the text, whatever the kind of tokenizer."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings

from data_pipeline.tokenization import Tokenizer, install_tokenizer, train_tokenizer
from data_pipeline.tokenization.adversarial import ADVERSARIAL_TEXTS
from trainer.data.prepared import PreparedFolder
from trainer.data.token_bytes import bytes_per_token, token_bytes
from trainer.data_config import TokenizerConfig
from unit.data_pipeline.tokenizer_texts import ANY_TEXT, TEXTS

VOCAB_SIZES = {"bpe": 320, "sentencepiece_bpe": 480, "sentencepiece_unigram": 345}
SPACE = "▁"


def prepared(path: Path, end_of_text_id: int | None = None) -> PreparedFolder:
    return PreparedFolder(path, {"text": path / "text"}, end_of_text_id=end_of_text_id)


@pytest.fixture(scope="module", params=VOCAB_SIZES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedFolder:
    path = tmp_path_factory.mktemp(request.param)
    train_tokenizer(TEXTS, TokenizerConfig(kind=request.param), VOCAB_SIZES[request.param], path / "tokenizer", 32)
    return prepared(path)


@pytest.fixture(scope="module")
def tokenizer(folder: PreparedFolder) -> Tokenizer:
    return Tokenizer.load(folder.path / "tokenizer", engine="reference")


@pytest.fixture(scope="module")
def lengths(folder: PreparedFolder) -> np.ndarray:
    found = token_bytes(folder)
    assert found is not None
    return found


@settings(deadline=None, derandomize=True, max_examples=50)
@given(ANY_TEXT.filter(lambda text: SPACE not in text))
def test_the_tokens_of_any_text_spell_its_bytes(tokenizer: Tokenizer, lengths: np.ndarray, text: str) -> None:
    assert lengths[tokenizer.encode_batch([text]).ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", [text for text in ADVERSARIAL_TEXTS if SPACE not in text], ids=lambda text: text[:8])
def test_the_tokens_of_difficult_texts_spell_their_bytes(tokenizer: Tokenizer, lengths: np.ndarray, text: str) -> None:
    assert lengths[tokenizer.encode_batch([text]).ids].sum() == len(text.encode())


def test_every_token_has_its_bytes_and_control_tokens_have_none(tokenizer: Tokenizer, lengths: np.ndarray) -> None:
    assert len(lengths) == tokenizer.vocab_size and lengths[tokenizer.end_of_text_id] == 0
    assert (lengths == 0).sum() == len(tokenizer.control_tokens)


def with_dummy_prefix() -> bytes:
    """A SentencePiece model that sets a space before each text, as its trainer makes it unless told."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("text", ["the dog", " sleeps", "東京 🙂"])
def test_a_space_set_before_a_text_is_a_byte_more(text: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.model").write_bytes(with_dummy_prefix())
    install_tokenizer(tmp_path / "source", tmp_path / "tokenizer", 32)
    lengths = token_bytes(prepared(tmp_path))
    assert lengths is not None
    ids = Tokenizer.load(tmp_path / "tokenizer", engine="reference").encode_batch([text]).ids
    assert lengths[ids].sum() == 1 + len(text.encode())


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The content of a tokenizer.json, changed."""
    content = orjson.loads((path / "tokenizer" / "tokenizer.json").read_bytes())
    change(content)
    return content


def test_added_tokens_that_are_text_spell_themselves(folder: PreparedFolder) -> None:
    """As some tokenizers have runs of spaces."""
    path = folder.path / "tokenizer" / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_tokens([tokenizers.AddedToken("   ", normalized=False), tokenizers.AddedToken("ü=", normalized=False)])
    backend.add_special_tokens(["<|pad|>"])
    lengths, number = bytes_per_token(orjson.loads(backend.to_str())), backend.token_to_id
    assert lengths is not None
    text = "a   b ü= c"
    ids = backend.encode(text, add_special_tokens=False).ids
    assert {number("   "), number("ü=")} <= set(ids)
    assert lengths[ids].sum() == len(text.encode())
    assert lengths[number("<|pad|>")] == 0


def test_an_end_of_text_token_that_is_not_marked_as_special_spells_nothing(folder: PreparedFolder) -> None:
    def unmark(content: dict[str, Any]) -> None:
        content["added_tokens"] = []

    content = changed(folder.path, unmark)
    (folder.path / "plain" / "tokenizer").mkdir(parents=True)
    (folder.path / "plain" / "tokenizer" / "tokenizer.json").write_bytes(orjson.dumps(content))
    for end_of_text_id in (0, 2):
        lengths = token_bytes(prepared(folder.path / "plain", end_of_text_id))
        assert lengths is not None and lengths[end_of_text_id] == 0 and (lengths == 0).sum() == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(decoder=None),
        lambda content: content.update(decoder={"type": "WordPiece", "prefix": "##"}),
        lambda content: content["model"].update(end_of_word_suffix="</w>"),
        lambda content: content["model"].update(continuing_subword_prefix="##"),
    ],
)
def test_of_other_kinds_nothing_is_said(folder: PreparedFolder, change: Callable[[dict[str, Any]], Any]) -> None:
    assert bytes_per_token(changed(folder.path, change)) is None


def test_a_model_that_loses_characters_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    model = tokenizers.models.Unigram([("<unk>", 0.0), (SPACE, -1.0), ("a", -2.0)], unk_id=0, byte_fallback=False)
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.Metaspace()
    assert bytes_per_token(orjson.loads(backend.to_str())) is None


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b'{"model": {"vocab": 3}}', b"\xff", b"null"])
def test_a_folder_without_a_tokenizer_says_nothing(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer").mkdir()
        (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(content)
    assert token_bytes(prepared(tmp_path)) is None
