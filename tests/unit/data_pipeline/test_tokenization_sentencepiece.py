"""SentencePiece models lose no text, and are the same tokenizer in `sentencepiece`, in transformers and here."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.tokenization import Tokenizer, check_tokenizer, install_tokenizer, train_tokenizer
from data_pipeline.tokenization.adversarial import ADVERSARIAL_TEXTS
from data_pipeline.tokenization.sentencepiece_conversion import CONTROL_CHARS, SPACE
from data_pipeline.tokenization.sentencepiece_training import sentences
from trainer.config import UserError
from trainer.data_config import TokenizerConfig
from unit.data_pipeline.tokenizer_texts import ANY_TEXT, TEXTS

VOCAB_SIZES = {"sentencepiece_bpe": 480, "sentencepiece_unigram": 345}  # near what the texts allow
SEQ_LENGTH = 32
SP_TEXT = ANY_TEXT.filter(lambda text: SPACE not in text)
NO_CONTROL = SP_TEXT.filter(lambda text: not any(token in text for token in ("<s>", "</s>", "<unk>")))


@pytest.fixture(scope="module", params=VOCAB_SIZES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / request.param
    train_tokenizer(TEXTS, TokenizerConfig(kind=request.param), VOCAB_SIZES[request.param], folder, SEQ_LENGTH)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module", params=[None, "gpt2", "llama", "gpt_neo"])
def in_transformers(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> transformers.PreTrainedTokenizerBase:
    """The folder, alone and beside the configuration of the models that we export."""
    if request.param is None:
        return transformers.AutoTokenizer.from_pretrained(folder)
    beside = tmp_path_factory.mktemp("beside")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (beside / name).write_bytes((folder / name).read_bytes())
    transformers.AutoConfig.for_model(request.param, vocab_size=VOCAB_SIZES[folder.name]).save_pretrained(beside)
    return transformers.AutoTokenizer.from_pretrained(beside)


@given(SP_TEXT)
def test_any_text_comes_back_and_never_holds_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_batch([text]).ids
    assert tokenizer.decode(ids) == text
    assert not (ids < 3).any(), "<unk>, <s>, </s>"


@pytest.mark.parametrize("text", [text for text in ADVERSARIAL_TEXTS if SPACE not in text], ids=lambda text: text[:8])
def test_difficult_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode_batch([text]).ids) == text


def test_the_one_character_that_does_not_come_back_is_the_sign_for_a_space(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_batch([f"a{SPACE}b"]).ids) == "a b"


@given(NO_CONTROL)
def test_transformers_encodes_and_decodes_as_we_do(
    tokenizer: Tokenizer, in_transformers: transformers.PreTrainedTokenizerBase, text: str
) -> None:
    ids = in_transformers(text, verbose=False)["input_ids"]
    assert ids == tokenizer.encode_batch([text]).ids.tolist()
    assert in_transformers.decode(ids) == text


def test_transformers_knows_the_control_tokens(
    folder: Path, tokenizer: Tokenizer, in_transformers: transformers.PreTrainedTokenizerBase
) -> None:
    theirs = in_transformers
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token) == ("<s>", "</s>", "<unk>")
    assert theirs.eos_token_id == tokenizer.end_of_text_id == 2
    assert len(theirs) == tokenizer.vocab_size == VOCAB_SIZES[folder.name]
    assert theirs.model_max_length == SEQ_LENGTH
    assert theirs("</s>")["input_ids"] == [2], "at inference the literal is the token"


@given(SP_TEXT)
def test_sentencepiece_gives_the_same_ids(
    tokenizer: Tokenizer, reference: sentencepiece.SentencePieceProcessor, folder: Path, text: str
) -> None:
    ids, expected = tokenizer.encode_batch([text]).ids.tolist(), reference.encode(text)
    if ids != expected:
        assert folder.name == "sentencepiece_unigram", "only a unigram model has several best ways to cut a text"
        assert score(reference, ids) == pytest.approx(score(reference, expected), rel=1e-5)
        assert reference.decode(ids) == text


def score(model: sentencepiece.SentencePieceProcessor, ids: list[int]) -> float:
    return sum(model.get_score(token) for token in ids)


def test_control_tokens_are_those_of_the_model(tokenizer: Tokenizer) -> None:
    assert tokenizer.control_tokens == ("</s>", "<s>", "<unk>")
    assert tokenizer.end_of_text == "</s>"


def test_the_fast_encoder_is_taken_for_bpe(tokenizer: Tokenizer, folder: Path) -> None:
    if folder.name == "sentencepiece_bpe":
        assert tokenizer.engine_name.startswith("gigatoken")
    else:
        assert tokenizer.fallback is not None
        assert "Unigram" in tokenizer.fallback.reason


@given(st.lists(ANY_TEXT, max_size=4))
def test_the_fast_encoder_gives_the_same_ids(tokenizer: Tokenizer, texts: list[str]) -> None:
    if tokenizer.fast is not None:
        fast, reference = tokenizer.fast.encode_batch(texts), tokenizer.encode_batch(texts)
        assert fast.ids.tolist() == reference.ids.tolist()
        assert fast.lengths.tolist() == reference.lengths.tolist()


def test_training_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, TokenizerConfig(kind=folder.name), VOCAB_SIZES[folder.name], tmp_path, SEQ_LENGTH)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_model_alone_is_installed_as_the_same_tokenizer(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    given_folder = tmp_path / "given"
    given_folder.mkdir()
    (given_folder / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    check_tokenizer(given_folder, tokenizer.vocab_size)
    assert Tokenizer.load(given_folder, engine="reference").fingerprint == tokenizer.fingerprint
    install_tokenizer(given_folder, tmp_path / "installed", SEQ_LENGTH)
    for path in folder.iterdir():
        assert (tmp_path / "installed" / path.name).read_bytes() == path.read_bytes()


def save_model(folder: Path, **options: Any) -> None:
    model = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 345, "byte_fallback": True, "minloglevel": 2} | options
    settings.setdefault("normalization_rule_name", "identity")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **settings)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_models_that_trim_spaces_as_llamas_does_are_used_as_they_are(model_type: str, tmp_path: Path) -> None:
    required = "".join(sorted(CONTROL_CHARS))
    save_model(tmp_path, model_type=model_type, normalization_rule_name="identity", required_chars=required)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer.load(tmp_path, engine="reference")
    for text in ("  the  quick ", "dog \n dog\n", " ", "", "dog</s><0x41>"):
        ids = tokenizer.encode_batch([text]).ids
        assert ids.tolist() == model.encode(text)
        assert tokenizer.decode(ids) == model.decode(ids.tolist())


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"byte_fallback": False, "vocab_size": 90}, "no byte fallback"),
        ({"user_defined_symbols": ["<sep>"]}, "user-defined"),
        ({"model_type": "char", "hard_vocab_limit": False}, "neither a BPE nor a unigram model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text by a table"),
        ({"model_type": "unigram"}, "lacks pieces for single characters"),
        ({"treat_whitespace_as_suffix": True}, "marks spaces in another way"),
    ],
)
def test_models_without_an_exact_counterpart_are_refused(options: dict[str, Any], rule: str, tmp_path: Path) -> None:
    save_model(tmp_path, **options)
    with pytest.raises(UserError, match=rf"tokenizer\.model cannot be used: .*{rule}"):
        check_tokenizer(tmp_path, 400)


def test_a_vocabulary_smaller_than_the_characters_is_refused_with_the_size_that_works(tmp_path: Path) -> None:
    config = TokenizerConfig(kind="sentencepiece_bpe")
    with pytest.raises(UserError, match=r"model.vocab_size 261 is less than the (\d+) .* set it to \1") as refusal:
        train_tokenizer(TEXTS, config, 261, tmp_path, SEQ_LENGTH)
    least = int(str(refusal.value).split("set it to ")[1].split()[0])
    train_tokenizer(TEXTS, config, least, tmp_path, SEQ_LENGTH)


def test_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no text to train the tokenizer on"):
        train_tokenizer([], TokenizerConfig(kind="sentencepiece_bpe"), 400, tmp_path, SEQ_LENGTH)


def test_an_error_of_the_texts_comes_through(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield TEXTS[0]
        raise UserError("the disk is gone")

    with pytest.raises(UserError, match="the disk is gone"):
        train_tokenizer(texts(), TokenizerConfig(kind="sentencepiece_bpe"), 400, tmp_path, SEQ_LENGTH)


@given(st.lists(ANY_TEXT | st.just("x" * 1500) | st.just(" word" * 300), max_size=6).map("".join))
def test_long_texts_are_cut_for_the_trainer_without_losing_any(text: str) -> None:
    pieces = list(sentences(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 1000 for piece in pieces)


def test_what_stands_late_in_a_long_text_is_learned(tmp_path: Path) -> None:
    text = "ab " * 3000 + "unmistakable " * 100
    train_tokenizer([text], TokenizerConfig(kind="sentencepiece_bpe"), 310, tmp_path, SEQ_LENGTH)
    assert len(Tokenizer.load(tmp_path).encode_batch([" unmistakable"]).ids) == 1
