"""Writes the events and checkpoints of a run from its schedule and data, as training would, without training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from data_pipeline.shards import ShardWriter, TokenBatch
from trainer.config import RunConfig
from trainer.data.batches import TrainingData
from trainer.data.digest import as_hex, digest, together
from trainer.data.prepared import PreparedFolder, fingerprints
from trainer.events import Event
from trainer.run_dir import RunDir
from trainer.schedule import Schedule


def write_data(folder: Path, windows: dict[str, int], seq_length: int) -> Path:
    """A prepared folder of data sets with so many windows, of random tokens, and a manifest."""
    draw = np.random.default_rng(11)
    for name, num_windows in windows.items():
        (folder / name).mkdir(parents=True)
        with ShardWriter(folder / name / "train", 1000, end_of_text_id=999) as writer:
            writer.add(TokenBatch.of([draw.integers(0, 999, num_windows * seq_length).astype(np.uint16)]))
            writer.finish()
            writer.commit()
    files = {f"{name}/train.bin": {"xxh3_128": name} for name in windows}
    manifest = {"datasets": {name: {} for name in windows}, "tokenizer_fingerprint": "aa", "files": files}
    (folder / "manifest.json").write_bytes(orjson.dumps(manifest))
    return folder


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds, or a fresh start."""

    step: int = 0
    path: str | None = None
    total: int = 0
    quarantined: frozenset[int] = frozenset()


class SimulatedRun:
    """A run that does what it is told, step by step; `events` may be tampered with before `write`."""

    def __init__(self, path: Path, config: RunConfig, origin: "SimulatedRun | None" = None) -> None:
        """`origin` is a run whose newest checkpoint this one goes on from."""
        self.run_dir = RunDir(path)
        self.run_dir.create(config)
        self.config = config
        self.events: list[Event] = []
        self.data_parallel = 1
        self._schedule = Schedule(config)
        folder = self.run_dir.data_for(config)
        self.data = TrainingData.open(PreparedFolder.open(folder), config)
        self._fingerprints = fingerprints(config, folder)
        self._saved = [origin.newest() if origin else Saved()]
        self._start()

    def newest(self) -> Saved:
        return self._saved[-1]

    def steps(self, count: int) -> None:
        for _ in range(count):
            self._take(None)

    def skip(self, reason: str = "loss spike") -> None:
        self._take(reason)

    def save(self) -> None:
        path = self.run_dir.checkpoints / f"step-{self.step:08d}"
        path.mkdir(exist_ok=True)
        consumed = self._schedule.consumed_samples(self.step)
        stated = {"step": self.step, "consumed_samples": consumed, "data_digest": as_hex(self._total)}
        (path / "manifest.json").write_bytes(orjson.dumps({**stated, "data": self._fingerprints}))
        self._saved.append(Saved(self.step, str(path), self._total, self._quarantined))
        self._record("checkpoint_saved", step=self.step, path=str(path), bytes=0, seconds=0)

    def crash(self, data_parallel: int | None = None, lose: int = 0) -> None:
        """Start again from the newest checkpoint, or from one before it when the `lose` newest are damaged."""
        self.data_parallel = data_parallel or self.data_parallel
        del self._saved[max(1, len(self._saved) - lose) :]
        self._start()

    def roll_back(self, quarantine: Sequence[int]) -> None:
        newest = self.newest()
        steps = {"from_step": self.step, "to_step": newest.step, "quarantined": list(quarantine)}
        self._record("rolled_back", reason="loss spike", checkpoint=newest.path, **steps)
        self._go_back(self._quarantined | newest.quarantined | set(quarantine))

    def write(self) -> RunDir:
        self.run_dir.events_path.write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in self.events))
        return self.run_dir

    def event_of(self, step: int) -> Event:
        """The last event of a step."""
        return next(e for e in reversed(self.events) if e["kind"] in ("step", "step_skipped") and e["step"] == step)

    def _start(self) -> None:
        newest = self.newest()
        self._record("training_started", step=newest.step, checkpoint=newest.path, threads_per_rank=1)
        self._go_back(newest.quarantined)

    def _go_back(self, quarantined: frozenset[int]) -> None:
        self.step, self._total, self._quarantined = self.newest().step, self.newest().total, quarantined

    def _take(self, reason: str | None) -> None:
        place = self._schedule.step_after(self.step)
        self.step += 1
        reason = "quarantined" if self.step in self._quarantined else reason
        samples: dict[str, object] = {
            "first_sample": place.first_sample,
            "num_samples": place.batch_size,
            "tokens_xxh3": None,
        }
        if reason != "quarantined":
            seen = self.digest_of(place.first_sample, place.batch_size)
            samples["tokens_xxh3"] = as_hex(seen)
            self._total += seen
        if reason is None:
            self._record("step", step=self.step, tokens=place.tokens_after, loss=1.0, **samples)
        else:
            self._record("step_skipped", step=self.step, reason=reason, loss=None, **samples)

    def digest_of(self, first_sample: int, batch_size: int) -> int:
        """As replicas add theirs up, each of which draws its share."""
        parallel = self.config.parallel.model_copy(update={"data": self.data_parallel})
        config = self.config.model_copy(update={"parallel": parallel})
        data = TrainingData(self.data.readers, self.data.blend, config)
        replicas = [data.replica_tokens(first_sample, batch_size, rank) for rank in range(self.data_parallel)]
        return together(*map(digest, replicas))

    def _record(self, kind: str, **fields: object) -> None:
        self.events.append({"time": float(len(self.events)), "kind": kind, **fields})
