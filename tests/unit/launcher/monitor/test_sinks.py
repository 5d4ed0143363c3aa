"""Curves that other tools show are those of the record, and training does not depend on these tools."""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from launcher.monitor.sinks import feeding, sink
from launcher.monitor.sinks.feeding import Feeder
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree
from trainer.events import EventLog, read_events
from trainer.run_dir import RunDir

TESTS = Path(__file__).parents[3]


def config_for(*sinks: str) -> RunConfig:
    return from_tree({"name": "lion", "monitoring": {"sinks": list(sinks)}})


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(config_for())
    return run_dir


@pytest.fixture
def log(run_dir: RunDir) -> Iterator[EventLog]:
    log = EventLog(run_dir.events_path)
    yield log
    log.close()


def train(log: EventLog, first: int, last: int, loss: float) -> None:
    log.write("training_started", step=first - 1, ranks=4, device="NVIDIA H100")
    for step in range(first, last + 1):
        facts = {"tokens": 10 * step, "num_samples": 2, "grad_norm": 1.0, "lr": 0.1, "phases": {"loading data": 0.25}}
        log.write("step", step=step, loss=loss + step, seconds=0.5, **facts)


def told(run_dir: RunDir, log: EventLog, *sinks: str, then: Any = None) -> None:
    """By one command, during which `then` happens."""
    feeder = Feeder(config_for(*sinks), run_dir, log.write)
    if then is not None:
        then()
    feeder.close()


def curves(run_dir: RunDir) -> dict[str, dict[int, float]]:
    """As TensorBoard shows them."""
    board = EventAccumulator(str(run_dir.path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    board.Reload()
    return {name: {each.step: each.value for each in board.Scalars(name)} for name in board.Tags()["scalars"]}


def test_tensorboard_shows_the_steps_that_count(run_dir: RunDir, log: EventLog) -> None:
    """Of commands before, and of lives of this one: each step once, as it came last."""
    train(log, 1, 6, loss=100)

    def meanwhile() -> None:
        train(log, 4, 5, loss=200)
        log.write("rolled_back", from_step=5, to_step=3, reason="loss spike", quarantined=[])
        train(log, 4, 4, loss=300)
        scores = {"bits_per_byte": 1.5, "datasets": {name: {"loss": 2.25} for name in ("web", "books")}}
        log.write("evaluated", step=4, loss=2.5, uniform_loss=9.0, unigram_loss=7.0, tokens=1, **scores)

    told(run_dir, log, "tensorboard", then=meanwhile)
    found = curves(run_dir)
    assert found["train/loss"] == {1: 101, 2: 102, 3: 103, 4: 304}
    assert found["heldout/loss"] == {4: 2.5} and found["heldout/bits_per_byte"] == {4: 1.5}
    assert found["heldout/web/loss"] == found["heldout/books/loss"] == {4: 2.25}
    assert found["phases/loading_data"] == dict.fromkeys(range(1, 5), 0.25)
    assert found["speed/tokens_per_second"][1] == 2 * 2048 / 0.5 and 0 < found["speed/mfu"][1] < 1
    told(run_dir, log, "tensorboard")
    assert curves(run_dir) == found


def records(path: Path) -> Iterator[bytes]:
    """Of a file in LevelDB's log format (blocks of 32 KiB, records in fragments), after the 7 bytes of its header."""
    content, whole, place = path.read_bytes(), b"", 7
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield whole
            whole = b""


def offline_runs(run_dir: RunDir) -> list[list[dict[str, float]]]:
    """What `wandb sync` would send: of each command its rows."""
    runs = []
    for path in sorted(run_dir.path.glob("wandb/offline-run-*/run-*.wandb")):
        rows = []
        for each in records(path):
            record = wandb_internal_pb2.Record.FromString(each)
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): float(item.value_json) for item in items})
        runs.append(rows)
    return runs


COMMAND = """
import sys
from pathlib import Path

from trainer.events import EventLog
from trainer.run_dir import RunDir
from unit.launcher.monitor.test_sinks import told, train

run_dir = RunDir(Path(sys.argv[1]))
log = EventLog(run_dir.events_path)
told(run_dir, log, "wandb", then=lambda: train(log, 3, 5, loss=200))
"""


def test_weights_and_biases_is_told_what_each_command_does(run_dir: RunDir, log: EventLog) -> None:
    """In a process of its own: the package leaves threads behind."""
    train(log, 1, 2, loss=100)  # by a command that told nobody
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env["PYTHONPATH"] = f"{TESTS}:{TESTS.parent}"
    subprocess.run([sys.executable, "-c", COMMAND, str(run_dir.path)], env=env, check=True, timeout=60)
    (rows,) = offline_runs(run_dir)
    assert [(row["step"], row["train/loss"]) for row in rows] == [(3, 203), (4, 204), (5, 205)]
    assert run_dir.id in str(next(run_dir.path.glob("wandb/offline-run-*")))


class Fragile:
    remakes = False

    def __init__(self) -> None:
        self.told: list[int] = []

    def add(self, step: int, time: float, values: object) -> None:
        self.told.append(step)
        if step == 2:
            raise ConnectionError("no\nroute")

    def void_after(self, step: int) -> None: ...

    def close(self) -> None: ...


def test_a_sink_that_fails_is_left_alone_and_the_others_go_on(
    run_dir: RunDir, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    fragile = Fragile()
    monkeypatch.setattr(feeding, "WeightsAndBiases", lambda *_: fragile)
    told(run_dir, log, "wandb", "tensorboard", then=lambda: train(log, 1, 5, loss=100))
    assert fragile.told == [1, 2]
    assert len(curves(run_dir)["train/loss"]) == 5
    (failed,) = (event for event in read_events(run_dir.events_path) if event["kind"] == "sink_failed")
    assert (failed["sink"], failed["reason"]) == ("wandb", "ConnectionError: no route")


def test_a_sink_that_cannot_be_made_holds_nothing_up(run_dir: RunDir, log: EventLog) -> None:
    (run_dir.path / "tensorboard").write_text("no folder")
    told(run_dir, log, "tensorboard", then=lambda: train(log, 1, 5, loss=100))
    (failed,) = (event for event in read_events(run_dir.events_path) if event["kind"] == "sink_failed")
    assert failed["sink"] == "tensorboard" and "FileExistsError" in failed["reason"]


def test_a_package_that_is_missing_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    sink.check(config_for("tensorboard", "wandb"))
    monkeypatch.setattr(sink, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(UserError, match=r"monitoring\.sinks has wandb, .* pip install 'broadgauge\[wandb\]'"):
        sink.check(config_for("tensorboard", "wandb"))
