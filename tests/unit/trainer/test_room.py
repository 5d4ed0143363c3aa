"""The room in which ranks leave snapshots: what it keeps, what it gives back, and who may look into it."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from effects import before_effect, killed_at
from made_snapshots import World, names, work_until_idle
from trainer.checkpoint.format.manifest import Manifest, write_manifest
from trainer.checkpoint.service.presence import is_served
from trainer.checkpoint.service.room import Room, Snapshot, room_path

MOST_EFFECTS = 200


def steps(room: Room) -> list[int]:
    return [snapshot.step for snapshot in room.snapshots()]


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("rank-*")}


def only(room: Room) -> Snapshot:
    (snapshot,) = room.snapshots()
    return snapshot


# --------------------------------------------------------------------------------------------------- life of a snapshot


def test_the_states_of_a_snapshot(tmp_path: Path) -> None:
    world = World(tmp_path)
    (room,) = world.rooms
    assert not room.is_busy() and steps(room) == []
    room.begin_file(10, 0)
    room.begin_file(10, 1)
    room.finish_file(10, 0)
    assert room.is_busy() and not only(room).is_complete()
    world.snapshot(10)
    snapshot = only(room)
    assert snapshot.is_complete() and not snapshot.is_hashed() and room.is_busy() and not list(room.restartable())
    work_until_idle(world.service())
    assert (
        snapshot.is_hashed() and snapshot.is_saved() and not room.is_busy() and list(room.restartable()) == [snapshot]
    )


def test_a_snapshot_lacks_something_until_every_rank_and_the_request_are_there(tmp_path: Path) -> None:
    world = World(tmp_path, ranks_per_node=3)
    (room,) = world.rooms
    world.snapshot(10)
    for name in ("request.json", *only(room).files):
        hidden = (room.path / "step-00000010" / name).rename(tmp_path / "aside")
        assert not only(room).is_complete() and room.is_busy(), name
        assert not world.service().work()
        hidden.rename(room.path / "step-00000010" / name)
    assert only(room).is_complete()


def test_a_failure_is_no_reason_to_wait(tmp_path: Path) -> None:
    world = World(tmp_path)
    (room,) = world.rooms
    world.snapshot(10, durable=False)
    work_until_idle(world.service())
    only(room).make_durable()
    assert room.is_busy() and only(room).is_owed() and only(room).failure() is None
    only(room).mark_failed("no disk")
    assert not room.is_busy() and only(room).is_owed() and only(room).failure() == "no disk"
    facts = only(room).manifest()
    assert facts is not None
    only(room).mark_saved(facts)
    assert not room.is_busy() and not only(room).is_owed() and only(room).failure() is None


def test_saved_is_said_of_one_snapshot_and_not_of_the_step(tmp_path: Path) -> None:
    """A service that was slow says it of a snapshot that has gone, and another of the same step is in its place."""
    world = World(tmp_path)
    (room,) = world.rooms
    world.snapshot(10, attempt=1.0)
    world.service()._hash_all()
    before = only(room).manifest()
    assert before is not None
    room.void_after(0)
    world.snapshot(10, attempt=2.0)
    only(room).mark_saved(before)
    write_manifest(only(room).path, before)
    assert not only(room).is_saved() and not only(room).is_hashed() and room.is_busy()


# --------------------------------------------------------------------------------------------------------------- memory


def test_the_memory_of_a_snapshot_that_went_is_written_over(tmp_path: Path) -> None:
    """From the third on nothing new is asked for, and there are never more than two at a time."""
    world = World(tmp_path)
    (room,) = world.rooms
    service, seen = world.service(), set()
    for step in (10, 20, 30, 40, 50):
        world.snapshot(step)
        seen |= set(inodes(room.path / f"step-{step:08d}").values())
        assert len(list(room.path.rglob("rank-*.safetensors"))) <= 2 * 2
        work_until_idle(service)
    assert len(seen) == 2 * 2


def test_the_memory_is_there_again_as_soon_as_a_save_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that wait for that begin at once, and must not need new memory. Until then it is needed for restarts."""
    world = World(tmp_path, 2)
    services = [world.service(node) for node in (0, 1)]
    world.snapshot(10)
    work_until_idle(*services)
    world.snapshot(20)
    services[0].work()  # which waits for machine 1
    assert steps(world.rooms[0]) == [10, 20]
    seen: list[list[str]] = []
    real = Snapshot.mark_saved

    def mark_saved(snapshot: Snapshot, facts: Manifest) -> None:
        seen.append(names(snapshot.path.parent))
        real(snapshot, facts)

    monkeypatch.setattr(Snapshot, "mark_saved", mark_saved)
    work_until_idle(services[1], services[0])
    assert seen == [["spare", "step-00000020"]] * 2


def test_a_file_in_use_by_the_next_snapshot_is_not_touched_by_the_one_that_went(tmp_path: Path) -> None:
    world = World(tmp_path)
    (room,) = world.rooms
    world.snapshot(10, durable=False)
    work_until_idle(world.service())
    world.snapshot(20, durable=False)
    work_until_idle(world.service())
    taken = {room.begin_file(30, rank) for rank in room.ranks}
    before = {path.stat().st_ino for path in taken}
    work_until_idle(world.service())
    assert {path.stat().st_ino for path in taken} == before and names(room.path / "spare") == []
    room.void_after(20)  # they did not finish it: its memory goes
    assert steps(room) == [20] and names(room.path / "spare") == []


def test_tidy_keeps_the_newest_to_restart_from_and_what_is_still_to_be_saved(tmp_path: Path) -> None:
    world = World(tmp_path)
    (room,) = world.rooms
    world.checkpoints.write_text("in the way")  # nothing can be saved
    service = world.service()

    def add(step: int, *, durable: bool) -> list[int]:
        world.snapshot(step, durable=durable)
        work_until_idle(service)
        return steps(room)

    assert add(10, durable=False) == [10]
    assert add(20, durable=True) == [20]
    assert add(30, durable=False) == [20, 30]
    assert add(40, durable=False) == [20, 40]
    assert add(50, durable=True) == [50]
    room.begin_file(60, 0)
    room.tidy()
    assert steps(room) == [50, 60]


def test_what_could_not_be_saved_is_not_saved_after_a_newer_one(tmp_path: Path) -> None:
    world = World(tmp_path)
    (room,) = world.rooms
    world.checkpoints.write_text("in the way")
    service = world.service()
    world.snapshot(10)
    work_until_idle(service)
    world.checkpoints.unlink()
    world.snapshot(20)
    work_until_idle(service)
    assert steps(room) == [20]
    service.finish()
    assert names(world.checkpoints) == ["step-00000020"]


def test_a_newer_one_that_is_not_hashed_yet_retires_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    (room,) = world.rooms
    world.snapshot(10, durable=False)
    work_until_idle(world.service())
    world.snapshot(20, durable=False)
    room.tidy()
    assert steps(room) == [10, 20]


def test_a_snapshot_that_cannot_be_finished_gives_all_its_memory_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    (room,) = world.rooms
    world.snapshot(10)
    work_until_idle(world.service())
    world.snapshot(20)
    work_until_idle(world.service())
    room.begin_file(30, 0)
    room.drop(30)
    room.drop(40)  # of which not even the folder could be made
    assert names(room.path) == ["step-00000020"]


def test_unfinished_snapshots_and_half_removed_ones_are_cleared(tmp_path: Path) -> None:
    world = World(tmp_path)
    (room,) = world.rooms
    world.snapshot(10)
    work_until_idle(world.service())
    room.begin_file(20, 1)
    (room.path / "step-00000010").rename(room.path / "step-00000010.removed")
    world.snapshot(30)
    kept = inodes(room.path / "step-00000010.removed")
    room.clear_unfinished()
    assert steps(room) == [30] and names(room.path) == ["spare", "step-00000030"]
    assert inodes(room.path / "spare") == kept


# --------------------------------------------------------------------------------------------------- at the same moment


def test_a_snapshot_may_be_retired_from_both_sides_at_any_moment(tmp_path: Path) -> None:
    """Every moment of one retiring is one at which the other side does it too, or takes the memory already."""
    for number in range(MOST_EFFECTS):
        world = World(tmp_path / str(number))
        (room,) = world.rooms
        world.snapshot(10, durable=False)
        (snapshot,) = room.snapshots()

        def meanwhile(room: Room = room) -> None:
            room.void_after(0)
            room.begin_file(20, 0)

        with before_effect(number, meanwhile) as seen:
            room.retire(snapshot)
        assert steps(room) == ([20] if seen.num > number else [])
        room.tidy()
        assert set(names(room.path)) <= {"spare", "step-00000020"}
        if seen.num <= number:
            break
    assert 8 < number < MOST_EFFECTS - 1


def test_whoever_is_killed_while_retiring_leaves_nothing_that_stays(tmp_path: Path) -> None:
    for number in range(MOST_EFFECTS):
        world = World(tmp_path / str(number))
        (room,) = world.rooms
        for step in (10, 20):
            world.snapshot(step, durable=False)
            world.service()._hash_all()
        died = killed_at(number, room.tidy)
        assert 20 in [snapshot.step for snapshot in room.restartable()]
        room.tidy()
        assert names(room.path) == ["spare", "step-00000020"] and len(names(room.path / "spare")) <= 2
        if not died:
            break
    assert 8 < number < MOST_EFFECTS - 1


def test_a_snapshot_that_goes_while_one_looks_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a save would be skipped for no reason."""
    world = World(tmp_path)
    (room,) = world.rooms
    world.snapshot(10, durable=False)
    work_until_idle(world.service())
    seen = room.snapshots()
    monkeypatch.setattr(room, "snapshots", lambda: seen)
    room.retire(seen[0])
    assert not room.is_busy() and not list(room.restartable())


@pytest.mark.parametrize("name", ["request.json", "manifest.json", "saved", "failed"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"facts": 3}', b"\xff\x00"])
def test_no_content_of_the_room_stops_the_ranks(tmp_path: Path, name: str, content: bytes) -> None:
    world = World(tmp_path)
    (room,) = world.rooms
    world.snapshot(10)
    work_until_idle(world.service())
    (room.path / "step-00000010" / name).write_bytes(content)
    assert isinstance(room.is_busy(), bool)
    assert [each.step for each in room.restartable()] == ([] if name.endswith(".json") else [10])
    room.clear_unfinished()
    assert steps(room) == ([] if name == "request.json" else [10])


# ----------------------------------------------------------------------------------------------------------- neighbours


def test_rooms_of_runs_and_machines_are_told_apart_and_found_again(tmp_path: Path) -> None:
    memory, run = tmp_path / "memory", tmp_path / "run"
    run.mkdir()
    (tmp_path / "link").symlink_to(run)
    mine = room_path(memory, run, "id", 0)
    assert mine == room_path(memory, tmp_path / "link", "id", 0)
    assert mine == room_path(memory, tmp_path / "x" / ".." / "run", "id", 0)
    others = [
        room_path(memory, run, "id", 1),
        room_path(memory, run, "another", 0),  # an earlier run of the same folder
        room_path(memory, tmp_path / "run2", "id", 0),
        room_path(memory, run / "run", "id", 0),
    ]
    assert len({mine, *others}) == 5 and str(os.getuid()) in str(mine)


def test_memory_in_what_is_no_folder_holds_nothing_and_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    room = Room(room_path(tmp_path / "file", tmp_path / "run", "id", 0), range(2))
    assert room.snapshots() == [] and not room.is_busy() and not is_served(room)
    room.clear_unfinished()
    room.tidy()
    room.sign(tmp_path / "run")
    with pytest.raises(NotADirectoryError):
        room.begin_file(10, 0)


def test_removing_a_room_leaves_other_rooms_alone(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    rooms = [
        Room(room_path(memory, tmp_path / run, "id", node), range(1))
        for run, node in (("a", 0), ("a", 1), ("b", 0), ("c", 0))
    ]
    for room in rooms[:3]:
        room.begin_file(10, 0)
    rooms[0].remove()
    assert [room.path.exists() for room in rooms] == [False, True, True, False]
    rooms[3].remove()  # which nobody ever used
    rooms[1].remove()
    assert steps(rooms[2]) == [10]
    rooms[2].remove()
    assert names(memory) == []


def test_others_on_the_machine_cannot_look_into_a_room(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        world = World(tmp_path)
        for step in (10, 20, 30):
            world.snapshot(step)
            work_until_idle(world.service())
        world.rooms[0].begin_file(40, 0)
    finally:
        os.umask(before)
    inside = list((tmp_path / "memory").rglob("*"))
    assert len(inside) > 8
    for path in inside:
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif path.suffix in (".safetensors", ".part"):
            assert mode == 0o600, path


def _of_another_user(folder: Path) -> None:
    if os.getuid():
        pytest.skip("only root gives folders away")
    os.chown(folder, 12345, -1)


def _through_a_link(folder: Path) -> None:
    folder.symlink_to(folder.rename(folder.with_name("elsewhere")))


TAKEN: list[Callable[[Path], None]] = [
    _of_another_user,
    _through_a_link,
    lambda folder: folder.chmod(0o770),
    lambda folder: folder.chmod(0o1707),
]


@pytest.mark.parametrize("take", TAKEN)
def test_a_folder_that_others_may_write_to_is_neither_used_nor_believed(
    tmp_path: Path, take: Callable[[Path], None]
) -> None:
    world = World(tmp_path)
    (room,) = world.rooms
    world.snapshot(10)
    work_until_idle(world.service())
    (room.path / "step-00000005.removed").mkdir()
    (room.path / "step-00000006.tmp").mkdir()
    before = sorted(room.path.rglob("*"))
    take(tmp_path / "memory" / f"broadgauge-{os.getuid()}")
    for attempt in (room.make, lambda: room.begin_file(20, 0)):
        with pytest.raises(PermissionError, match="not a folder of yours that you alone can write to"):
            attempt()
    assert room.snapshots() == list(room.restartable()) == [] and not room.is_busy()
    assert not world.service().work()
    room.clear_unfinished()
    room.free_spare()
    room.drop(10)
    room.remove()
    assert sorted(room.path.rglob("*")) == before


def test_a_room_that_cannot_be_made_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "memory").write_text("no folder")
    with pytest.raises(OSError, match="memory"):
        Room(room_path(tmp_path / "memory", tmp_path / "run", "id", 0), range(1)).begin_file(10, 0)
