"""The held-out loss and its parts, logits and baselines in every layout, against a plain model and plain Python."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import numpy as np
import orjson
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.shards import ShardWriter, TokenBatch, token_dtype
from ranks import run_on_ranks
from reference_gpt import ReferenceGPT
from trainer.checkpoint import sharded
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.waiting_save import save
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree
from trainer.data.batches import TrainingData, heldout_windows
from trainer.data.prepared import PreparedFolder
from trainer.data.shards import Shard
from trainer.data.windows import HeldoutReader
from trainer.engine.engine import Engine
from trainer.evaluate.heldout import HeldoutEvaluation, HeldoutResult, unigram_loss
from trainer.inference.frozen import FrozenModel
from trainer.inference.windows import window_logits
from trainer.training_state import MASTER

SEQ, VOCAB = 16, 90
WINDOWS = {"prose": 8, "code": 5}
NUM_WINDOWS = 13
# 90 tokens pad to 128 rows: with TP4 the last rank holds padding alone. 13 windows fill no whole number of batches.
MODEL = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "vocab_size": VOCAB, "seq_length": SEQ}

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2": {"tensor": 2},
    "TP4": {"tensor": 4},
    "TP2 SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "DP2 ZeRO-1": {"data": 2},
    "DP2 ZeRO-3": {"data": 2, "zero": 3},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
    "PP2 x DP2 interleaved": {"pipeline": 2, "data": 2, "virtual_pipeline": 2},
    "CP2": {"context": 2},
    "CP4": {"context": 4},
    "CP2 x TP2": {"context": 2, "tensor": 2},
    "CP2 x TP2 SP": {"context": 2, "tensor": 2, "sequence": True},
    "CP2 x PP2 interleaved": {"context": 2, "pipeline": 2, "virtual_pipeline": 2},
}
# Of which larger ones hold every part.
SLOW = {"PP2 interleaved", "CP4", "CP2 x TP2"}


def config_of(layout: str, precision: str = "fp32", max_sequences: int | None = None) -> RunConfig:
    return from_tree(
        {
            "model": MODEL,
            "train": {"global_batch_size": 8, "micro_batch_size": 2, "precision": precision},
            "parallel": LAYOUTS[layout],
            "evaluation": {"max_sequences": max_sequences},
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, train and heldout; token frequencies fall off, and differ between all of them.

    Of the 90 tokens the last ends a text, token n before it spells n % 7 + 1 bytes.
    """
    folder, draw, files = tmp_path_factory.mktemp("data"), np.random.default_rng(3), {}
    for name, num_windows in WINDOWS.items():
        (folder / name).mkdir()
        power = 1.5 if name == "prose" else 0.7
        for split, num_tokens, skew in (("train", 2000, 0.5), ("heldout", num_windows * SEQ + 1 + 9, 0.0)):
            tokens = (VOCAB * draw.random(num_tokens - 1) ** (power + skew)).astype(token_dtype(VOCAB))
            with ShardWriter(folder / name / split, VOCAB, end_of_text_id=VOCAB - 1) as writer:
                writer.add(TokenBatch.of([tokens]))
                writer.finish()
                writer.commit()
        files[f"{name}/train.bin"] = {"xxh3_128": name}
    manifest = {"datasets": WINDOWS, "tokenizer_fingerprint": "a", "files": files, "end_of_text_id": VOCAB - 1}
    (folder / "manifest.json").write_bytes(orjson.dumps(manifest))
    vocab = {chr(200 + token) * spelled(token): token for token in range(VOCAB)}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(
        orjson.dumps({"model": {"type": "BPE", "vocab": vocab}, "decoder": {"type": "ByteLevel"}})
    )
    return folder


def spelled(token: int) -> int:
    """Bytes, of a token that does not end a text."""
    return token % 7 + 1


def heldout_of(data: Path) -> list[tuple[str, list[int]]]:
    """Name of the data set and the SEQ + 1 tokens of all held-out windows, numbered through."""
    tokens = {name: Shard(data / name / "heldout").mapped().tolist() for name in WINDOWS}
    return [(name, tokens[name][n * SEQ : (n + 1) * SEQ + 1]) for name, num in WINDOWS.items() for n in range(num)]


@pytest.fixture(scope="module")
def reference() -> ReferenceGPT:
    """Random values everywhere, in the rows that only pad the vocabulary too."""
    model = ReferenceGPT(**MODEL, ffn_hidden_size=128, padded_vocab_size=128)  # type: ignore[arg-type]
    model.randomize(seed=4)
    with torch.no_grad():
        model.embedding.word_embeddings.weight[VOCAB:] *= 30  # would rule every sum that took them in
    return model


@pytest.fixture(scope="module")
def checkpoint(reference: ReferenceGPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's weights as a checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    whole = reference.global_tensors()

    def write(config: RunConfig, device: torch.device) -> None:
        engine = Engine(config, device)
        engine.state.prepare(1)
        for fragment in engine.state.fragments():
            place = tuple(slice(o, o + n) for o, n in zip(fragment.box.offset, fragment.box.shape, strict=True))
            fragment.tensors[MASTER].copy_(whole[fragment.box.key][place])
        engine.state.refresh_weights()
        save(engine, folder, Manifest(1, 8, config.model_dump(mode="json")))

    run_on_ranks(config_of("one rank"), write)
    return folder / "step-00000001"


@torch.no_grad()
def plain_losses(model: ReferenceGPT, windows: Sequence[tuple[str, list[int]]]) -> list[tuple[str, int, int, float]]:
    """Data set, position, token and loss in double precision of every token, one window at a time."""
    found = []
    for name, tokens in windows:
        logits = model(torch.tensor([tokens[:-1]]))[0].double()
        losses = F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none").tolist()
        found += [(name, position, tokens[position + 1], loss) for position, loss in enumerate(losses)]
    return found


def plain_loss(model: ReferenceGPT, windows: Sequence[tuple[str, list[int]]]) -> float:
    return mean([loss for *_, loss in plain_losses(model, windows)])


def plain_bits_per_byte(tokens: Sequence[tuple[str, int, int, float]]) -> float:
    num_bytes = sum(spelled(token) for _, _, token, _ in tokens if token != VOCAB - 1)
    return sum(loss for *_, loss in tokens) / math.log(2) / num_bytes


def check_parts(result: HeldoutResult, expected: Sequence[tuple[str, int, int, float]]) -> None:
    """Of a result, what it says of data sets and positions, by the losses of single tokens."""
    assert list(result.datasets) == list(dict.fromkeys(name for name, *_ in expected))
    for name, found in result.datasets.items():
        tokens = [each for each in expected if each[0] == name]
        assert found.tokens == len(tokens)
        assert found.loss == pytest.approx(mean([loss for *_, loss in tokens]), rel=1e-6)
        assert found.bits_per_byte == pytest.approx(plain_bits_per_byte(tokens), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(plain_bits_per_byte(expected), rel=1e-6)
    assert [(each.first, each.end) for each in result.positions] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)]
    for stretch in result.positions:
        losses = [loss for _, position, _, loss in expected if stretch.first <= position < stretch.end]
        assert stretch.tokens == len(losses)
        assert stretch.loss == pytest.approx(mean(losses), rel=1e-6)


def plain_unigram_loss(train: list[int], labels: list[int], vocab_size: int) -> float:
    counts = Counter(train)
    total = len(train) + vocab_size
    return -math.fsum(math.log((counts[token] + 1) / total) for token in labels) / len(labels)


def evaluate_all_ways(checkpoint: Path, data: Path, tokens: Tensor) -> Callable[[RunConfig, torch.device], Any]:
    """Each rank's (result through the engine, result through the frozen model, logits through both or None).

    The frozen model tells ranks that know losses of every micro-batch, and the others of none.
    """

    def rank(config: RunConfig, device: torch.device) -> Any:
        folder = PreparedFolder.open(data)
        evaluation = HeldoutEvaluation(TrainingData.open(folder, config), HeldoutReader(folder, SEQ), config, device)
        engine = Engine(config, device)
        sharded.load(engine, checkpoint)
        frozen = FrozenModel(config, checkpoint, device)
        logits = frozen.logits(tokens), window_logits(engine.stages, config.model, tokens)
        told: list[tuple[int, int]] = []
        by_frozen = evaluation.run(partial(frozen.evaluate, advance=lambda *counts: told.append(counts)))
        total = told[0][1] if told else 0
        assert told == [(done, total) for done in range(1, total + 1)] and bool(told) == (logits[0] is not None)
        return evaluation.run(engine.evaluate), by_frozen, logits

    return rank


@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=pytest.mark.slow) if each in SLOW else each for each in LAYOUTS]
)
def test_every_layout_evaluates_as_the_plain_model_does(
    layout: str, checkpoint: Path, data: Path, reference: ReferenceGPT
) -> None:
    tokens = torch.randint(0, VOCAB, (3, SEQ), generator=torch.Generator().manual_seed(1))
    results = run_on_ranks(config_of(layout), evaluate_all_ways(checkpoint, data, tokens))
    single = plain_losses(reference, heldout_of(data))
    expected = mean([loss for *_, loss in single])
    for by_engine, by_frozen, _ in results:
        assert by_engine.tokens == by_frozen.tokens == NUM_WINDOWS * SEQ
        assert by_engine.loss == pytest.approx(expected, rel=1e-6)
        assert by_frozen.loss == pytest.approx(expected, rel=1e-6)
        check_parts(by_engine, single)
        assert (by_engine, by_frozen) == results[0][:2], "ranks disagree"

    with torch.no_grad():
        expected_logits = reference(tokens)
    found = [logits for _, _, both in results for logits in both if logits is not None]
    assert len(found) == 2 * len(results) // LAYOUTS[layout].get("pipeline", 1)  # the ranks of the last stage
    for logits in found:
        assert logits.dtype == torch.float32 and logits.shape == (3, SEQ, VOCAB)
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=2e-6)


def test_bf16_evaluates_close_to_fp32(checkpoint: Path, data: Path, reference: ReferenceGPT) -> None:
    tokens = torch.zeros(1, SEQ, dtype=torch.long)
    ((by_engine, by_frozen, logits), *_) = run_on_ranks(
        config_of("TP2", "bf16"), evaluate_all_ways(checkpoint, data, tokens)
    )
    expected = plain_loss(reference, heldout_of(data))
    assert by_engine == by_frozen  # the same bf16 weights, derived from the same masters
    assert by_engine.loss == pytest.approx(expected, rel=1e-3) and by_engine.loss != expected
    assert {each.dtype for each in logits} == {torch.float32}


@pytest.mark.parametrize("max_sequences", [1, 5, 1000])
def test_evaluation_of_some_sequences(
    max_sequences: int, checkpoint: Path, data: Path, reference: ReferenceGPT
) -> None:
    tokens = torch.zeros(1, SEQ, dtype=torch.long)
    config = config_of("DP2 ZeRO-1", max_sequences=max_sequences)
    ((result, _, _), *_) = run_on_ranks(config, evaluate_all_ways(checkpoint, data, tokens))
    train = [token for name in WINDOWS for token in Shard(data / name / "train").mapped().tolist()]
    numbers = heldout_windows(HeldoutReader(PreparedFolder.open(data), SEQ), config).tolist()
    windows = [heldout_of(data)[number] for number in numbers]
    labels = [token for _, tokens in windows for token in tokens[1:]]
    assert result.tokens == len(labels) == min(max_sequences, NUM_WINDOWS) * SEQ
    assert result.loss == pytest.approx(plain_loss(reference, windows), rel=1e-6)
    check_parts(result, plain_losses(reference, windows))  # of one sequence, without the other data set
    assert result.uniform_loss == math.log(VOCAB)
    assert result.unigram_loss == pytest.approx(plain_unigram_loss(train, labels, VOCAB), rel=1e-12)


def test_another_architecture_is_refused_before_anything_is_read(checkpoint: Path) -> None:
    def rank(config: RunConfig, device: torch.device) -> str:
        try:
            FrozenModel(config, checkpoint, device)
        except UserError as error:
            return str(error)
        return "loaded"

    config = from_tree({"model": MODEL | {"num_layers": 2}, "train": {"global_batch_size": 8}})
    (message,) = run_on_ranks(config, rank)
    assert "model.num_layers is 4 in the checkpoint and 2 in the config" in message


# ----------------------------------------------------------------------------------------------------------- baselines


@given(
    train=st.lists(st.integers(0, 19), min_size=1, max_size=200),
    labels=st.lists(st.integers(0, 19), min_size=1, max_size=50),
)
def test_unigram_loss_equals_plain_python(train: list[int], labels: list[int]) -> None:
    found = unigram_loss([np.array(train, np.uint16)], [1.0], np.array(labels, np.uint16), 20)
    assert found == pytest.approx(plain_unigram_loss(train, labels, 20), rel=1e-12)


def test_unigram_loss_of_known_cases() -> None:
    even = np.tile(np.arange(8), 1000)
    assert unigram_loss([even], [1.0], even, 8) == pytest.approx(math.log(8), rel=1e-12)
    assert unigram_loss([np.zeros(0, np.int32)], [1.0], even, 8) == pytest.approx(math.log(8), rel=1e-12)
    # seen 3 times and never: (3 + 1) / 5 and (0 + 1) / 5
    found = unigram_loss([np.array([0, 0, 0])], [1.0], np.array([0, 1]), 2)
    assert found == pytest.approx(-math.log(0.8 * 0.2) / 2, rel=1e-12)


def test_unigram_loss_of_several_data_sets_is_that_of_their_blend() -> None:
    """10 zeros at 3/4 and 90 ones at 1/4: 75 and 25 of the 100 tokens, and one more of each."""
    train = [np.zeros(10, np.uint16), np.ones(90, np.int32)]
    found = unigram_loss(train, [0.75, 0.25], np.array([0, 1]), 2)
    assert found == pytest.approx(-math.log(76 / 102 * 26 / 102) / 2, rel=1e-12)


def test_unigram_loss_counts_a_bounded_sample_from_all_over() -> None:
    """The text changes half way, so that any sample but one from all over would miss much of it."""
    size = 1 << 21
    whole = (np.random.default_rng(1).geometric(0.2, size) % 25).astype(np.uint16)
    whole[size // 2 :] += 25
    exact = unigram_loss([whole], [1.0], whole, 50, size)
    assert exact == pytest.approx(plain_unigram_loss(whole.tolist(), whole.tolist(), 50), rel=1e-9)
    for limit in (size // 2, size // 10, size // 100):
        sampled = unigram_loss([whole], [1.0], whole, 50, limit)
        assert sampled == pytest.approx(exact, rel=0.01) and sampled != exact
    assert unigram_loss([whole[: size // 2]], [1.0], whole, 50, size) > 1.5 * exact  # what the first half alone says
    # a data set that fits its part of the limit is counted whole
    assert unigram_loss([whole, whole], [1.0, 0.0], whole, 50, 2 * size) == pytest.approx(exact, rel=1e-5)


def test_no_more_is_counted_than_the_limit() -> None:
    """On a simulated shard of a trillion tokens: an exact count would not end."""
    huge = np.broadcast_to(np.zeros(1, np.uint16), 10**12)
    found = unigram_loss([huge], [1.0], np.zeros(3, np.uint16), 2, 1 << 20)
    assert found == pytest.approx(-math.log(((1 << 20) + 1) / ((1 << 20) + 2)), rel=1e-9)
