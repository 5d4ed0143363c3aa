"""Snapshots that outlive their machine: what is copied where, and what is held after any loss."""

import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from made_checkpoints import spread, write_file
from trainer.checkpoint.format import store
from trainer.checkpoint.format.chunk_file import file_name
from trainer.checkpoint.format.manifest import Manifest, fingerprint, read_manifest, write_manifest
from trainer.checkpoint.service.replica import PIECE_BYTES, Fetch, Holder, Holding, plan
from trainer.checkpoint.service.room import Request, Room
from trainer.config import RunConfig, UserError

RANKS = [range(2), range(2, 4), range(4, 6)]  # of three machines
TENSORS = {"master/weight": np.arange(480, dtype=np.float32).reshape(24, 20)}


def rooms(folder: Path) -> list[Room]:
    return [Room(folder / f"node-{node}", ranks) for node, ranks in enumerate(RANKS)]


def snapshot(all_rooms: list[Room], step: int, written_at: float = 1.0, durable: bool = False) -> None:
    """What ranks and services leave in every room."""
    files = spread({name: tensor + step for name, tensor in TENSORS.items()}, 6)
    for room in all_rooms:
        for rank in room.ranks:
            write_file(room.begin_file(step, rank), files[rank], TENSORS)
            room.finish_file(step, rank)
        facts = Manifest(step, step, RunConfig().model_dump(mode="json"), num_files=6, written_at=written_at)
        room.request(step, Request(facts, durable))
        newest = room.snapshots()[-1]
        write_manifest(
            newest.path, replace(facts, files={name: fingerprint(newest.path / name) for name in newest.files})
        )


def files_of(room: Room, step: int) -> dict[str, bytes]:
    folder = room.path / store.folder_name(step)
    return {file_name(rank): (folder / file_name(rank)).read_bytes() for rank in room.ranks}


def lose(room: Room) -> None:
    room.remove()


@pytest.fixture
def machines(tmp_path: Path) -> list[tuple[Room, Holder]]:
    """Three machines with a snapshot of step 10, each of which has copied its neighbour's."""
    all_rooms = rooms(tmp_path)
    snapshot(all_rooms, 10)
    holders = [Holder(room) for room in all_rooms]
    for node, holder in enumerate(holders):
        assert holder.follow(holders[node - 1])
    return list(zip(all_rooms, holders, strict=True))


def test_others_on_a_machine_cannot_look_into_copies(machines: list[tuple[Room, Holder]], tmp_path: Path) -> None:
    """Which may be all that a machine holds."""
    new = Room(tmp_path / "new", RANKS[0])
    assert Holder(new).follow(machines[0][1])
    fetched = Room(tmp_path / "fetched", RANKS[0])
    Holder(fetched).fetch(machines[0][1], 10, 1.0, tuple(map(file_name, RANKS[0])))
    assert [stat.S_IMODE(room.path.stat().st_mode) for room in (new, fetched)] == [0o700, 0o700]
    assert files_of(fetched, 10) == files_of(machines[0][0], 10)


def bring_together(machines: list[tuple[Room, Holder]], order: list[int]) -> list[Fetch]:
    """As the launcher does, with the machines numbered anew: `order[n]` is the old number of machine n."""
    placed = [(Room(machines[old][0].path, RANKS[node]), node) for node, old in enumerate(order)]
    holders = [Holder(room) for room, _ in placed]
    fetches = plan({node: holders[node].holdings() for _, node in placed}, lambda node: RANKS[node])
    for fetch in fetches:
        holders[fetch.to_node].fetch(holders[fetch.from_node], fetch.step, fetch.written_at, fetch.files)
    return fetches


@pytest.mark.parametrize("lost", range(3))
def test_a_machine_that_was_lost_gets_its_snapshot_back(machines: list[tuple[Room, Holder]], lost: int) -> None:
    expected = [files_of(room, 10) for room, _ in machines]
    lose(machines[lost][0])
    fetches = bring_together(machines, [0, 1, 2])
    assert [(fetch.to_node, fetch.from_node) for fetch in fetches] == [(lost, (lost + 1) % 3)]
    for node, (room, _) in enumerate(machines):
        assert files_of(room, 10) == expected[node]
        (found,) = room.restartable()
        assert found.step == 10 and set(read_manifest(found.path).files) == set(found.files)
        assert not found.is_pending()


@pytest.mark.parametrize("durable", [True, False])
def test_what_was_to_become_a_checkpoint_still_is(tmp_path: Path, durable: bool) -> None:
    """Else the first machine would wait for the part of the one that was lost."""
    all_rooms = rooms(tmp_path)
    snapshot(all_rooms, 10, durable=durable)
    holders = [Holder(room) for room in all_rooms]
    for node, holder in enumerate(holders):
        assert holder.follow(holders[node - 1])
    lose(all_rooms[1])
    bring_together(list(zip(all_rooms, holders, strict=True)), [0, 1, 2])
    (found,) = all_rooms[1].restartable()
    request = found.request()
    assert request is not None and (request.durable, request.facts.written_at) == (durable, 1.0)
    assert found.is_pending() == found.is_owed() == durable


def test_a_step_of_two_lives_is_given_out_as_it_was_in_each(tmp_path: Path) -> None:
    """The neighbour's replica is of the first, the own room of the second."""
    all_rooms = rooms(tmp_path)[:2]
    holders = [Holder(room) for room in all_rooms]
    for attempt, durable in ((1.0, True), (2.0, False)):
        for room in all_rooms:
            room.void_after(0)
        snapshot(all_rooms, 10, attempt, durable)
        if attempt == 1.0:
            holders[1].follow(holders[0])
    for attempt, ranks, durable in ((1.0, RANKS[0], True), (2.0, RANKS[1], False)):
        held = holders[1].held(10, attempt)
        assert held is not None and held.durable == durable
        assert list(held.manifest.files) == list(map(file_name, ranks))
    assert holders[1].held(10, 3.0) is None
    with pytest.raises(FileNotFoundError):
        holders[1].read(10, 2.0, file_name(0), 0)
    new = Holder(Room(tmp_path / "new", RANKS[0]))
    new.fetch(holders[1], 10, 2.0, (file_name(0), file_name(1)))  # which is not there any more
    assert not new.holdings()
    new.fetch(holders[1], 10, 1.0, (file_name(0), file_name(1)))
    assert [(each.step, each.written_at) for each in new.holdings()] == [(10, 1.0)]


def test_a_copy_without_word_of_what_it_was_for_is_made_again(machines: list[tuple[Room, Holder]]) -> None:
    room, holder = machines[1]
    (room.path / "replica" / store.folder_name(10) / "request.json").unlink()
    assert [holding.files for holding in holder.holdings()] == [tuple(map(file_name, RANKS[1]))]
    assert holder.follow(machines[0][1]) and len(holder.holdings()) == 2


def test_machines_may_come_back_in_another_order(machines: list[tuple[Room, Holder]]) -> None:
    expected = [files_of(room, 10) for room, _ in machines]
    bring_together(machines, [2, 0, 1])
    for node, old in enumerate([2, 0, 1]):
        assert files_of(Room(machines[old][0].path, RANKS[node]), 10) == expected[node]


def test_a_newer_snapshot_of_which_a_part_is_lost_gives_way_to_an_older_one(
    machines: list[tuple[Room, Holder]],
) -> None:
    all_rooms = [room for room, _ in machines]
    snapshot(all_rooms, 20)
    (machines[2][1]).follow(machines[1][1])  # of step 20 machine 1's part alone has a copy
    lose(all_rooms[0])
    assert plan({n: holder.holdings() for n, (_, holder) in enumerate(machines)}, lambda node: RANKS[node]) == [
        Fetch(0, 1, 10, 1.0, (file_name(0), file_name(1)))
    ]


def test_snapshots_of_one_step_of_two_lives_are_never_mixed() -> None:
    def held(written_at: float, *ranks: int) -> Holding:
        return Holding(10, written_at, tuple(map(file_name, ranks)))

    ranks_of = [range(1), range(1, 2)].__getitem__
    assert plan({0: [held(1.0, 0)], 1: [held(2.0, 1)]}, ranks_of) == []
    found = plan({0: [held(1.0, 0), held(2.0, 0)], 1: [held(2.0, 0), held(1.0, 1)]}, ranks_of)
    assert found == []  # each machine has its part of the first life: nothing to copy
    found = plan({0: [held(1.0, 0), held(1.0, 1)], 1: []}, ranks_of)
    assert found == [Fetch(1, 0, 10, 1.0, (file_name(1),))]


def test_a_copy_is_made_once_and_replaces_the_older_one(machines: list[tuple[Room, Holder]]) -> None:
    (room, holder), (_, neighbour) = machines[1], machines[0]
    assert not holder.follow(neighbour)
    snapshot([machines[0][0]], 20)
    assert holder.follow(neighbour) and not holder.follow(neighbour)
    assert store.steps(room.path / "replica") == [20]
    snapshot_again = [machines[0][0]]
    machines[0][0].retire(machines[0][0].snapshots()[-1])
    snapshot(snapshot_again, 20, written_at=2.0)  # the run went back and came to step 20 again
    assert holder.follow(neighbour)


def test_what_arrives_damaged_is_no_copy(machines: list[tuple[Room, Holder]]) -> None:
    class Flipping(Holder):
        def read(self, step: int, written_at: float | None, name: str, position: int) -> bytes:
            content = super().read(step, written_at, name, position)
            return content[:-1] + bytes([content[-1] ^ 1]) if content else content

    room, holder = machines[1]
    snapshot([machines[0][0]], 20)
    with pytest.raises(UserError, match="does not have the size and hash"):
        holder.follow(Flipping(machines[0][0]))
    assert store.steps(room.path / "replica") == [10]


def test_files_of_several_pieces_arrive_whole(tmp_path: Path) -> None:
    source, target = (Room(tmp_path / name, range(1)) for name in ("source", "target"))
    content = np.random.default_rng(1).integers(0, 256, 2 * PIECE_BYTES + 5, dtype=np.uint8).tobytes()
    source.begin_file(10, 0).write_bytes(content)
    source.finish_file(10, 0)
    facts = Manifest(10, 10, {}, num_files=1, written_at=1.0)
    source.request(10, Request(facts, durable=False))
    folder = source.snapshots()[0].path
    write_manifest(folder, replace(facts, files={file_name(0): fingerprint(folder / file_name(0))}))
    assert Holder(target).follow(Holder(source))
    assert (target.path / "replica" / store.folder_name(10) / file_name(0)).read_bytes() == content


def test_the_memory_of_a_copy_is_given_back_with_the_room(machines: list[tuple[Room, Holder]]) -> None:
    room, holder = machines[1]
    holder.tidy()
    assert (room.path / "replica").exists()
    for found in room.snapshots():
        room.retire(found)
    holder.tidy()
    assert not room.path.exists()
