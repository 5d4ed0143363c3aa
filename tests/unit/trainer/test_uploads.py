"""Uploads beside training: the newest first, every machine its own files, and no trouble with the store lasts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made_checkpoints import fail_to_read, write_checkpoint
from trainer.checkpoint.format import store
from trainer.checkpoint.remote.copies import Remote
from trainer.checkpoint.service.saving import Machine
from trainer.checkpoint.service.uploads import Uploader
from trainer.config import CheckpointConfig
from unreliable_store import Trouble, UnreliableStore

TENSORS = {"master/weight": np.arange(64, dtype=np.float32).reshape(8, 8)}


@dataclass
class World:
    """A run of four ranks with its checkpoints, what was recorded, and a clock that stands still."""

    folder: Path
    url: str
    policy: CheckpointConfig = CheckpointConfig(keep_last=2)  # noqa: RUF009
    events: list[tuple[str, int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    now: float = 0.0

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def remote(self) -> Remote:
        return Remote.open(self.url)

    def save(self, *steps: int, **facts: Any) -> None:
        for step in steps:
            write_checkpoint(self.checkpoints, step, TENSORS, files=4, **facts)

    def record(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields["step"]))
        self.reasons += [fields["reason"]] if "reason" in fields else []

    def uploader(self, node: int = 0, num_nodes: int = 1) -> Uploader:
        per_node = 4 // num_nodes
        ranks = range(node * per_node, (node + 1) * per_node)
        machine = Machine(node, num_nodes)
        return Uploader(self.remote, self.checkpoints, self.policy, ranks, self.record, machine, clock=lambda: self.now)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, str(tmp_path / "remote"))


@pytest.fixture
def trouble() -> Iterator[Trouble]:
    UnreliableStore.trouble = Trouble()
    yield UnreliableStore.trouble
    UnreliableStore.trouble.released.set()
    UnreliableStore.trouble = Trouble()


def settle(*uploaders: Uploader) -> None:
    while any(uploader.work() for uploader in uploaders):
        pass


def test_what_was_committed_can_be_fetched_elsewhere(world: World, tmp_path: Path) -> None:
    world.save(10)
    uploader = world.uploader()
    assert not uploader.is_idle()
    settle(uploader)
    assert uploader.is_idle() and world.events == [("checkpoint_uploaded", 10)]
    fetched = world.remote.fetch(10, tmp_path / "elsewhere")
    assert store.verify(fetched) == store.verify(world.checkpoints / store.folder_name(10))


def test_only_the_newest_of_several_is_sent_but_for_those_kept_for_ever(world: World) -> None:
    world.policy = CheckpointConfig(keep_last=1, keep_every_steps=20)
    world.save(10, 20, 30, 50)
    settle(world.uploader())
    assert [step for _, step in world.events] == [50, 20]
    assert world.remote.steps() == [20, 50]


def test_retention_holds_there_too(world: World) -> None:
    world.policy = CheckpointConfig(keep_last=1, keep_best=1)
    uploader = world.uploader()
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.6)):
        world.save(step, heldout_loss=loss)
        settle(uploader)
    assert world.remote.steps() == [20, 40]


def test_the_first_machine_commits_once_the_others_have_sent_their_files(world: World) -> None:
    world.save(10)
    first, second = world.uploader(0, 2), world.uploader(1, 2)
    assert not first.work() and world.remote.steps() == [] and world.events == []
    assert second.work() and second.is_idle() and world.remote.steps() == []
    assert not first.work()  # it waits a little before it looks again
    world.now += 2.0
    assert first.work() and world.remote.steps() == [10] and world.events == [("checkpoint_uploaded", 10)]


def test_trouble_is_recorded_once_and_tried_again_later_and_later(world: World, trouble: Trouble) -> None:
    world.url = f"unreliable://{world.folder}/remote"
    world.save(10)
    uploader = world.uploader()
    trouble.read_only = True
    waits = []
    for _ in range(12):
        before = world.now
        assert not uploader.work()
        while not uploader._retry_at <= world.now:
            world.now += 1.0
        waits.append(world.now - before)
    assert waits[:4] == [2.0, 4.0, 8.0, 16.0] and max(waits) == 300.0
    assert [kind for kind, _ in world.events] == ["checkpoint_upload_failed"]
    assert "read-only" in world.reasons[0].lower() and "\n" not in world.reasons[0]
    trouble.read_only = False
    assert uploader.work() and world.remote.steps() == [10]
    assert world.events[-1] == ("checkpoint_uploaded", 10)


def test_a_newer_checkpoint_takes_the_place_of_one_that_could_not_be_sent(world: World, trouble: Trouble) -> None:
    world.url = f"unreliable://{world.folder}/remote"
    world.save(10)
    uploader = world.uploader()
    trouble.read_only = True
    assert not uploader.work()
    trouble.read_only = False
    world.save(20)
    uploader.retry_now()
    settle(uploader)
    assert world.remote.steps() == [20] and uploader.is_idle()


def test_one_that_cannot_be_read_just_now_is_tried_again(world: World) -> None:
    world.save(10)
    uploader, manifest = world.uploader(), world.checkpoints / store.folder_name(10) / "manifest.json"
    aside = fail_to_read(manifest)
    assert not uploader.work() and not uploader.is_idle()
    assert world.events == [("checkpoint_upload_failed", 10)] and "Input/output error" in world.reasons[0]
    aside.replace(manifest)
    assert not uploader.work()  # it waits a little before it tries again
    world.now += 2.0
    assert uploader.work() and world.remote.steps() == [10]


def test_a_step_that_was_written_again_is_sent_again(world: World) -> None:
    uploader = world.uploader()
    world.save(10, 20, 50)
    settle(uploader)
    world.save(10, heldout_loss=2.0)  # the run went back, so what was written last is not of the last step
    assert not uploader.is_idle()
    settle(uploader)
    assert [step for _, step in world.events] == [50, 10] and uploader.is_idle()
    world.save(20)
    settle(uploader)
    world.save(50, heldout_loss=1.0)
    settle(uploader)
    assert [step for _, step in world.events] == [50, 10, 20, 50]
    assert [world.remote.read_manifest(step).heldout_loss for step in (20, 50)] == [None, 1.0]


def test_retention_there_goes_by_what_was_written_again(world: World) -> None:
    world.policy = CheckpointConfig(keep_last=1, keep_best=1)
    uploader = world.uploader()
    for step, loss in ((10, 1.0), (20, 2.0), (10, 9.0), (20, 2.0), (30, 3.0)):
        world.save(step, heldout_loss=loss)
        settle(uploader)
    assert world.remote.steps() == [20, 30]


def test_trouble_of_which_nobody_thought_is_recorded_and_tried_again(world: World) -> None:
    trouble, record = [KeyError("unthinkable")], world.record

    def fails_once(kind: str, **fields: Any) -> None:
        if kind == "checkpoint_uploaded" and trouble:
            raise trouble.pop()
        record(kind, **fields)

    world.record = fails_once  # type: ignore[method-assign]
    world.save(10)
    uploader = world.uploader()
    assert not uploader.work() and not uploader.is_idle()
    assert world.events == [("checkpoint_upload_failed", 10)] and world.reasons == ["KeyError: 'unthinkable'"]
    assert not uploader.work()
    world.now += 2.0
    assert uploader.work() and world.events[-1] == ("checkpoint_uploaded", 10)


def test_a_folder_that_cannot_be_listed_ends_no_uploads(world: World) -> None:
    unlistable = world.folder / ("x" * 300)  # a name that no file system takes
    uploader = Uploader(world.remote, unlistable, world.policy, range(4), world.record, Machine(0, 1))
    assert not uploader.work() and not uploader.is_idle() and not world.events


def test_a_damaged_copy_does_not_keep_others_from_being_sent(world: World) -> None:
    world.policy = CheckpointConfig(keep_last=1)
    uploader = world.uploader()
    world.save(10)
    settle(uploader)
    copy = Path(world.url) / store.folder_name(10)
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").mkdir()  # no store reads that
    for step in (20, 30):
        world.save(step)
        settle(uploader)
        assert uploader.is_idle() and world.events[-1] == ("checkpoint_uploaded", step)
    assert not world.reasons


def test_a_damaged_checkpoint_is_named_and_not_sent(world: World) -> None:
    world.save(10)
    victim = world.checkpoints / store.folder_name(10) / "rank-00002.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    uploader = world.uploader()
    settle(uploader)
    assert world.remote.steps() == [] and world.events == [("checkpoint_upload_failed", 10)]
    assert "rank-00002.safetensors does not have the size and hash" in world.reasons[0]
    world.save(20)
    settle(uploader)
    assert world.remote.steps() == [20]
