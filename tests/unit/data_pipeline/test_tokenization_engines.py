"""The fast encoder gives the reference's ids, and where a real one does not, the split is encoded again."""

from pathlib import Path

import numpy as np
import orjson
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers

from data_pipeline.shards import TokenBatch
from data_pipeline.tokenization import END_OF_TEXT, FastEngineWarning, SplitEncoder, Tokenizer, encode_split, engines
from data_pipeline.tokenization.adversarial import ADVERSARIAL_TEXTS
from data_pipeline.tokenization.agreement import EXCERPT_CHARS, FIRST_CHARS
from data_pipeline.tokenization.bpe import train_bpe
from data_pipeline.tokenization.engines import FastEngine, FastEngineError
from unit.data_pipeline.tokenizer_texts import ANY_TEXT, TEXTS

VOCAB_SIZE = 320
SEED = 7
RARE = " XQXQ"
_GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(folder: Path) -> bytes:
    """With a few tokens for `RARE`, made by the last merges."""
    train_bpe([*TEXTS, RARE * 20], VOCAB_SIZE, folder, 32)
    return (folder / "tokenizer.json").read_bytes()


def gpt2_like(folder: Path) -> bytes:
    """As GPT-2's is published: the control token last and outside of the model, merges as strings."""
    content = orjson.loads(trained(folder))
    vocab = {token: index - 1 for token, index in content["model"]["vocab"].items() if token != END_OF_TEXT}
    content["model"] |= {"vocab": vocab, "merges": [" ".join(pair) for pair in content["model"]["merges"]]}
    content["added_tokens"][0]["id"] = len(vocab)
    return orjson.dumps(content)


def gpt4_like(folder: Path) -> bytes:
    """Words cut by another rule, digits in threes; further control tokens of a chat."""
    backend = tokenizers.Tokenizer.from_buffer(trained(folder))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_GPT4_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return backend.to_str().encode()


@pytest.fixture(scope="module", params=[trained, gpt2_like, gpt4_like])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return opened(request.param(tmp_path_factory.mktemp("of")))


def opened(content: bytes) -> Tokenizer:
    tokenizer = Tokenizer(content)
    tokenizer.use_fast(content)
    return tokenizer


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return trained(tmp_path_factory.mktemp("trained"))


def without_last_merges(content: bytes) -> bytes:
    """A tokenizer that gives other ids for `RARE` and nothing else."""
    changed = orjson.loads(content)
    kept = [pair for pair in changed["model"]["merges"] if "Q" not in "".join(pair)]
    assert len(kept) < len(changed["model"]["merges"])
    changed["model"]["merges"] = kept
    return orjson.dumps(changed)


def equal(one: TokenBatch, other: TokenBatch) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.lengths, other.lengths)


@given(texts=st.lists(ANY_TEXT, max_size=5), threads=st.sampled_from([1, 2]))
def test_both_encoders_give_the_same_ids(tokenizer: Tokenizer, texts: list[str], threads: int) -> None:
    assert tokenizer.fast is not None, tokenizer.fallback
    fast = tokenizer.fast.encode_batch(texts, threads)
    assert fast.ids.dtype == np.uint16
    assert equal(fast, tokenizer.encode_batch(texts))


def test_both_encoders_give_the_same_ids_for_difficult_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer.fast is not None
    texts = [*ADVERSARIAL_TEXTS, *tokenizer.control_tokens, " ".join(ADVERSARIAL_TEXTS), RARE]
    assert equal(tokenizer.fast.encode_batch(texts), tokenizer.encode_batch(texts))
    assert equal(tokenizer.fast.encode_batch(texts, threads=3), tokenizer.encode_batch(texts))


def test_the_engine_is_named_with_its_version(content: bytes) -> None:
    assert opened(content).engine_name.startswith("gigatoken 0.")
    assert Tokenizer(content).engine_name == f"tokenizers {tokenizers.__version__}"


def test_an_encoder_of_another_vocabulary_fails_the_self_test(content: bytes, tmp_path: Path) -> None:
    train_bpe([text.upper() for text in TEXTS], VOCAB_SIZE, tmp_path, 32)
    tokenizer = Tokenizer(content)
    tokenizer.use_fast((tmp_path / "tokenizer.json").read_bytes())
    assert tokenizer.fast is None
    assert tokenizer.fallback is not None
    assert tokenizer.fallback.found_by == "self-test"
    assert tokenizer.fallback.reason.startswith("it gives other ids for '")
    assert tokenizer.engine_name.startswith("tokenizers ")


def test_a_tokenizer_that_the_fast_encoder_does_not_know_is_encoded_by_the_reference() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({END_OF_TEXT: 0, "known": 1, "?": 2}, unk_token="?"))
    backend.decoder = decoders.Fuse()
    tokenizer = opened(backend.to_str().encode())
    assert tokenizer.fallback is not None
    assert "gigatoken raises" in tokenizer.fallback.reason
    batch, record = encode_split(tokenizer, SEED, lambda encoder: encoder.encode_batch(["known", "unknown"]))
    assert batch.ids.tolist() == [1, 2]
    assert record.fallback == tokenizer.fallback
    assert record.engine.startswith("tokenizers ")


def test_a_split_is_encoded_by_the_fast_encoder_and_its_beginning_compared(content: bytes) -> None:
    tokenizer = opened(content)
    batches = [TEXTS, [], list(ADVERSARIAL_TEXTS)]
    ids, record = encode_split(tokenizer, SEED, lambda encoder: [encoder.encode_batch(texts) for texts in batches])
    assert all(equal(got, tokenizer.encode_batch(texts)) for got, texts in zip(ids, batches, strict=True))
    assert record.engine == tokenizer.engine_name
    assert record.fallback is None
    assert record.compared_documents >= len(TEXTS)
    assert FIRST_CHARS <= record.compared_chars < FIRST_CHARS + 2 * EXCERPT_CHARS


def test_the_same_documents_are_compared_however_they_are_batched(content: bytes) -> None:
    tokenizer = opened(content)
    texts = ["long " * 4000] * 2 + [f"the {i} dogs" for i in range(20_000)]
    records = {
        encode_split(tokenizer, SEED, lambda encoder, size=size: encoded(encoder, batched(texts, size)))[1]
        for size in (700, 1000, 30_000)
    }
    (record,) = records
    assert 2 < record.compared_documents < 30, "the first one, and 20,000 / 2048 others"


def batched(texts: list[str], size: int) -> list[list[str]]:
    return [texts[i : i + size] for i in range(0, len(texts), size)]


def encoded(encoder: SplitEncoder, batches: list[list[str]]) -> None:
    for texts in batches:
        encoder.encode_batch(texts)


@pytest.mark.parametrize(
    "batches",
    [
        [[TEXTS[0]] * 200, [f"{i}{RARE}" for i in range(9000)], TEXTS],
        [["x" * (FIRST_CHARS - 1)], [RARE * 2 * EXCERPT_CHARS]],
    ],
    ids=["in one of many documents", "in an excerpt"],
)
def test_a_difference_late_in_a_split_has_the_whole_split_encoded_again(
    content: bytes, batches: list[list[str]]
) -> None:
    tokenizer = Tokenizer(content)
    tokenizer.use_fast(without_last_merges(content))
    assert tokenizer.fast is not None, "it passes the self-test"
    stored: list[list[TokenBatch]] = []

    def write(encoder: SplitEncoder) -> int:
        stored.append([])
        for texts in batches:
            stored[-1].append(encoder.encode_batch(texts))
        return len(stored)

    with pytest.warns(FastEngineWarning, match="it gives other ids for .*XQXQ"):
        calls, record = encode_split(tokenizer, SEED, write)
    assert calls == len(stored) == 2
    assert len(stored[1]) == len(batches)
    assert equal(stored[1][0], tokenizer.encode_batch(batches[0]))
    assert equal(stored[1][1], tokenizer.encode_batch(batches[1]))
    assert record.engine.startswith("tokenizers ")
    assert record.fallback is not None
    assert record.fallback.found_by == "sample"


def test_an_encoder_that_fails_in_a_split_is_left(content: bytes, tmp_path: Path) -> None:
    train_bpe(TEXTS, VOCAB_SIZE + 5, tmp_path, 32)
    tokenizer = Tokenizer(content)
    tokenizer.fast = FastEngine((tmp_path / "tokenizer.json").read_bytes(), VOCAB_SIZE)
    with pytest.warns(FastEngineWarning, match="gives the id 32. of a vocabulary of 320"):
        batch, _ = encode_split(tokenizer, SEED, lambda encoder: encoder.encode_batch([*TEXTS, *ADVERSARIAL_TEXTS]))
    assert equal(batch, tokenizer.encode_batch([*TEXTS, *ADVERSARIAL_TEXTS]))


def test_what_the_fast_encoder_raises_is_an_error_of_ours(content: bytes) -> None:
    with pytest.raises(FastEngineError, match="gigatoken raises TypeError"):
        FastEngine(content, VOCAB_SIZE).encode_batch(["\ud83d"])


def test_starting_over_with_an_empty_cache_changes_nothing(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_CACHED_CHARS", 100)
    tokenizer = opened(content)
    assert tokenizer.fast is not None
    for _ in range(4):
        assert equal(tokenizer.fast.encode_batch(TEXTS), tokenizer.encode_batch(TEXTS))
