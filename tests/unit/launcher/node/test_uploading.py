"""The thread that uploads: whatever a store raises, from the first word on, it goes on."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from launcher.node import uploading
from launcher.node.uploading import Uploads
from made_checkpoints import write_checkpoint
from trainer.checkpoint.remote.copies import Remote
from trainer.checkpoint.service.saving import Machine
from trainer.config import RunConfig
from trainer.events import EventLog, read_events
from trainer.run_dir import RunDir
from unreliable_store import ODD_ERRORS, Trouble, UnreliableStore

TENSORS = {"master/weight": np.arange(64, dtype=np.float32).reshape(8, 8)}


@pytest.fixture
def trouble() -> Iterator[Trouble]:
    UnreliableStore.trouble = Trouble()
    yield UnreliableStore.trouble
    UnreliableStore.trouble = Trouble()


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(uploading, "_FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(uploading, "_PASS_SECONDS", 0.01)
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(RunConfig())
    return run_dir


def started(run_dir: RunDir, url: str) -> Uploads:
    log = EventLog(run_dir.events_path)
    uploads = Uploads(url, RunConfig(), run_dir, range(2), log, Machine(0, 1))
    uploads.start()
    return uploads


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def told(run_dir: RunDir) -> list[tuple[str, int]]:
    return [(event["kind"], event["step"]) for event in read_events(run_dir.events_path)]


def test_a_store_that_cannot_be_opened_is_tried_again(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Trouble
) -> None:
    """Whatever it raises; and what is the same is said once."""
    url, tries, really_open = f"unreliable://{tmp_path}/remote", list[str](), Remote.open

    def open_remote(url: str) -> Remote:
        tries.append(url)
        if len(tries) <= 2 * len(ODD_ERRORS):
            raise ODD_ERRORS[(len(tries) - 1) // 2]()
        return really_open(url)

    monkeypatch.setattr(uploading.Remote, "open", staticmethod(open_remote))
    monkeypatch.setattr(uploading, "_LONGEST_RETRY_SECONDS", 0.02)
    uploads = started(run_dir, url)
    write_checkpoint(run_dir.checkpoints, 10, TENSORS, files=2)
    wait_for(lambda: ("checkpoint_uploaded", 10) in told(run_dir))
    assert told(run_dir) == [("checkpoint_upload_failed", 10)] * len(ODD_ERRORS) + [("checkpoint_uploaded", 10)]
    assert all("\n" not in event["reason"] for event in read_events(run_dir.events_path)[: len(ODD_ERRORS)])
    assert uploads.finish(lambda: True)


def test_the_end_tries_at_once_what_has_failed(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Trouble
) -> None:
    monkeypatch.setattr(uploading, "_FIRST_RETRY_SECONDS", 1e9)
    (tmp_path / "remote").write_text("in the way")
    uploads = started(run_dir, str(tmp_path / "remote"))
    write_checkpoint(run_dir.checkpoints, 10, TENSORS, files=2)
    wait_for(lambda: told(run_dir) == [("checkpoint_upload_failed", 10)])
    (tmp_path / "remote").unlink()
    assert uploads.finish(lambda: True)
    assert told(run_dir)[-1] == ("checkpoint_uploaded", 10)


def test_without_a_checkpoint_nobody_asks_the_store_and_the_end_waits_for_nothing(
    run_dir: RunDir, tmp_path: Path, trouble: Trouble
) -> None:
    assert started(run_dir, f"unreliable://{tmp_path}/remote").finish(lambda: True)
    assert not trouble.operations and not (tmp_path / "remote").exists()
