"""Steps that must not count: the engine forgets them to the last bit, and the loop gets past them, or says why not."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_pipeline.shards import ShardWriter, TokenBatch
from parity import EPS, LEARNING_RATE, global_batch
from ranks import run_on_ranks
from trainer import loop, parallel
from trainer.checkpoint.format import store
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.data.batches import MicroBatch, TrainingData
from trainer.data.prepared import PreparedFolder
from trainer.engine.engine import Engine, StepStats
from trainer.events import Event, EventLog, read_events, surviving_steps
from trainer.run_dir import RunDir
from trainer.schedule import Schedule
from trainer.stability import StabilityState, TrainingDiverged
from trainer.training_state import STATE_KINDS

# ---------------------------------------------------------------------------------------------------------- the engine

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2 ZeRO-1": {"data": 2},
    "DP2 ZeRO-2": {"data": 2, "zero": 2},
    "DP2 ZeRO-3": {"data": 2, "zero": 3},
    "PP2 interleaved ZeRO-2": {"pipeline": 2, "virtual_pipeline": 2, "zero": 2},
    "DP2 ZeRO-2 offload": {"data": 2, "zero": 2, "offload": "optimizer"},
    "DP2 ZeRO-3 offload": {"data": 2, "zero": 3, "offload": "optimizer"},
}
SLOW = ("DP2 ZeRO-2", "DP2 ZeRO-3")  # with offload, and the first in a pipeline, they are among the fast ones


def engine_step(engine: Engine, step: int, accept: bool = True) -> StepStats:
    config = engine.config
    batches = global_batch(config, step).view(-1, parallel.data_size(), config.train.micro_batch_size, 17)
    mine = [MicroBatch(tokens) for tokens in batches[:, parallel.data_rank()]]
    return engine.train_step(mine, LEARNING_RATE / (step + 1), step, lambda *_: accept)


def refuse_one(engine: Engine) -> None:
    stats = engine_step(engine, 7, accept=False)
    assert not stats.updated and math.isfinite(stats.grad_norm) and stats.grad_norm > 0


def meet_nan(engine: Engine) -> None:
    """One rank's gradient of one parameter is not a number; both ranks must see it, although they would accept it."""
    weight = next(engine.stages[0].module.parameters())
    hook = weight.register_hook(lambda gradient: gradient * math.nan) if dist.get_rank() == 0 else None
    stats = engine_step(engine, 7)
    if hook is not None:
        hook.remove()
    assert not stats.updated and math.isfinite(stats.loss) and stats.grad_norm == math.inf


def trace(engine: Engine, between: Sequence[Callable[[Engine], None]]) -> list[Any]:
    """Two steps from the seed with something in between: their losses and norms, and all of the state after them."""
    engine.state.reset()
    found: list[Any] = [engine_step(engine, 0)]
    for disturb in between:
        disturb(engine)
    found += [engine_step(engine, 1), engine.state.num_updates]
    found += [(f.box.key, kind, f.tensors[kind].clone()) for f in engine.state.fragments() for kind in STATE_KINDS]
    batch = global_batch(engine.config, 9)[: engine.config.train.micro_batch_size]
    found.append(engine.evaluate([MicroBatch(batch)] * 2))  # by the weights that forward uses
    return found


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("DP2 ZeRO-1", "fp32"),
        *((layout, "bf16") for layout in LAYOUTS if layout not in SLOW),
        *(pytest.param(layout, "bf16", marks=pytest.mark.slow) for layout in SLOW),
        *(pytest.param(layout, "fp32", marks=pytest.mark.slow) for layout in LAYOUTS if layout != "DP2 ZeRO-1"),
    ],
)
def test_a_dropped_step_leaves_no_trace(layout: str, precision: str) -> None:
    config = from_tree(
        {
            "model": {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "vocab_size": 120, "seq_length": 16},
            "train": {"global_batch_size": 8, "micro_batch_size": 2, "precision": precision},
            "optimizer": {"lr": LEARNING_RATE, "clip_grad_norm": 0.5, "eps": EPS},
            "parallel": LAYOUTS[layout],
        }
    )

    def rank(config: RunConfig, device: torch.device) -> None:
        engine = Engine(config, device)
        undisturbed = trace(engine, [])
        assert undisturbed[0].updated and undisturbed[2] == 2
        for between in ([refuse_one], [meet_nan], [meet_nan, refuse_one, refuse_one]):
            for mine, theirs in zip(trace(engine, between), undisturbed, strict=True):
                if isinstance(mine, tuple) and isinstance(mine[-1], torch.Tensor):
                    assert mine[:2] == theirs[:2] and torch.equal(mine[2], theirs[2]), mine[:2]
                else:
                    assert mine == theirs

    run_on_ranks(config, rank)


# ------------------------------------------------------------------------------------------------------------ the loop

SEQ, VOCAB, BATCH, NUM_STEPS = 16, 64, 8, 90
NUM_WINDOWS = BATCH * NUM_STEPS + 7  # every window is read at most once, so that a step's text is its own
ONE, FOUR = [80], [80, 81, 82, 83]  # steps (from 1) whose text is noise; four are more than may be skipped in a row
TOLERANCE = 0.005  # nats: how far a run that met noise may end from the clean one, which ends at 0.658; without
# protection it is 0.016


def config_of(data: Path, **sections: Any) -> RunConfig:
    return from_tree(
        {
            "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": VOCAB, "seq_length": SEQ},
            "train": {
                "total_tokens": NUM_STEPS * BATCH * SEQ,
                "global_batch_size": BATCH,
                "micro_batch_size": 4,
                "precision": "fp32",
            },
            "optimizer": {"lr": 1e-2, "warmup_tokens": 10 * BATCH * SEQ},
            "data": {"prepared": str(data)},
            "checkpoint": {"every_steps": 20, "keep_last": 9},
        }
        | sections
    )


@pytest.fixture(scope="module")
def clean_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Walks through the vocabulary, which a small model learns in a few dozen steps."""
    folder, draw = tmp_path_factory.mktemp("clean"), np.random.default_rng(3)
    for name, num_windows in (("train", NUM_WINDOWS), ("heldout", 64)):
        tokens = np.cumsum(draw.choice([1, 1, 1, 2], num_windows * SEQ + 1)) % (VOCAB - 1)
        with ShardWriter(folder / name, VOCAB, end_of_text_id=VOCAB - 1) as writer:
            writer.add(TokenBatch.of([tokens.astype(np.uint16)]))
            writer.finish()
            writer.commit()
    return folder


def with_noise(clean: Path, folder: Path, steps: Sequence[int]) -> Path:
    """A copy in which the windows of these steps hold tokens drawn at random."""
    shutil.copytree(clean, folder)
    config, draw = config_of(folder), np.random.default_rng(4)
    schedule, samples = Schedule(config), TrainingData.open(PreparedFolder.open(folder), config)
    tokens = np.memmap(folder / "train.bin", dtype=samples.readers[0].shard.dtype, mode="r+")
    for step in steps:
        place = schedule.step_after(step - 1)
        windows = samples.draws(np.arange(place.first_sample, place.first_sample + place.batch_size)).windows
        for window in windows:
            tokens[window * SEQ + 1 : (window + 1) * SEQ] = draw.integers(0, VOCAB - 1, SEQ - 1)
    tokens.flush()
    return folder


def train(config: RunConfig, run_dir: RunDir) -> list[Event]:
    """Run the loop on the config's ranks; returns the events of this life."""
    run_dir.create(config)
    before = len(read_events(run_dir.events_path))

    def rank(config: RunConfig, device: torch.device) -> str | None:
        log = EventLog(run_dir.events_path) if dist.get_rank() == 0 else None
        try:
            loop.train(config, run_dir, device, log.write if log else lambda *_, **__: None)
        except TrainingDiverged as verdict:
            return str(verdict)
        return None

    verdicts = run_on_ranks(config, rank)
    assert len(set(verdicts)) == 1
    return read_events(run_dir.events_path)[before:]


def of_kind(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event["kind"] == kind]


def facts(events: list[Event]) -> list[Event]:
    """Events without what differs from one life to the next."""
    return [
        {k: v for k, v in event.items() if k not in ("time", "seconds", "phases", "path", "bytes")} for event in events
    ]


def final_loss(events: list[Event]) -> float:
    return of_kind(events, "evaluated")[-1]["loss"]


@pytest.fixture(scope="module")
def clean_loss(clean_data: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    events = train(config_of(clean_data), RunDir(tmp_path_factory.mktemp("run") / "clean"))
    assert not of_kind(events, "step_skipped") and len(of_kind(events, "step")) == NUM_STEPS
    return final_loss(events)


def test_a_batch_of_noise_is_skipped(clean_data: Path, clean_loss: float, tmp_path: Path) -> None:
    config = config_of(with_noise(clean_data, tmp_path / "data", ONE))
    events = train(config, RunDir(tmp_path / "run"))
    (skipped,) = of_kind(events, "step_skipped")
    assert (skipped["step"], skipped["first_sample"], skipped["num_samples"]) == (80, 79 * BATCH, BATCH)
    assert skipped["reason"] == "loss spike" and skipped["loss"] > 3.5
    assert [event["step"] for event in of_kind(events, "step")] == [*range(1, 80), *range(81, NUM_STEPS + 1)]
    assert final_loss(events) == pytest.approx(clean_loss, abs=TOLERANCE)
    assert [event["step"] for event in of_kind(events, "checkpoint_saved")] == [20, 40, 60, 81, 90]  # not of step 80


@pytest.mark.parametrize("parallel", [{}, pytest.param({"data": 2, "zero": 3}, marks=pytest.mark.slow)])
def test_a_stretch_of_noise_is_rolled_back_and_passed_over(
    parallel: dict[str, Any], clean_data: Path, clean_loss: float, tmp_path: Path
) -> None:
    config = config_of(with_noise(clean_data, tmp_path / "data", FOUR), parallel=parallel)
    run_dir = RunDir(tmp_path / "run")
    events = train(config, run_dir)
    (rolled_back,) = of_kind(events, "rolled_back")
    assert (rolled_back["from_step"], rolled_back["to_step"]) == (82, 60) and rolled_back["reason"] == "loss spike"
    passed_over = [*range(FOUR[0] - 3, FOUR[0]), *FOUR[:3]]  # with the steps that led into it
    assert rolled_back["quarantined"] == passed_over
    assert rolled_back["checkpoint"] == str(run_dir.checkpoints / "step-00000060")
    before, after = events[: events.index(rolled_back)], events[events.index(rolled_back) :]
    again = [event for event in of_kind(before, "step") if 60 < event["step"] < passed_over[0]]
    assert facts(of_kind(after, "step"))[: len(again)] == facts(again)  # the way back to the trouble, bit for bit
    assert [(event["step"], event["reason"]) for event in of_kind(after, "step_skipped")] == [
        *((step, "quarantined") for step in passed_over),
        (FOUR[3], "loss spike"),
    ]
    history = surviving_steps(events)
    missed = [*passed_over, FOUR[3]]
    assert [event["step"] for event in history] == [n for n in range(1, NUM_STEPS + 1) if n not in missed]
    assert [event["step"] for event in surviving_steps(events, "step_skipped")] == missed
    assert final_loss(events) == pytest.approx(clean_loss, abs=TOLERANCE)

    manifest = store.verify(run_dir.checkpoints / store.folder_name(NUM_STEPS))
    assert (manifest.num_updates, manifest.consumed_samples) == (NUM_STEPS - 7, NUM_STEPS * BATCH)
    state = StabilityState.from_tree(manifest.stability)
    assert state.skipped == tuple(missed) and state.quarantined == tuple(passed_over) and state.num_rollbacks == 0
    assert state.losses == tuple(event["loss"] for event in history[-config.stability.window :])

    lost = RunDir(shutil.copytree(run_dir.path, tmp_path / "lost"))  # and a resume brings all of it back
    shutil.rmtree(lost.checkpoints / store.folder_name(NUM_STEPS))
    kinds = [(event["kind"], event.get("step")) for event in events]
    assert facts(train(config, lost))[1:] == facts(events)[kinds.index(("checkpoint_saved", 84)) + 1 :]
    assert StabilityState.from_tree(store.verify(lost.checkpoints / store.folder_name(NUM_STEPS)).stability) == state


def test_without_protection_noise_does_harm(clean_data: Path, clean_loss: float, tmp_path: Path) -> None:
    """What the tests above would see if steps were not skipped."""
    config = config_of(with_noise(clean_data, tmp_path / "data", FOUR), stability={"spike_zscore": 0.0})
    events = train(config, RunDir(tmp_path / "run"))
    assert not of_kind(events, "step_skipped")
    assert final_loss(events) > clean_loss + 2 * TOLERANCE


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}, {"data": 2, "zero": 3}])
def test_trouble_without_end_ends_the_run(parallel: dict[str, Any], clean_data: Path, tmp_path: Path) -> None:
    """An absurd learning rate makes weights of which every later step is not a number."""
    config = config_of(
        clean_data,
        optimizer={"lr": 1e30, "warmup_tokens": 0},
        parallel=parallel,
        checkpoint={"every_steps": 100},
    )
    run_dir = RunDir(tmp_path / "run")
    events = train(config, run_dir)
    ended = of_kind(events, "diverged")
    assert len(ended) == 1 and events[-1] == ended[0] and "\n" not in ended[0]["verdict"]
    assert "step 12 is the last of 3 skipped in a row (not finite" in ended[0]["verdict"]
    assert "after 2 rollbacks without progress; lower optimizer.lr" in ended[0]["verdict"]
    assert [event["step"] for event in of_kind(events, "step")] == [1, 5, 9]  # the one update of each attempt
    assert [event["quarantined"] for event in of_kind(events, "rolled_back")] == [[1, 2, 3, 4], [3, 4, 5, 6, 7, 8]]
    computed = [event for event in of_kind(events, "step_skipped") if event["reason"] != "quarantined"]
    assert [event["step"] for event in computed] == [2, 3, 4, 6, 7, 8, 10, 11, 12]
    assert {event["reason"] for event in computed} == {"not finite"}
    assert list(run_dir.checkpoints.iterdir()) == []  # weights that are no numbers were never saved
