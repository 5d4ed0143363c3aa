"""The checkpoint service of one machine and of several: whatever kills it or fails, a save ends whole or not at all."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from effects import before_effect, killed_at, killed_here
from made_snapshots import World, folder_in_memory, names, work_until_idle
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import read_manifest
from trainer.checkpoint.service import saving as service_module

MOST_EFFECTS = 400


@pytest.fixture
def memory() -> Iterator[Path]:
    with folder_in_memory() as folder:
        yield folder


# -------------------------------------------------------------------------------------------------------------- a save


def test_a_snapshot_becomes_a_checkpoint(tmp_path: Path) -> None:
    world = World(tmp_path)
    (room,) = world.rooms
    service = world.service()
    assert not service.work() and service.is_idle() and not world.is_busy()
    written = world.snapshot(10)
    assert world.is_busy() and not service.is_idle()
    assert service.work() and service.is_idle() and not world.is_busy() and not service.work()
    assert world.committed(10) == written and names(world.checkpoints) == ["step-00000010"]
    manifest = read_manifest(world.checkpoints / "step-00000010")
    assert (manifest.step, manifest.consumed_samples, manifest.written_at, manifest.num_updates) == (10, 160, 1.0, 10)
    (event,) = world.events
    num_bytes = sum(map(len, written.values()))
    assert (event["kind"], event["step"], event["bytes"]) == ("checkpoint_saved", 10, num_bytes)
    assert event["path"] == str(world.checkpoints / "step-00000010") and event["seconds"] == 0.0
    assert [each.step for each in room.restartable()] == [10]


def test_a_snapshot_for_restarts_alone_is_hashed_and_not_written(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.snapshot(10, durable=False)
    work_until_idle(world.service())
    assert not world.is_busy() and not world.checkpoints.exists() and not world.events
    (snapshot,) = world.rooms[0].restartable()
    store.verify(snapshot.path)


def test_retention_follows_a_save(tmp_path: Path) -> None:
    world = World(tmp_path, keep_last=2, keep_every_steps=20)
    service = world.service()
    for step in (10, 20, 30, 40, 50):
        world.snapshot(step)
        work_until_idle(service)
    assert names(world.checkpoints) == ["step-00000020", "step-00000040", "step-00000050"]


# --------------------------------------------------------------------------------------------------------------- death


@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize(
    ("dies", "stride"), [(killed_here, 1), (killed_at, 11), pytest.param(killed_at, 1, marks=pytest.mark.slow)]
)
def test_a_service_killed_at_any_moment_is_replaced(
    memory: Path, dies: Callable[[int, Callable[[], Any]], bool], stride: int, ending: bool
) -> None:
    """At every effect: a file is opened, made room for, written, synced, renamed or removed."""
    for number in range(0, MOST_EFFECTS, stride):
        world = World(memory / str(number), keep_last=1)
        world.snapshot(10)
        work_until_idle(world.service())
        written = world.snapshot(20)
        doomed = world.service()
        died = dies(number, doomed.finish if ending else lambda doomed=doomed: work_until_idle(doomed))
        _check_replacement(world, written, ending)
        if not died:
            break
    assert 50 < number < MOST_EFFECTS - 1, "not every moment was tried"


def _check_replacement(world: World, written: dict[str, bytes], ending: bool) -> None:
    (room,) = world.rooms
    successor = world.service()
    if ending:
        successor.finish()
        assert world.committed(20) == written and names(world.folder / "memory") == []
        return
    work_until_idle(successor)
    assert world.committed(20) == written and not world.is_busy()
    assert names(room.path) in (["spare", "step-00000020"], ["step-00000020"])
    later = world.snapshot(30)
    work_until_idle(successor)
    assert world.committed(30) == later and names(world.checkpoints) == ["step-00000030"]
    assert names(room.path) == ["spare", "step-00000030"]
    assert not any(event["kind"] == "checkpoint_failed" for event in world.events)


def test_a_temporary_folder_that_was_cleared_away_is_written_again(tmp_path: Path) -> None:
    """As a job does when it starts: it cannot know that its services go on with what is there."""
    world = World(tmp_path, num_nodes=2)
    written = world.snapshot(10)
    services = [world.service(node) for node in (0, 1)]
    services[0].work()
    assert names(world.checkpoints) == ["step-00000010.tmp"]
    store.clear_leftovers(world.checkpoints)
    work_until_idle(*services)
    assert world.committed(10) == written


# ---------------------------------------------------------------------------------------------------- several machines


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_machines_in_any_order_make_one_checkpoint(memory: Path, num_nodes: int) -> None:
    for seed in range(12):
        world = World(memory / str(seed), num_nodes, keep_last=1)
        draw = random.Random(seed)
        services = [world.service(node) for node in range(num_nodes)]
        for step in (10, 20):
            written = world.snapshot(step)
            while world.is_busy():
                services[draw.randrange(num_nodes)].work()
            assert world.committed(step) == written
        work_until_idle(*services)
        assert names(world.checkpoints) == ["step-00000020"]
        assert world.kinds() == [("checkpoint_saved", 10), ("checkpoint_saved", 20)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_machine_whose_service_is_killed_catches_up(memory: Path, victim: int) -> None:
    """At every effect of its own; before, the other has done nothing, or all that it can; and it goes on afterwards."""
    for number in range(MOST_EFFECTS):
        died = False
        for is_other_first in (False, True):
            world = World(memory / f"{number}-{is_other_first}", 2)
            written = world.snapshot(20)
            other, doomed = world.service(1 - victim), world.service(victim)
            if is_other_first:
                work_until_idle(other)
            died |= killed_here(number, lambda doomed=doomed: work_until_idle(doomed))
            work_until_idle(other)
            work_until_idle(other, world.service(victim))
            assert world.committed(20) == written and names(world.checkpoints) == ["step-00000020"]
            assert not world.is_busy()
        if not died:
            break
    assert 20 < number < MOST_EFFECTS - 1


def test_machines_that_work_between_any_two_effects_of_another_make_one_checkpoint(memory: Path) -> None:
    for number in range(MOST_EFFECTS):
        world = World(memory / str(number), 2)
        written = world.snapshot(20)
        first, second = world.service(0), world.service(1)
        with before_effect(number, second.work) as seen:
            work_until_idle(first)
        work_until_idle(first, second)
        assert world.committed(20) == written and names(world.checkpoints) == ["step-00000020"]
        if seen.num <= number:
            break
    assert 20 < number < MOST_EFFECTS - 1


def test_any_history_of_deaths_ends_in_the_same_checkpoint(memory: Path) -> None:
    for seed in range(30):
        draw = random.Random(seed)
        num_nodes = draw.choice([2, 3])
        world = World(memory / str(seed), num_nodes)
        written = world.snapshot(20)
        services = [world.service(node) for node in range(num_nodes)]
        for _ in range(8):
            node = draw.randrange(num_nodes)
            if killed_here(draw.randrange(40), services[node].work):
                services[node] = world.service(node)
        work_until_idle(*services)
        assert world.committed(20) == written and not world.is_busy(), seed
        assert names(world.checkpoints) == ["step-00000020"], seed


def test_parts_of_an_earlier_attempt_are_never_mixed_in(tmp_path: Path) -> None:
    """The run went back while a machine had written its part, and came to the same step with other weights."""
    world = World(tmp_path, 2)
    world.snapshot(20, attempt=1.0)
    work_until_idle(world.service(1))
    for room in world.rooms:
        room.void_after(0)
    written = world.snapshot(20, attempt=2.0)
    first, second = world.service(0), world.service(1)
    work_until_idle(first)
    assert store.steps(world.checkpoints) == [] and world.is_busy()
    work_until_idle(second, first)
    assert world.committed(20) == written and read_manifest(world.checkpoints / "step-00000020").written_at == 2.0


def test_another_history_of_a_step_replaces_its_checkpoint(tmp_path: Path) -> None:
    world = World(tmp_path)
    for attempt in (1.0, 2.0):
        written = world.snapshot(20, attempt=attempt)
        work_until_idle(world.service())
        assert world.committed(20) == written
        world.rooms[0].void_after(0)
    assert names(world.checkpoints) == ["step-00000020"]


def test_a_part_that_never_comes_does_not_hold_the_run_up_for_ever(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    written = world.snapshot(20)
    first, second = world.service(0), world.service(1)
    work_until_idle(first)
    world.now += service_module._OTHERS_SECONDS
    work_until_idle(first)
    assert world.rooms[0].is_busy() and not world.events
    world.now += 1
    work_until_idle(first)
    assert not world.rooms[0].is_busy()
    assert world.events == [
        {"kind": "checkpoint_failed", "step": 20, "reason": "after 600 s there is no part of machine 1"}
    ]
    world.now += service_module._RETRY_SECONDS
    work_until_idle(second, first)
    assert world.committed(20) == written


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_part_that_is_cleared_away_before_the_commit_is_written_again(tmp_path: Path, is_replaced: bool) -> None:
    world = World(tmp_path, 2)
    written = world.snapshot(20)
    first, second = world.service(0), world.service(1)
    work_until_idle(second)
    assert not world.rooms[1].is_busy() and not second.is_idle()  # what it wrote the first machine may not have seen
    store.clear_leftovers(world.checkpoints)
    work_until_idle(first, world.service(1) if is_replaced else second)
    assert world.committed(20) == written and not world.is_busy()
    assert [each.is_saved() for room in world.rooms for each in room.snapshots()] == [True, True]


def test_what_the_first_machine_gave_up_holds_nobody_up_and_goes_with_the_next(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.snapshot(20)
    first, second = world.service(0), world.service(1)
    work_until_idle(second)
    (in_the_way := world.checkpoints / "step-00000020.tmp" / "rank-00000.safetensors").mkdir()
    work_until_idle(first, second)
    assert world.kinds() == [("checkpoint_failed", 20)] and not world.is_busy()
    in_the_way.rmdir()
    written = world.snapshot(30)
    work_until_idle(second, first, second)
    assert world.committed(30) == written and names(world.checkpoints) == ["step-00000030"]
    assert [[each.step for each in room.snapshots()] for room in world.rooms] == [[30], [30]]


@pytest.mark.parametrize("is_committed", [True, False])
def test_at_the_end_a_machine_gives_memory_back_when_the_first_has_committed(
    tmp_path: Path, is_committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or keeps it, after a time, for the next life of the run."""
    world = World(tmp_path, 2)
    written = world.snapshot(20)
    first, second = world.service(0), world.service(1)
    passes = []

    def sleep(seconds: float) -> None:
        passes.append(world.rooms[1].path.exists())
        world.now += 1.0
        if is_committed and len(passes) == 30:
            first.work()

    monkeypatch.setattr(service_module.time, "sleep", sleep)
    second.finish()
    assert all(passes) and len(passes) in ((30, 31) if is_committed else (60, 61))
    assert world.rooms[1].path.exists() == (not is_committed)
    assert (store.steps(world.checkpoints) == [20]) == is_committed
    if is_committed:
        assert world.committed(20) == written


# ----------------------------------------------------------------------------------------- ranks that go back meanwhile


@pytest.mark.parametrize("comes_again", [False, True])
def test_ranks_may_void_a_snapshot_at_any_moment_of_its_save(memory: Path, comes_again: bool) -> None:
    """And may come to the same step again at once, with other weights, in the memory of the one that went."""
    again: dict[str, bytes] = {}
    for number in range(MOST_EFFECTS):
        world = World(memory / str(number))
        written, service = world.snapshot(20), world.service()

        def go_back(world: World = world) -> None:
            world.rooms[0].void_after(10)
            if comes_again:
                again.update(world.snapshot(20, attempt=2.0))

        with before_effect(number, go_back) as seen:
            work_until_idle(service)
        world.now += service_module._RETRY_SECONDS
        work_until_idle(service)
        assert not world.is_busy()
        if seen.num <= number:
            break
        assert "checkpoint_failed" not in dict(world.kinds())
        if comes_again:
            assert world.committed(20) == again, number
        elif store.steps(world.checkpoints):
            assert world.committed(20) == written
        else:
            assert not list(world.rooms[0].snapshots())
    assert 20 < number < MOST_EFFECTS - 1


# ------------------------------------------------------------------------------------------------------ what cannot be


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own at `folder`; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, text=True)
    if done.returncode:
        assert os.environ.get("CI") != "true", f"mounting is part of what is tested: {done.stderr}"
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_recorded_once_and_tried_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    with mounted(world.checkpoints, "size=64k"):
        filler = world.checkpoints / "filler"
        filler.write_bytes(bytes(48 << 10))
        written, service = world.snapshot(20), world.service()
        work_until_idle(service)
        assert not world.is_busy() and names(world.checkpoints) == ["filler"]
        for _ in range(3):
            world.now += service_module._RETRY_SECONDS
            work_until_idle(service)
        assert world.events == [{"kind": "checkpoint_failed", "step": 20, "reason": "No space left on device"}]
        filler.unlink()
        work_until_idle(service)
        assert store.steps(world.checkpoints) == []  # not before its time
        world.now += service_module._RETRY_SECONDS
        work_until_idle(service)
        assert world.committed(20) == written and world.kinds()[1:] == [("checkpoint_saved", 20)]
        assert [each.is_saved() and each.failure() is None for each in world.rooms[0].snapshots()] == [True]


def test_a_folder_that_turns_read_only_harms_no_checkpoint(tmp_path: Path) -> None:
    world = World(tmp_path)
    with mounted(world.checkpoints, "size=4m"):
        before, service = world.snapshot(10), world.service()
        work_until_idle(service)
        subprocess.run(["mount", "-o", "remount,ro", str(world.checkpoints)], check=True)
        after = world.snapshot(20)
        work_until_idle(service)
        (failed,) = [event for event in world.events if event["kind"] == "checkpoint_failed"]
        assert failed["reason"].startswith("Read-only file system: ") and world.committed(10) == before
        service.finish()
        assert [each.step for each in world.rooms[0].restartable()] == [20]  # kept for the next life
        subprocess.run(["mount", "-o", "remount,rw", str(world.checkpoints)], check=True)
        world.service().finish()
        assert world.committed(20) == after and names(tmp_path / "memory") == []


def test_a_newer_snapshot_takes_the_place_of_one_that_could_not_be_saved(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.checkpoints.write_text("in the way")
    service = world.service()
    for step in (10, 20):
        world.snapshot(step)
        work_until_idle(service)
    assert world.kinds() == [("checkpoint_failed", 10), ("checkpoint_failed", 20)]
    assert [each.step for each in world.rooms[0].snapshots()] == [20]
    world.snapshot(25, durable=False)  # which is no checkpoint, and so takes no checkpoint's place
    work_until_idle(service)
    assert [each.step for each in world.rooms[0].snapshots()] == [20, 25]
    world.checkpoints.unlink()
    world.now += service_module._RETRY_SECONDS
    work_until_idle(service)
    assert store.steps(world.checkpoints) == [20] and [each.step for each in world.rooms[0].snapshots()] == [25]


def test_one_that_could_not_be_saved_is_not_tried_again_beside_a_newer_one(tmp_path: Path) -> None:
    """It would take the disk's time, and maybe its last place."""
    world = World(tmp_path)
    world.checkpoints.write_text("in the way")
    service = world.service()
    world.snapshot(10)
    work_until_idle(service)
    world.checkpoints.unlink()
    world.snapshot(20)
    world.now += service_module._RETRY_SECONDS
    work_until_idle(service)
    assert world.kinds() == [("checkpoint_failed", 10), ("checkpoint_saved", 20)]


def test_leftovers_of_an_attempt_that_was_given_up_go_with_the_next_save(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.snapshot(10)
    work_until_idle(world.service(1))
    for room in world.rooms:
        room.void_after(0)
    assert names(world.checkpoints) == ["step-00000010.tmp"]
    (world.checkpoints / "step-00000005.removed").mkdir()
    (world.checkpoints / "step-00000090.tmp").mkdir()  # maybe somebody writes it
    world.snapshot(20)
    work_until_idle(world.service(0), world.service(1))
    assert names(world.checkpoints) == ["step-00000020", "step-00000090.tmp"]


def test_what_reads_back_otherwise_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    written, service = world.snapshot(20), world.service()
    target = world.checkpoints / "step-00000020.tmp" / "rank-00001.safetensors"
    real = os.preadv

    def flip(descriptor: int, buffers: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(target):
            content = bytearray(target.read_bytes())
            content[-3] ^= 4
            target.write_bytes(content)
        return real(descriptor, buffers, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", flip)
        work_until_idle(service)
    reason = f"{target} reads back other than it was written"
    assert world.events == [{"kind": "checkpoint_failed", "step": 20, "reason": reason}]
    assert names(world.checkpoints) == [] and not world.is_busy()
    world.now += service_module._RETRY_SECONDS
    work_until_idle(service)
    assert world.committed(20) == written


def test_a_record_that_cannot_be_written_does_not_stop_the_service(tmp_path: Path) -> None:
    """It lies on the same full disk."""
    world = World(tmp_path)
    world.checkpoints.write_text("in the way")
    world.log.close()
    world.log._fd = os.open("/dev/full", os.O_WRONLY)
    world.snapshot(20)
    work_until_idle(world.service())
    assert not world.is_busy() and [each.failure() for each in world.rooms[0].snapshots()] != [None]


@pytest.mark.parametrize("has_spare", [True, False])
def test_memory_that_is_full_to_the_last_page_holds_nobody_up(tmp_path: Path, has_spare: bool) -> None:
    """There is a page in what is kept for the next snapshot; without that, this one is given up."""
    world = World(tmp_path)
    (room,) = world.rooms
    with mounted(tmp_path / "memory", "size=256k"):
        service = world.service()
        for step in (10, 20):
            world.snapshot(step)
            work_until_idle(service)
        if not has_spare:
            room.free_spare()
        written = world.snapshot(30)
        if has_spare:
            (room.path / "spare").mkdir(exist_ok=True)
            (room.path / "spare" / "rank-00000.safetensors").write_bytes(bytes(32 << 10))
        filler = os.open(tmp_path / "memory" / "filler", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="No space left"):
            while True:
                os.write(filler, bytes(4096))
        os.close(filler)
        work_until_idle(service)
        assert not room.is_busy()
        if has_spare:
            assert world.committed(30) == written
        else:
            reason = "no snapshot in shared memory: No space left on device"
            assert world.events[-1] == {"kind": "checkpoint_failed", "step": 30, "reason": reason}
            assert [each.step for each in room.restartable()] == [20] and store.steps(world.checkpoints) == [10, 20]


# -------------------------------------------------------------------------------------------------------------- the end


def test_at_the_end_the_newest_snapshot_becomes_a_checkpoint_even_if_it_is_not_hashed_yet(tmp_path: Path) -> None:
    world = World(tmp_path)
    service = world.service()
    world.snapshot(10)
    work_until_idle(service)
    written = world.snapshot(13, durable=False)
    service.finish()
    assert world.committed(13) == written and names(tmp_path / "memory") == []


def test_several_machines_keep_what_is_for_restarts_alone(tmp_path: Path) -> None:
    """One of them alone cannot know whether the others have it too."""
    world = World(tmp_path, 2)
    world.snapshot(13, durable=False)
    for node in (1, 0):
        world.service(node).finish()
    assert not world.checkpoints.exists()
    assert [[each.step for each in room.restartable()] for room in world.rooms] == [[13], [13]]


def test_the_end_gives_up_what_ranks_have_begun_and_tries_once_more_what_failed(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.checkpoints.write_text("in the way")
    service = world.service()
    written = world.snapshot(10)
    work_until_idle(service)
    world.rooms[0].begin_file(20, 0)
    service.finish()
    assert world.kinds() == [("checkpoint_failed", 10)] and len(list(world.rooms[0].restartable())) == 1
    world.checkpoints.unlink()
    service.finish()  # at once, though the clock stands still
    assert world.committed(10) == written and names(tmp_path / "memory") == []


@pytest.mark.parametrize("name", ["request.json", "manifest.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"facts": {}}', b"\xff", b'{"facts": 3, "durable": 1}']
)
def test_what_a_killed_writer_left_counts_as_not_there(memory: Path, name: str, content: bytes) -> None:
    world = World(memory)
    written, service = world.snapshot(20), world.service()
    (snapshot,) = world.rooms[0].snapshots()
    path = snapshot.path / name
    good = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    work_until_idle(service)
    if good is None:
        assert world.committed(20) == written
        return
    assert world.is_busy() and not world.events and store.steps(world.checkpoints) == []
    path.write_bytes(good)
    work_until_idle(service)
    assert world.committed(20) == written
