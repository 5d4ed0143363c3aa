"""The training loop on real shards: what it records, what it keeps, and that no interruption shows in its result."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
import torch.distributed as dist

from data_pipeline.shards import ShardWriter, TokenBatch
from ranks import run_on_ranks
from trainer import loop
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import read_manifest
from trainer.config import ParallelConfig, RunConfig, UserError
from trainer.config_file import from_tree
from trainer.data.ledger.audit import audit
from trainer.events import Event, EventLog, read_events, surviving_steps
from trainer.inference.answering import answer
from trainer.inference.cached import CachedModel
from trainer.inference.layout import inference_config
from trainer.inference.requests import Answer, Generate, Request, Score, Scored, read_answers, write_requests
from trainer.run_dir import RunDir
from trainer.schedule import learning_rate
from trainer.stop import StopRequest

SEQ, VOCAB, NUM_STEPS, GLOBAL_BATCH = 16, 90, 7, 8
TOKENS_PER_STEP = SEQ * GLOBAL_BATCH

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
    "DP2 ZeRO-2": {"data": 2, "zero": 2},
    "CP2": {"context": 2},
}


@dataclass(frozen=True)
class Trained:
    run_dir: RunDir
    config: RunConfig
    events: list[Event]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of walks through the vocabulary: easy to learn, and 40 windows only, so that epochs end."""
    folder, draw = tmp_path_factory.mktemp("prepared"), np.random.default_rng(3)
    for name, num_windows in (("train", 40), ("heldout", 9)):
        tokens = np.cumsum(draw.choice([1, 1, 1, 2], num_windows * SEQ)) % (VOCAB - 1)
        with ShardWriter(folder / name, VOCAB, end_of_text_id=VOCAB - 1) as writer:
            writer.add(TokenBatch.of([tokens.astype(np.uint16)]))
            writer.finish()
            writer.commit()
    return folder


def config_of(layout: str, data: Path, precision: str = "fp32", **checkpoint: Any) -> RunConfig:
    return from_tree(
        {
            "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": VOCAB, "seq_length": SEQ},
            "train": {
                "total_tokens": NUM_STEPS * TOKENS_PER_STEP - 5,  # rounded up to whole steps
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": 2,
                "precision": precision,
            },
            "optimizer": {"lr": 1e-2, "warmup_tokens": 2 * TOKENS_PER_STEP, "eps": 1e-5},
            "parallel": LAYOUTS[layout],
            "data": {"prepared": str(data)},
            "evaluation": {"every_steps": 2},
            "checkpoint": {"every_steps": 3, "keep_last": 2, **checkpoint},
        }
    )


def train(config: RunConfig, run_dir: RunDir) -> list[Event]:
    """Run the loop on the config's ranks; returns the events of this life."""
    run_dir.create(config)
    before = len(read_events(run_dir.events_path))

    def rank(config: RunConfig, device: torch.device) -> None:
        log = EventLog(run_dir.events_path) if dist.get_rank() == 0 else None
        loop.train(config, run_dir, device, log.write if log else lambda *_, **__: None)

    run_on_ranks(config, rank)
    assert audit(run_dir).findings == []  # every sample once an epoch, and the tokens that steps were fed
    return read_events(run_dir.events_path)[before:]


def refuses(run_dir: RunDir, reason: str) -> Callable[[RunConfig, torch.device], None]:
    """A rank that passes if the loop will not begin, and says why."""

    def rank(config: RunConfig, device: torch.device) -> None:
        with pytest.raises(UserError, match=reason):
            loop.train(config, run_dir, device, lambda *_, **__: None)

    return rank


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """A fresh run of a layout, each trained once."""
    done: dict[tuple[str, str], Trained] = {}

    def run(layout: str, precision: str = "fp32") -> Trained:
        if (layout, precision) not in done:
            config, run_dir = config_of(layout, data, precision), RunDir(tmp_path_factory.mktemp("run") / "run")
            done[layout, precision] = Trained(run_dir, config, train(config, run_dir))
        return done[layout, precision]

    return run


def of_kind(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event["kind"] == kind]


def facts(events: list[Event]) -> list[Event]:
    """Events without what differs from one life and folder to the next; a checkpoint's index names its folder."""
    passing = ("time", "seconds", "phases", "path", "bytes")
    return [{key: value for key, value in event.items() if key not in passing} for event in events]


# ------------------------------------------------------------------------------------------------------ what it records


@pytest.mark.parametrize("layout", ["TP2 x PP2", "DP2 ZeRO-2", "CP2"])
def test_a_run_records_what_happened_in_order(layout: str, runs: Callable[..., Trained]) -> None:
    run = runs(layout)
    expected: list[tuple[str, int]] = [("training_started", 0), ("evaluated", 0)]
    for step in range(1, NUM_STEPS + 1):
        expected.append(("step", step))
        expected += [("evaluated", step)] * (step in (2, 4, 6, 7))
        expected += [("checkpoint_saved", step)] * (step in (3, 6, 7))
    assert [(event["kind"], event["step"]) for event in run.events] == expected
    assert run.events[0]["checkpoint"] is None
    for event in of_kind(run.events, "step"):
        assert event["tokens"] == event["step"] * TOKENS_PER_STEP
        assert event["lr"] == learning_rate(run.config, event["tokens"])
        assert event["seconds"] > 0 and event["grad_norm"] > 0


@pytest.mark.parametrize("layout", ["TP2 x PP2", "DP2 ZeRO-2", "CP2"])
def test_answers_between_steps_are_the_checkpoints_own_and_change_nothing(
    layout: str, runs: Callable[..., Trained], data: Path, tmp_path: Path
) -> None:
    undisturbed, run_dir = runs(layout), RunDir(tmp_path / "run")
    requests: list[Request] = [Score((1, 2, 3), (4, 5)), Generate((7, 8), 3), Score((9,), (1,))]
    config = config_of(layout, data)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"tasks": ("some",)})})
    run_dir.create(config)
    run_dir.evaluation.mkdir()
    write_requests(run_dir.requests_path, requests)
    events = train(config, run_dir)
    assert [
        (event["kind"], event["step"]) for event in events if event["kind"] in ("answered", "checkpoint_saved")
    ] == [(kind, step) for step in (3, 6, 7) for kind in ("answered", "checkpoint_saved")]
    answers = {event["step"]: read_answers(Path(event["answers"]), requests) for event in of_kind(events, "answered")}
    assert facts([event for event in events if event["kind"] != "answered"]) == facts(undisturbed.events)

    own = inference_config(config.model_copy(update={"parallel": ParallelConfig()}))
    step = max(store.steps(run_dir.checkpoints))

    def rank(config: RunConfig, device: torch.device) -> list[Answer]:
        return answer(CachedModel(config, run_dir.checkpoints / store.folder_name(step), device), requests)

    (by_checkpoint,) = run_on_ranks(own, rank)
    for one, other in zip(answers[step], by_checkpoint, strict=True):
        if isinstance(one, Scored):
            assert isinstance(other, Scored) and one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
        else:
            assert one == other


def test_where_the_run_is_asked_to_end_it_is_said_that_its_last_checkpoint_is_not_judged(
    data: Path, tmp_path: Path
) -> None:
    """Nobody asks for those answers later: whoever waits for an end has no time for them."""
    run_dir, config = RunDir(tmp_path / "run"), config_of("one rank", data)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"tasks": ("some",)})})
    run_dir.create(config)
    run_dir.evaluation.mkdir()
    write_requests(run_dir.requests_path, [Score((9,), (1,))])
    run_dir.stop_path.write_text("somebody")

    def rank(config: RunConfig, device: torch.device) -> None:
        log = EventLog(run_dir.events_path)
        loop.train(config, run_dir, device, log.write, stop=StopRequest(run_dir.stop_path))
        log.close()

    run_on_ranks(config, rank)
    events = read_events(run_dir.events_path)
    told = [(event["kind"], event["step"]) for event in events if event["kind"] not in ("step", "evaluated")]
    assert told == [("training_started", 0), ("evaluation_skipped", 1), ("checkpoint_saved", 1), ("preempted", 1)]


@pytest.mark.parametrize("layout", ["TP2 x PP2", "DP2 ZeRO-2"])
def test_the_model_learns(layout: str, runs: Callable[..., Trained]) -> None:
    evaluations = of_kind(runs(layout).events, "evaluated")
    first, last = evaluations[0], evaluations[-1]
    assert first["loss"] == pytest.approx(math.log(VOCAB), abs=0.1) and last["loss"] < first["loss"] - 0.5
    assert {event["tokens"] for event in evaluations} == {9 * SEQ}
    assert {event["uniform_loss"] for event in evaluations} == {math.log(VOCAB)}


def test_layouts_see_the_same_samples(runs: Callable[..., Trained]) -> None:
    """Losses of every step and evaluation agree, so each step had the same global batch."""
    mine, theirs = (
        [event["loss"] for event in runs(layout).events if "loss" in event] for layout in ("TP2 x PP2", "DP2 ZeRO-2")
    )
    assert mine == pytest.approx(theirs, rel=2e-6) and len(set(mine)) == len(mine)


@pytest.mark.parametrize("layout", ["TP2 x PP2", "DP2 ZeRO-2"])
def test_the_newest_checkpoints_are_kept(layout: str, runs: Callable[..., Trained]) -> None:
    run = runs(layout)
    assert sorted(item.name for item in run.run_dir.checkpoints.iterdir()) == ["step-00000006", "step-00000007"]
    for event in of_kind(run.events, "checkpoint_saved")[1:]:
        manifest = store.verify(Path(event["path"]))
        assert (manifest.step, manifest.consumed_samples) == (event["step"], event["step"] * GLOBAL_BATCH)
        files = [path for path in Path(event["path"]).iterdir() if path.name != "manifest.json"]
        assert event["bytes"] == sum(path.stat().st_size for path in files)


# ----------------------------------------------------------------------------------------------------------- batch ramp

RAMP_SIZES = [4, 4, 4, 8, 8, 12, 12, 12]  # from 4 to 12 over 24 sequences, in steps of 4


def with_ramp(config: RunConfig, **checkpoint: Any) -> RunConfig:
    ramp = {"global_batch_size": 12, "ramp_start_batch_size": 4, "ramp_tokens": 24 * SEQ}
    tree = config.model_dump()
    return from_tree(tree | {"train": tree["train"] | ramp, "checkpoint": tree["checkpoint"] | checkpoint})


def test_a_ramp_is_the_same_in_every_layout_and_across_them(data: Path, tmp_path: Path) -> None:
    config, run_dir = with_ramp(config_of("DP2 ZeRO-2", data)), RunDir(tmp_path / "run")
    events = train(config, run_dir)
    steps = of_kind(events, "step")
    assert [event["tokens"] for event in steps] == [SEQ * sum(RAMP_SIZES[: n + 1]) for n in range(len(RAMP_SIZES))]
    assert [event["lr"] for event in steps] == [learning_rate(config, event["tokens"]) for event in steps]
    given = run_dir.checkpoints / "step-00000006"
    assert read_manifest(given).consumed_samples == sum(RAMP_SIZES[:6])
    for other, first in (
        (with_ramp(config_of("TP2 x PP2", data)), 0),
        (with_ramp(config_of("one rank", data), resume_from=str(given)), 6),
    ):
        losses = [event["loss"] for event in of_kind(train(other, RunDir(tmp_path / f"from {first}")), "step")]
        assert losses == pytest.approx([event["loss"] for event in steps[first:]], rel=2e-6)
    unramped = config_of("one rank", data, resume_from=str(given))
    refused = RunDir(tmp_path / "refused")
    refused.create(unramped)
    run_on_ranks(unramped, refuses(refused, r"consumed 40 sequences in 6 steps.* would be 48; use its own batch size"))


# -------------------------------------------------------------------------------------------------------- interruptions


def lose_the_newest(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "step-00000007")


def damage_the_newest(checkpoints: Path) -> None:
    largest = max((checkpoints / "step-00000007").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


@pytest.mark.parametrize(
    ("layout", "precision", "harm"),
    [
        ("TP2 x PP2", "fp32", lose_the_newest),
        ("DP2 ZeRO-2", "fp32", damage_the_newest),
        ("TP2 x PP2", "bf16", damage_the_newest),
    ],
)
def test_a_lost_checkpoint_does_not_show_in_the_result(
    layout: str, precision: str, harm: Callable[[Path], None], runs: Callable[..., Trained], tmp_path: Path
) -> None:
    run = runs(layout, precision)
    harmed = RunDir(shutil.copytree(run.run_dir.path, tmp_path / "run"))
    harm(harmed.checkpoints)
    again = train(run.config, harmed)
    assert [event["kind"] for event in again].count("checkpoint_rejected") == (harm is damage_the_newest)
    again = [event for event in again if event["kind"] != "checkpoint_rejected"]
    assert [(event["kind"], event["step"]) for event in again] == [
        ("training_started", 6),
        ("step", 7),
        ("evaluated", 7),
        ("checkpoint_saved", 7),
    ]
    assert again[0]["checkpoint"] == str(harmed.checkpoints / "step-00000006")
    assert facts(again)[1:] == facts(run.events)[-3:]  # bit for bit
    history = surviving_steps(read_events(harmed.events_path))
    assert facts(history) == facts(of_kind(run.events, "step"))
    assert store.newest_valid(harmed.checkpoints) == harmed.checkpoints / "step-00000007"


def test_a_finished_run_only_evaluates(data: Path, tmp_path: Path) -> None:
    config, run_dir = config_of("one rank", data), RunDir(tmp_path / "run")
    first = train(config, run_dir)
    again = train(config, run_dir)
    assert facts(again)[1:] == facts(first)[-2:-1]
    assert (again[0]["kind"], again[0]["step"]) == ("training_started", NUM_STEPS)


def test_a_run_does_not_go_on_with_other_data(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))

    def state(train_hash: str) -> None:
        stated = {"tokenizer_fingerprint": "aa", "files": {"train.bin": {"xxh3_128": train_hash}}}
        (folder / "manifest.json").write_bytes(orjson.dumps(stated))

    config, run_dir = config_of("one rank", folder), RunDir(tmp_path / "run")
    state("bb")
    train(config, run_dir)
    assert read_manifest(run_dir.checkpoints / "step-00000007").data == {"tokenizer": "aa", "train": "bb"}
    state("cc")
    run_on_ranks(config, refuses(run_dir, r"data has changed since .*step-00000007 was written; bring the old data"))


def test_a_blended_run_does_not_go_on_with_another_blend(data: Path, tmp_path: Path) -> None:
    """The weights are those of the folder, so that the config of the run stays the same."""
    folder = tmp_path / "blended"
    for name in ("a", "b"):
        shutil.copytree(data, folder / name)

    def state(blend: dict[str, float] | None) -> None:
        files = {f"{name}/train.bin": {"xxh3_128": name} for name in "ab"}
        stated = {"datasets": {"a": {}, "b": {}}, "tokenizer_fingerprint": "aa", "files": files, "blend": blend}
        (folder / "manifest.json").write_bytes(orjson.dumps(stated))

    config, run_dir = config_of("one rank", folder), RunDir(tmp_path / "run")
    state({"a": 3, "b": 1})
    events = train(config, run_dir)
    assert of_kind(events, "evaluated")[-1]["loss"] < of_kind(events, "evaluated")[0]["loss"]
    evaluated = of_kind(events, "evaluated")[-1]
    assert evaluated["tokens"] == 2 * 9 * SEQ  # of both, whatever their weights
    loss = pytest.approx(evaluated["loss"], abs=2e-6)  # of both, as they are the same text
    each = {"loss": loss, "tokens": 9 * SEQ, "bits_per_byte": None}  # there is no tokenizer
    assert evaluated["datasets"] == {"a": each, "b": each} and evaluated["bits_per_byte"] is None
    assert list(evaluated["positions"])[:4] == ["0", "1", "2", "4"]
    state({"a": 6, "b": 2})
    assert train(config, run_dir)[0]["step"] == NUM_STEPS
    state({"a": 1, "b": 1})
    reason = "step-00000007 was trained on the blend a 49152, b 16384 of 65536, and that of .* is now a 32768, b 32768"
    run_on_ranks(config, refuses(run_dir, reason))


# ---------------------------------------------------------------------------------------------------------- resume_from


def test_another_run_continues_in_another_layout(data: Path, tmp_path: Path, runs: Callable[..., Trained]) -> None:
    source = runs("TP2 x PP2")
    given = source.run_dir.checkpoints / "step-00000006"
    events = train(config_of("one rank", data, resume_from=str(given)), RunDir(tmp_path / "other"))
    assert [(event["kind"], event["step"]) for event in events] == [
        ("training_started", 6),
        ("evaluated", 6),  # the other run's result is this one's beginning
        ("step", 7),
        ("evaluated", 7),
        ("checkpoint_saved", 7),
    ]
    assert events[0]["checkpoint"] == str(given)
    for event in events:
        if "loss" in event:
            (theirs,) = (e for e in of_kind(source.events, event["kind"]) if e["step"] == event["step"])
            assert event["loss"] == pytest.approx(theirs["loss"], rel=2e-6)
    store.verify(given)


def test_a_damaged_checkpoint_of_another_run_is_refused(
    data: Path, tmp_path: Path, runs: Callable[..., Trained]
) -> None:
    source = runs("DP2 ZeRO-2").run_dir.checkpoints / "step-00000006"
    given = tmp_path / source.name
    given.mkdir()
    for path in source.iterdir():
        (given / path.name).write_bytes(path.read_bytes() + b"\0" * (path.suffix == ".safetensors"))
    config, run_dir = config_of("one rank", data, resume_from=str(given)), RunDir(tmp_path / "other")
    run_dir.create(config)
    run_on_ranks(config, refuses(run_dir, "is damaged: .* does not have the size and hash"))
