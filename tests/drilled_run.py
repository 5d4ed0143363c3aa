"""A small run that drills are made of, and what must hold when it has ended, whatever was done to it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.pipeline import prepare
from small_run import BROADGAUGE, write_config
from trainer import config_file
from trainer.checkpoint.format import store
from trainer.checkpoint.format.global_tensors import GlobalTensors
from trainer.checkpoint.format.manifest import read_manifest
from trainer.checkpoint.service.room import room_path
from trainer.config import RunConfig
from trainer.data.digest import as_hex, from_hex
from trainer.data.ledger.audit import audit
from trainer.events import Event, read_events, surviving_steps
from trainer.run_dir import RunDir
from trainer.schedule import Schedule
from trainer.training_state import STATE_KINDS

NUM_STEPS = 16

PATIENT = {"max_failures": 1000, "max_same_failures": 1000, "delay_seconds": 0.0, "patience_seconds": 60.0}
"""What a drill does to a run is no reason to give up."""

LAYOUTS: dict[str, dict[str, int]] = {
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
    "TP2 x DP2 ZeRO-1": {"tensor": 2, "pipeline": 1, "data": 2, "zero": 1},
}
OTHER_LAYOUTS: dict[str, dict[str, int]] = {
    "DP2 ZeRO-1": {"tensor": 1, "pipeline": 1, "data": 2, "zero": 1},
    "PP2 x DP2": {"tensor": 1, "pipeline": 2, "data": 2, "zero": 1},
}


@dataclass(frozen=True)
class DrilledRun:
    """A run of a small model, and the files of its config."""

    config: RunConfig
    config_file: Path
    run_dir: RunDir

    @property
    def snapshots_in(self) -> Path:
        return Path(self.config.checkpoint.snapshots_in)

    @property
    def room(self) -> Path:
        return room_path(self.snapshots_in, self.run_dir.path, self.run_dir.id, node=0)

    @property
    def command(self) -> list[str]:
        return [BROADGAUGE, "train", str(self.config_file), "--run-dir", str(self.run_dir.path)]

    def events(self, *kinds: str) -> list[Event]:
        return [event for event in read_events(self.run_dir.events_path) if not kinds or event["kind"] in kinds]


class SmallJob:
    """Prepared data, and configs that train on it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = config_file.load(write_config(folder))
        prepare(
            config.data,
            vocab_size=config.model.vocab_size,
            seq_length=config.model.seq_length,
            out=folder / "data",
            min_train_tokens=config.tokens_per_step + 1,
            workers=1,
        )

    def new_run(
        self,
        folder: Path,
        num_steps: int = NUM_STEPS,
        layout: str = "TP2 x PP2",
        *,
        launch: Mapping[str, object] | None = None,
        supervise: Mapping[str, object] | None = None,
        **checkpoint: Any,
    ) -> DrilledRun:
        """A run of so many steps whose snapshots lie in its own folder unless `checkpoint` says otherwise."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "snapshots").mkdir()
        every = {"every_steps": 4, "snapshot_every_steps": 1, "keep_last": 3}
        path = write_config(
            folder,
            train={"total_tokens": num_steps * 8 * 32, "global_batch_size": 8, "micro_batch_size": 2},
            data={"prepared": str(self._folder / "data")},
            optimizer={"warmup_tokens": 1000},
            parallel=(LAYOUTS | OTHER_LAYOUTS)[layout],
            evaluation={"every_steps": 10, "max_sequences": 4},
            checkpoint={**every, "snapshots_in": str(folder / "snapshots"), **checkpoint},
            launch={"threads_per_rank": 1, **(launch or {})},
            supervise={**PATIENT, **(supervise or {})},
        )
        run = DrilledRun(config_file.load(path), path, RunDir(folder / "run"))
        run.run_dir.create(run.config)  # gives it the id by which its room is found
        return run


def processes_of(run: DrilledRun) -> dict[int, str]:
    """Process id -> command line of what works on the run."""
    lines = {int(pid): read_proc(pid, "cmdline").replace("\0", " ") for pid in os.listdir("/proc") if pid.isdigit()}
    return {pid: line for pid, line in lines.items() if f"{run.run_dir.path}" in line and _state(pid) not in "ZX"}


def read_proc(pid: int | str, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _state(pid: int) -> str:
    return read_proc(pid, "stat").rpartition(")")[2].strip()[:1] or "X"


# ---------------------------------------------------------------------------------------------------- what must hold


def expect_as_if_undisturbed(run: DrilledRun, undisturbed: DrilledRun) -> None:
    """The run has ended as the other has, bit for bit, and has left nothing behind."""
    expect_sound_resumes(run)
    expect_exact_ledger(run)
    assert history(run) == history(undisturbed)
    assert evaluations(run) == evaluations(undisturbed)
    expect_same_state(last_checkpoint(run), last_checkpoint(undisturbed))
    for step in store.steps(run.run_dir.checkpoints):
        store.verify(run.run_dir.checkpoints / store.folder_name(step))
    expect_nothing_left(run)


def history(run: DrilledRun) -> list[Event]:
    """The steps that count, without what may differ."""
    steps = surviving_steps(run.events())
    return [
        {name: value for name, value in step.items() if name not in ("time", "seconds", "phases")} for step in steps
    ]


def evaluations(run: DrilledRun) -> dict[int, float]:
    """Held-out loss by step; a step that was evaluated twice has the same twice."""
    found: dict[int, float] = {}
    for event in run.events("evaluated"):
        assert found.setdefault(event["step"], event["loss"]) == event["loss"]
    return found


def last_checkpoint(run: DrilledRun) -> Path:
    return run.run_dir.checkpoints / store.folder_name(Schedule(run.config).num_steps)


def expect_sound_resumes(run: DrilledRun) -> None:
    """Every life but those before the first save began from a checkpoint, none older than one that was committed."""
    committed = 0
    for event in run.events("checkpoint_saved", "training_started"):
        if event["kind"] == "checkpoint_saved":
            committed = max(committed, event["step"])
            continue
        assert event["step"] >= committed
        if event["checkpoint"] is None:
            assert (event["step"], committed) == (0, 0)
        else:
            folder = run.room if event["tier"] == "memory" else run.run_dir.checkpoints
            assert Path(event["checkpoint"]) == folder.resolve() / store.folder_name(event["step"])


def expect_exact_ledger(run: DrilledRun) -> None:
    """Every sample once, and the checkpoint says so too."""
    steps, next_sample, digest = surviving_steps(run.events()), 0, 0
    assert [step["step"] for step in steps] == list(range(1, Schedule(run.config).num_steps + 1))
    for step in steps:
        assert step["first_sample"] == next_sample
        next_sample += step["num_samples"]
        digest += from_hex(step["tokens_xxh3"])
    assert not audit(run.run_dir).findings
    manifest = read_manifest(last_checkpoint(run))
    assert (manifest.consumed_samples, manifest.data_digest) == (next_sample, as_hex(digest))


def expect_same_state(mine: Path, theirs: Path) -> None:
    for kind in STATE_KINDS:
        ours, other = GlobalTensors(mine, kind), GlobalTensors(theirs, kind)
        assert ours.shapes == other.shapes and ours.shapes
        for name in ours:
            assert torch.equal(ours[name].view(torch.int32), other[name].view(torch.int32)), f"{kind}/{name}"


def expect_nothing_left(run: DrilledRun) -> None:
    """No process, no memory, and no file that is half of something."""
    assert not processes_of(run)
    assert not list(run.snapshots_in.iterdir())
    left = [path for path in run.run_dir.checkpoints.iterdir() if path.suffix]
    assert not left
