"""Byte-level BPE, and what holds for every tokenizer's folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
import tokenizers
import transformers
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.tokenization import (
    END_OF_TEXT,
    Tokenizer,
    check_tokenizer,
    check_vocab_size,
    install_tokenizer,
    train_tokenizer,
)
from data_pipeline.tokenization.adversarial import ADVERSARIAL_TEXTS
from trainer.config import UserError
from trainer.data_config import TokenizerConfig
from unit.data_pipeline.tokenizer_texts import ANY_TEXT, TEXTS

VOCAB_SIZE = 320
SEQ_LENGTH = 32
BPE = TokenizerConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    train_tokenizer(TEXTS, BPE, VOCAB_SIZE, folder, SEQ_LENGTH)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@given(st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_any_text_comes_back_and_never_holds_the_control_token(tokenizer: Tokenizer, texts: list[str]) -> None:
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch.documents()] == texts
    assert not (batch.ids == tokenizer.end_of_text_id).any()


@given(ANY_TEXT.filter(lambda text: END_OF_TEXT not in text))
def test_transformers_encodes_and_decodes_as_we_do(tokenizer: Tokenizer, folder: Path, text: str) -> None:
    theirs = opened(folder)
    ids = theirs(text, verbose=False)["input_ids"]
    assert ids == tokenizer.encode_batch([text]).ids.tolist()
    assert theirs.decode(ids) == text


def opened(folder: Path) -> transformers.PreTrainedTokenizerBase:
    if folder not in _opened:
        _opened[folder] = transformers.AutoTokenizer.from_pretrained(folder)
    return _opened[folder]


_opened: dict[Path, transformers.PreTrainedTokenizerBase] = {}


def test_the_folder_opens_in_transformers_with_its_settings(folder: Path, tokenizer: Tokenizer) -> None:
    theirs = opened(folder)
    assert len(theirs) == theirs.vocab_size == VOCAB_SIZE
    assert theirs.eos_token == theirs.bos_token == theirs.unk_token == END_OF_TEXT
    assert theirs.eos_token_id == tokenizer.end_of_text_id
    assert theirs.model_max_length == SEQ_LENGTH
    assert theirs(END_OF_TEXT)["input_ids"] == [tokenizer.end_of_text_id], "at inference the literal is the token"


def test_the_folder_opens_beside_a_gpt2_model(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    transformers.GPT2Config(vocab_size=VOCAB_SIZE).save_pretrained(tmp_path)
    text = f"the dog  naïve {END_OF_TEXT} 🙂"
    beside_model = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert beside_model(text)["input_ids"] == opened(folder)(text)["input_ids"]


def test_the_vocabulary_is_exactly_what_was_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.control_tokens == (END_OF_TEXT,)
    batch = tokenizer.encode_batch(["the", "", "dog"])
    assert batch.ids.dtype == np.uint16
    assert batch.lengths.dtype == np.int32
    assert len(batch.documents()) == 3
    assert batch.lengths[1] == 0


def test_no_text_is_no_tokens(tokenizer: Tokenizer) -> None:
    for threads in (1, 2):
        batch = tokenizer.encode_batch([], threads)
        assert len(batch) == len(batch.ids) == 0
        assert batch.documents() == []


def test_fingerprint_is_that_of_the_file(tokenizer: Tokenizer, folder: Path) -> None:
    assert tokenizer.fingerprint == xxhash.xxh3_128(folder.joinpath("tokenizer.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("threads", ["1", "4"])
def test_training_gives_the_same_bytes_with_any_number_of_threads(threads: str, folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import orjson; from data_pipeline.tokenization.bpe import train_bpe\n"
        f"train_bpe(orjson.loads(sys.stdin.buffer.read()), {VOCAB_SIZE}, Path(sys.argv[1]), {SEQ_LENGTH})"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        input=orjson.dumps(TEXTS),
        env=os.environ | {"RAYON_NUM_THREADS": threads},
        check=True,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("threads", [2, 5])
def test_encoding_gives_the_same_ids_with_any_number_of_threads(threads: int, tokenizer: Tokenizer) -> None:
    texts = [*TEXTS, *ADVERSARIAL_TEXTS]
    one, many = tokenizer.encode_batch(texts), tokenizer.encode_batch(texts, threads)
    assert np.array_equal(one.ids, many.ids)
    assert np.array_equal(one.lengths, many.lengths)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece_bpe", "sentencepiece_unigram"])
def test_a_vocabulary_larger_than_the_text_allows_is_refused_with_the_size_that_works(
    kind: str, tmp_path: Path
) -> None:
    texts, config = ["ab ab ab"] * 9, TokenizerConfig(kind=kind)
    with pytest.raises(
        UserError, match=r"model.vocab_size 9000 is more than the (\d+) tokens .* set it to \1"
    ) as refusal:
        train_tokenizer(texts, config, 9000, tmp_path / "refused", SEQ_LENGTH)
    assert not (tmp_path / "refused").exists()
    allowed = int(str(refusal.value).split("set it to ")[1].split()[0])
    train_tokenizer(texts, config, allowed, tmp_path / "allowed", SEQ_LENGTH)
    assert Tokenizer.load(tmp_path / "allowed").vocab_size == allowed


@pytest.mark.parametrize(("kind", "least"), [("bpe", 257), ("sentencepiece_bpe", 260)])
def test_a_vocabulary_below_the_bytes_is_refused(kind: str, least: int, tmp_path: Path) -> None:
    config = TokenizerConfig(kind=kind)
    for refuse in (
        lambda: train_tokenizer(TEXTS, config, least - 1, tmp_path, SEQ_LENGTH),
        lambda: check_vocab_size(least - 1, config),
    ):
        with pytest.raises(UserError, match=f"model.vocab_size {least - 1} is less than the {least}"):
            refuse()
    check_vocab_size(least, config)


def test_an_existing_tokenizer_is_installed_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    check_tokenizer(folder, VOCAB_SIZE)
    install_tokenizer(folder, tmp_path / "copy", 64)
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert opened(tmp_path / "copy").model_max_length == 64


def test_padding_truncation_and_extra_special_tokens_of_an_existing_tokenizer_do_not_touch_the_corpus(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.add_special_tokens(["<|user|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    theirs = Tokenizer.load(tmp_path)
    assert theirs.vocab_size == VOCAB_SIZE + 1
    assert theirs.control_tokens == (END_OF_TEXT, "<|user|>")
    assert theirs.fast is not None
    texts = ["the quick brown fox jumps", "a <|user|> speaks", ""]
    expected = tokenizer.encode_batch(texts)
    for batch in (theirs.encode_batch(texts), theirs.fast.encode_batch(texts)):
        assert batch.ids.tolist() == expected.ids.tolist()
        assert batch.lengths.tolist() == expected.lengths.tolist()


def save_missing(folder: Path) -> None:
    pass


def save_broken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {}}', encoding="utf-8")


def save_without_end_of_text(folder: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(folder / "tokenizer.json"))


def save_too_large(folder: Path) -> None:
    train_tokenizer(TEXTS, BPE, VOCAB_SIZE + 1, folder, SEQ_LENGTH)


def save_broken_model(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"nothing of the sort")


@pytest.mark.parametrize(
    ("save", "rule"),
    [
        (save_missing, "cannot be read (No such file or directory); name a folder that holds tokenizer.json"),
        (save_broken, "is not a tokenizer"),
        (save_without_end_of_text, f"has no {END_OF_TEXT} or </s> token"),
        (save_too_large, f"has {VOCAB_SIZE + 1} tokens and model.vocab_size is {VOCAB_SIZE}"),
        (save_broken_model, "it is not a SentencePiece model"),
    ],
)
def test_unusable_tokenizers_are_refused(save: Callable[[Path], None], rule: str, tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(UserError) as refusal:
        check_tokenizer(tmp_path, VOCAB_SIZE)
    assert rule in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_that_makes_the_control_token_of_unknown_text_is_refused(tmp_path: Path) -> None:
    words = tokenizers.models.WordLevel({END_OF_TEXT: 0, "known": 1}, unk_token=END_OF_TEXT)
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path, engine="reference")
    assert tokenizer.encode_batch(["known"]).ids.tolist() == [1]
    with pytest.raises(UserError, match="use a byte-level tokenizer"):
        tokenizer.encode_batch(["unknown"])
    with pytest.raises(UserError, match="use a byte-level tokenizer"):
        check_tokenizer(tmp_path, VOCAB_SIZE)


@pytest.mark.parametrize(("before", "after"), [(None, "false"), ("true", "true"), ("false", "false")])
def test_threads_are_switched_off_after_use_unless_the_user_chose(
    before: str | None, after: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    tokenizer.encode_batch(["text"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == after
    train_tokenizer(TEXTS, BPE, VOCAB_SIZE, tmp_path, SEQ_LENGTH)
    assert os.environ["TOKENIZERS_PARALLELISM"] == after
