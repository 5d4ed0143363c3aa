"""Sharded checkpoints: any layout continues what any other began, and the same layout continues it to the last bit."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from parity import EPS, LEARNING_RATE, assemble, global_batch
from ranks import run_on_ranks
from reference_gpt import ReferenceGPT
from trainer import parallel
from trainer.checkpoint import sharded
from trainer.checkpoint.format import store
from trainer.checkpoint.format.chunk_reader import read_index
from trainer.checkpoint.format.global_tensors import GlobalTensors
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.waiting_save import save
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree
from trainer.data.batches import MicroBatch
from trainer.engine.engine import Engine
from trainer.model.gpt import build_chunks
from trainer.model.sharding import placements
from trainer.training_state import MASTER, STATE_KINDS

SAVED_AT, LAST_STEP = 2, 4
TOLERANCE = 2e-6  # relative, fp32: another layout adds the same numbers in another order

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2": {"tensor": 2},
    "PP2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "DP2 ZeRO-1": {"data": 2},
    "DP2 ZeRO-2": {"data": 2, "zero": 2},
    "DP2 ZeRO-3": {"data": 2, "zero": 3},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
    "TP2 SP x DP2 ZeRO-3": {"tensor": 2, "sequence": True, "data": 2, "zero": 3},
    "TP2 SP x PP2 x DP2": {"tensor": 2, "sequence": True, "pipeline": 2, "data": 2},
}
RESHARDED = {
    "TP2 SP x PP2 x DP2": ["one rank", "TP2", "PP2 interleaved", "DP2 ZeRO-2", "DP2 ZeRO-3"],
    "DP2 ZeRO-3": ["one rank", "TP2 x PP2"],
    "PP2 interleaved": ["TP2 SP x DP2 ZeRO-3"],
}
BIT_IDENTICAL = [
    ("one rank", "bf16"),
    ("TP2 x PP2", "fp32"),
    ("DP2 ZeRO-3", "bf16"),
    ("DP2 ZeRO-3", "fp32"),
    # what test_dropout resumes in bf16, in deeper layouts
    *(pytest.param(layout, "bf16", marks=pytest.mark.slow) for layout in ("TP2 x PP2", "DP2 ZeRO-1", "DP2 ZeRO-2")),
]

State = dict[str, dict[str, Tensor]]
"""Kind of state -> global name -> whole tensor."""


@dataclass(frozen=True)
class Outcome:
    history: list[tuple[float, float]]
    """Loss and gradient norm of each step."""
    state: State
    """At the end."""
    saved: State
    """When the checkpoint was written, if one was."""


def config_of(layout: str, precision: str = "fp32", **model: Any) -> RunConfig:
    sizes = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "vocab_size": 120, "seq_length": 16}
    return from_tree(
        {
            "model": sizes | model,
            "train": {"global_batch_size": 8, "micro_batch_size": 2, "precision": precision},
            "optimizer": {"lr": LEARNING_RATE, "clip_grad_norm": 0.5, "eps": EPS},
            "parallel": LAYOUTS[layout],
        }
    )


def train_steps(engine: Engine, steps: Iterable[int]) -> list[tuple[float, float]]:
    config, history = engine.config, []
    for step in steps:
        batches = global_batch(config, step).view(-1, parallel.data_size(), config.train.micro_batch_size, 17)
        mine = [MicroBatch(tokens) for tokens in batches[:, parallel.data_rank()]]
        stats = engine.train_step(mine, LEARNING_RATE / (step + 1), step)
        history.append((stats.loss, stats.grad_norm))
    return history


def blocks(engine: Engine) -> dict[str, list[Any]]:
    mine = [fragment for fragment in engine.state.fragments() if fragment.is_main]
    return {kind: [(f.box, f.tensors[kind].clone()) for f in mine] for kind in STATE_KINDS}


def uninterrupted(folder: Path) -> Callable[[RunConfig, torch.device], Any]:
    """A rank that trains through, and writes a checkpoint on the way."""

    def rank(config: RunConfig, device: torch.device) -> Any:
        engine = Engine(config, device)
        engine.state.reset()
        history = train_steps(engine, range(SAVED_AT))
        saved = blocks(engine)
        save(
            engine,
            folder,
            Manifest(SAVED_AT, SAVED_AT * config.train.global_batch_size, config.model_dump(mode="json")),
        )
        return history + train_steps(engine, range(SAVED_AT, LAST_STEP)), blocks(engine), saved

    return rank


def resumed(checkpoint: Path) -> Callable[[RunConfig, torch.device], Any]:
    """A rank that loads the checkpoint and trains on from there."""

    def rank(config: RunConfig, device: torch.device) -> Any:
        engine = Engine(config, device)
        manifest = sharded.load(engine, checkpoint)
        assert (manifest.step, manifest.consumed_samples) == (SAVED_AT, SAVED_AT * config.train.global_batch_size)
        assert manifest.num_updates == engine.state.num_updates == SAVED_AT
        loaded = blocks(engine)
        return train_steps(engine, range(manifest.step, LAST_STEP)), blocks(engine), loaded

    return rank


def outcome(config: RunConfig, rank: Callable[[RunConfig, torch.device], Any]) -> Outcome:
    histories, at_end, at_checkpoint = zip(*run_on_ranks(config, rank), strict=True)
    assert all(history == histories[0] for history in histories), "ranks disagree"
    state, saved = (
        {kind: assemble([mine[kind] for mine in per_rank]) for kind in STATE_KINDS}
        for per_rank in (at_end, at_checkpoint)
    )
    return Outcome(histories[0], state, saved)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Outcome]]:
    """The uninterrupted run of a layout, each trained once, and its checkpoint."""
    done: dict[tuple[str, str], tuple[Path, Outcome]] = {}

    def run(layout: str, precision: str = "fp32") -> tuple[Path, Outcome]:
        if (layout, precision) not in done:
            folder = tmp_path_factory.mktemp("checkpoints")
            trained = outcome(config_of(layout, precision), uninterrupted(folder))
            done[layout, precision] = folder / store.folder_name(SAVED_AT), trained
        return done[layout, precision]

    return run


def assert_same(found: State, expected: State) -> None:
    for kind in STATE_KINDS:
        assert found[kind].keys() == expected[kind].keys()
        different = [name for name, tensor in expected[kind].items() if not torch.equal(found[kind][name], tensor)]
        assert not different, f"{kind} differs in {different}"


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    ("written", "read"), [(written, read) for written, layouts in RESHARDED.items() for read in layouts]
)
def test_another_layout_continues_the_run(written: str, read: str, runs: Callable[..., tuple[Path, Outcome]]) -> None:
    checkpoint, expected = runs(written)
    found = outcome(config_of(read), resumed(checkpoint))
    assert_same(found.saved, expected.saved)  # loading itself changes no bit, whatever the layout
    for mine, theirs in zip(found.history, expected.history[SAVED_AT:], strict=True):
        assert mine == pytest.approx(theirs, rel=TOLERANCE)
    for name, weight in expected.state[MASTER].items():
        assert (found.state[MASTER][name] - weight).norm() <= TOLERANCE * weight.norm(), name


@pytest.mark.parametrize(("layout", "precision"), BIT_IDENTICAL)
def test_the_same_layout_continues_the_run_bit_for_bit(
    layout: str, precision: str, runs: Callable[..., tuple[Path, Outcome]]
) -> None:
    checkpoint, expected = runs(layout, precision)
    found = outcome(config_of(layout, precision), resumed(checkpoint))
    assert found.history == expected.history[SAVED_AT:]
    assert_same(found.saved, expected.saved)
    assert_same(found.state, expected.state)


def test_training_went_on_after_the_checkpoint(runs: Callable[..., tuple[Path, Outcome]]) -> None:
    """Else the comparisons above would compare nothing."""
    _, run = runs("TP2 x PP2", "fp32")
    assert len(set(run.history)) == LAST_STEP
    for kind in STATE_KINDS:
        for name, tensor in run.state[kind].items():
            assert not torch.equal(tensor, run.saved[kind][name]), (kind, name)


# ------------------------------------------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("layout", RESHARDED)
def test_whole_tensors_are_readable_without_a_process_group(
    layout: str, runs: Callable[..., tuple[Path, Outcome]]
) -> None:
    checkpoint, run = runs(layout)
    assert not torch.distributed.is_initialized()
    found = {kind: dict(GlobalTensors(checkpoint, kind)) for kind in STATE_KINDS}
    assert_same(found, run.saved)
    model = config_of(layout).model
    reference = ReferenceGPT(
        num_layers=4,
        hidden_size=32,
        num_heads=4,
        ffn_hidden_size=128,
        vocab_size=120,
        padded_vocab_size=model.padded_vocab_size,
        seq_length=16,
    )
    shapes = {name: tensor.shape for name, tensor in reference.global_tensors().items()}
    assert {name: tensor.shape for name, tensor in found[MASTER].items()} == shapes
    assert {tensor.dtype for tensors in found.values() for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("layout", RESHARDED)
def test_every_element_is_stored_once_and_all_files_are_vouched_for(
    layout: str, runs: Callable[..., tuple[Path, Outcome]]
) -> None:
    checkpoint, _ = runs(layout)
    for name, entry in read_index(checkpoint).state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        times = torch.zeros(entry.size, dtype=torch.int)
        for chunk in entry.chunks:
            times[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
        assert bool((times == 1).all()), name
    manifest = store.verify(checkpoint)
    assert set(manifest.files) == {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
    assert from_tree(manifest.config) == config_of(layout)
    assert sorted(item.name for item in checkpoint.parent.iterdir()) == [checkpoint.name]


def load_only_weights(checkpoint: Path) -> Callable[[RunConfig, torch.device], list[Any]]:
    def rank(config: RunConfig, device: torch.device) -> list[Any]:
        chunks = build_chunks(config)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(torch.nan)
        sharded.load_weights(chunks, checkpoint)
        return [
            (box, placement.is_main, parameter.data.view(-1)[box.flat_slice].view(box.shape))
            for parameter, placement in placements(chunks).items()
            for box in placement.boxes
        ]

    return rank


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["TP2 x PP2", "PP2 interleaved"])
def test_weights_alone_load_in_any_layout(
    layout: str, precision: str, runs: Callable[..., tuple[Path, Outcome]]
) -> None:
    checkpoint, run = runs("DP2 ZeRO-3")
    per_rank = run_on_ranks(config_of(layout, precision), load_only_weights(checkpoint))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for box, _, values in (block for mine in per_rank for block in mine):
        place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
        assert values.dtype == dtype and torch.equal(values, run.saved[MASTER][box.key][place].to(dtype)), box
    whole = assemble([[(box, values) for box, is_main, values in mine if is_main] for mine in per_rank])
    assert whole.keys() == run.saved[MASTER].keys()


# ------------------------------------------------------------------------------------------------------------- refusal


def load_and_report(checkpoint: Path) -> Callable[[RunConfig, torch.device], str]:
    def rank(config: RunConfig, device: torch.device) -> str:
        engine = Engine(config, device)
        try:
            sharded.load(engine, checkpoint)
        except UserError as error:
            return str(error)
        return "loaded"

    return rank


def test_another_architecture_is_refused_on_every_rank(runs: Callable[..., tuple[Path, Outcome]]) -> None:
    checkpoint, _ = runs("DP2 ZeRO-3")
    messages = run_on_ranks(config_of("TP2", num_layers=2, vocab_size=121), load_and_report(checkpoint))
    assert len(set(messages)) == 1
    for fragment in ("model.num_layers is 4 in the checkpoint and 2 in", "model.vocab_size is 120", str(checkpoint)):
        assert fragment in messages[0]
