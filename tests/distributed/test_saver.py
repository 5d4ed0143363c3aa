"""Saving while training goes on: no way of saving, losing or restoring the state shows in what a run computes."""

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.history.saves import Saves
from made_snapshots import folder_in_memory, names
from ranks import run_on_ranks
from small_loop import NUM_STEPS, as_snapshot, config_of, die_at, of_kind, prepare_data, results, services, train
from trainer.agreement import Agreement
from trainer.checkpoint import saver, sharded
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import MANIFEST, read_manifest, write_manifest
from trainer.checkpoint.interval import FailureHistory
from trainer.checkpoint.service.presence import Presence
from trainer.checkpoint.service.room import Request, Room, room_path
from trainer.config import RunConfig, UserError
from trainer.data.digest import as_hex, from_hex
from trainer.engine.engine import Engine
from trainer.events import Event, read_events
from trainer.run_dir import RunDir
from trainer.stop import StopRequest
from trainer.training_state import MASTER

ONE_MACHINE, TWO_MACHINES = [range(2)], [range(1), range(1, 2)]


@dataclass(frozen=True)
class Run:
    run_dir: RunDir
    events: list[Event]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained through, waiting for the disk at every save."""
    run_dir = RunDir(tmp_path_factory.mktemp("undisturbed") / "run")
    return Run(run_dir, train(config_of(data), run_dir))


@pytest.fixture
def memory() -> Iterator[Path]:
    with folder_in_memory() as folder:
        yield folder


def rooms_in(memory: Path, machines: list[range] = ONE_MACHINE) -> list[Room]:
    return [Room(memory / f"node-{node}", ranks) for node, ranks in enumerate(machines)]


def assert_same_result(run_dir: RunDir, undisturbed: Run) -> None:
    """Losses, gradient norms and evaluations, and the last checkpoint, all to the bit."""
    assert results(read_events(run_dir.events_path)) == results(undisturbed.events)
    last = store.folder_name(NUM_STEPS)
    mine, theirs = (store.verify(each.checkpoints / last) for each in (run_dir, undisturbed.run_dir))
    assert (mine.files, mine.data_digest, mine.heldout_loss) == (theirs.files, theirs.data_digest, theirs.heldout_loss)


# --------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("machines", [ONE_MACHINE, TWO_MACHINES])
def test_saving_beside_training_changes_nothing(
    machines: list[range], data: Path, tmp_path: Path, memory: Path, undisturbed: Run
) -> None:
    config, run_dir, rooms = (
        config_of(data, snapshot_every_steps=2),
        RunDir(tmp_path / "run"),
        rooms_in(memory, machines),
    )
    with services(config, run_dir, rooms):
        train(config, run_dir, rooms)
    assert_same_result(run_dir, undisturbed)
    assert names(run_dir.checkpoints) == [store.folder_name(step) for step in (3, 6, 7)]
    for step in (3, 6, 7):
        mine, theirs = (
            store.verify(each.checkpoints / store.folder_name(step)) for each in (run_dir, undisturbed.run_dir)
        )
        assert mine.files == theirs.files and mine.config["checkpoint"]["snapshot_every_steps"] == 2
        for name in mine.files:
            modes = [
                (each.checkpoints / store.folder_name(step) / name).stat().st_mode
                for each in (run_dir, undisturbed.run_dir)
            ]
            assert modes[0] == modes[1]
    events = read_events(run_dir.events_path)
    due = [(event["step"], event["durable"]) for event in of_kind(events, "checkpoint_snapshot", "checkpoint_skipped")]
    assert due == [(2, False), (3, True), (4, False), (6, True), (7, True)]
    assert all(not event["durable"] for event in of_kind(events, "checkpoint_skipped"))  # these wait for nothing
    assert sorted(event["step"] for event in of_kind(events, "checkpoint_saved")) == [3, 6, 7]
    for room in rooms:
        assert [each.step for each in room.snapshots()] == [7] and not list(room.path.rglob("*.part"))


def test_a_manifest_says_what_was_learnt_and_what_of(undisturbed: Run) -> None:
    digests, steps = 0, of_kind(undisturbed.events, "step")
    losses = {event["step"]: event["loss"] for event in of_kind(undisturbed.events, "evaluated")}
    for event in steps:
        digests += from_hex(event["tokens_xxh3"])
        if event["step"] in (3, 6, 7):
            manifest = read_manifest(undisturbed.run_dir.checkpoints / store.folder_name(event["step"]))
            assert manifest.data_digest == as_hex(digests)
            assert manifest.heldout_loss == losses.get(event["step"])
            assert (manifest.num_updates, manifest.step) == (event["step"], event["step"])
            assert manifest.written_at == pytest.approx(event["time"], abs=60)
    assert {3, 6, 7} - losses.keys() == {3} and len({event["tokens_xxh3"] for event in steps}) == NUM_STEPS


@pytest.mark.parametrize("when_busy", ["skip", "wait"])
def test_a_save_that_is_due_while_another_is_under_way(
    when_busy: str, data: Path, tmp_path: Path, memory: Path, undisturbed: Run
) -> None:
    """The service does nothing until the ranks have met the unfinished save; the last step waits whatever is said."""
    config, run_dir, rooms = config_of(data, when_busy=when_busy), RunDir(tmp_path / "run"), rooms_in(memory)
    met = ("checkpoint_skipped", 6) if when_busy == "skip" else ("step", 6)

    def on_event(kind: str, step: int | None) -> None:
        if (kind, step) == met:
            (tmp_path / "met").touch()

    with services(config, run_dir, rooms, not_before=tmp_path / "met"):
        train(config, run_dir, rooms, on_event)
    events = read_events(run_dir.events_path)  # the services have ended, and recorded their last save
    assert_same_result(run_dir, undisturbed)
    saved = [3, 7] if when_busy == "skip" else [3, 6, 7]
    assert store.steps(run_dir.checkpoints) == saved
    skipped = [(event["step"], event["reason"]) for event in of_kind(events, "checkpoint_skipped")]
    assert skipped == ([(6, "the one before is still being written")] if when_busy == "skip" else [])
    waited = {event["step"]: event["seconds"] for event in of_kind(events, "checkpoint_waited")}
    stood = {event["step"]: event["seconds"] for event in of_kind(events, "checkpoint_snapshot")}
    assert (6 in waited) == (when_busy == "wait") and waited.keys() <= {6, 7}
    assert all(0 < seconds < stood[step] for step, seconds in waited.items())
    counts = Saves.of(events)
    assert (counts.num_saved, counts.num_skipped) == (len(saved), len(skipped))
    assert (counts.num_waited, counts.waited_seconds) == (len(waited), sum(waited.values()))


@pytest.mark.parametrize(("when_busy", "grace_seconds"), [("wait", 0.3), ("skip", 0.0)])
def test_without_a_living_service_training_waits_for_the_disk(
    when_busy: str,
    grace_seconds: float,
    data: Path,
    tmp_path: Path,
    memory: Path,
    undisturbed: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One machine's died after its first pass, and none takes its place: its ranks and the others know it together."""
    monkeypatch.setattr(saver, "_GRACE_SECONDS", grace_seconds)
    config = config_of(data, when_busy=when_busy, snapshot_every_steps=2)
    run_dir, rooms = RunDir(tmp_path / "run"), rooms_in(memory, TWO_MACHINES)
    presence = Presence(rooms[0])
    presence.show()  # but hashes nothing
    events = train(config, run_dir, rooms)
    presence.end()
    assert_same_result(run_dir, undisturbed)
    assert store.steps(run_dir.checkpoints) == [3, 6, 7] and not any(room.is_busy() for room in rooms)
    failed = of_kind(events, "checkpoint_failed")
    assert [event["step"] for event in failed] == [3, 6, 7]
    assert {event["reason"] for event in failed} == {saver._ABANDONED}
    skipped = of_kind(events, "checkpoint_skipped")
    assert {(event["durable"], event["reason"]) for event in skipped} == {(False, saver._ABANDONED)}
    assert skipped[-1]["step"] == 4


def test_memory_that_is_full_makes_training_wait_for_the_disk(data: Path, tmp_path: Path, undisturbed: Run) -> None:
    config, run_dir, memory = config_of(data, snapshot_every_steps=2), RunDir(tmp_path / "run"), tmp_path / "memory"
    memory.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(memory)], capture_output=True, text=True
    )
    if done.returncode:
        assert os.environ.get("CI") != "true", f"mounting is part of what is tested: {done.stderr}"
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    try:
        rooms = rooms_in(memory)
        with services(config, run_dir, rooms):
            events = train(config, run_dir, rooms)
        assert_same_result(run_dir, undisturbed)
        assert not list(memory.rglob("rank-*"))
    finally:
        subprocess.run(["umount", str(memory)], check=True)
    assert store.steps(run_dir.checkpoints) == [3, 6, 7]
    failed = of_kind(events, "checkpoint_failed")
    assert [event["step"] for event in failed] == [2, 3, 4, 6, 7]
    assert {event["reason"] for event in failed} <= {
        "no snapshot in shared memory: No space left on device",
        "no snapshot in shared memory: 1 of 2 ranks could not write theirs",
    }


def test_memory_that_others_may_write_to_is_not_used(
    data: Path, tmp_path: Path, memory: Path, undisturbed: Run
) -> None:
    config, run_dir, rooms = (
        config_of(data),
        RunDir(tmp_path / "run"),
        [Room(room_path(memory, tmp_path, "id", 0), range(2))],
    )
    (taken := memory / f"broadgauge-{os.getuid()}").mkdir()
    taken.chmod(0o777)
    with services(config, run_dir, rooms):
        events = train(config, run_dir, rooms)
    assert_same_result(run_dir, undisturbed)
    assert store.steps(run_dir.checkpoints) == [3, 6, 7] and not list(memory.rglob("rank-*"))
    reasons = {event["reason"] for event in of_kind(events, "checkpoint_failed")}
    assert f"no snapshot in shared memory: not a folder of yours that you alone can write to: {taken}" in reasons


class RoomWithoutAPage(Room):
    """Full when all is written but the request."""

    def request(self, step: int, request: Request) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("machines", [ONE_MACHINE, TWO_MACHINES])
def test_memory_that_is_full_on_one_machine_at_the_last_moment(
    machines: list[range], data: Path, tmp_path: Path, memory: Path, undisturbed: Run
) -> None:
    config, run_dir, rooms = config_of(data), RunDir(tmp_path / "run"), rooms_in(memory, machines)
    rooms[-1] = RoomWithoutAPage(rooms[-1].path, rooms[-1].ranks)
    events = train(config, run_dir, rooms)
    assert_same_result(run_dir, undisturbed)
    assert [event["step"] for event in of_kind(events, "checkpoint_failed")] == [3, 6, 7]
    assert not any(room.snapshots() for room in rooms) and store.steps(run_dir.checkpoints) == [3, 6, 7]


# ------------------------------------------------------------------------------------------------------------- restarts


@pytest.fixture(scope="module")
def crashed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died in its sixth step: its checkpoint is of step 3, the snapshot in memory of step 5."""
    folder = tmp_path_factory.mktemp("crashed")
    config, run_dir, rooms = (
        config_of(data, snapshot_every_steps=1),
        RunDir(folder / "run"),
        rooms_in(folder / "memory"),
    )
    with services(config, run_dir, rooms), pytest.raises(AssertionError, match="rank 0 of 2 failed"):
        train(config, run_dir, rooms, die_at(6, rooms))
    assert store.steps(run_dir.checkpoints) == [3]
    assert [each.step for each in rooms[0].restartable()] == [5]
    return folder


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def nothing_happens(memory: Path, checkpoints: Path) -> None: ...


def memory_is_lost(memory: Path, checkpoints: Path) -> None:
    rooms_in(memory)[0].remove()


def a_bit_in_memory_flips(memory: Path, checkpoints: Path) -> None:
    flip(memory / "node-0" / "step-00000005" / "rank-00001.safetensors", -9)


def a_rank_was_killed_in_a_snapshot(memory: Path, checkpoints: Path) -> None:
    """Which nobody will ever finish."""
    room = rooms_in(memory)[0]
    for rank in room.ranks:
        room.begin_file(6, rank)
    room.finish_file(6, 1)


def a_newer_checkpoint_is_that_of_another_step(memory: Path, checkpoints: Path) -> None:
    memory_is_lost(memory, checkpoints)
    shutil.copytree(checkpoints / "step-00000003", checkpoints / "step-00000006")


@pytest.mark.parametrize(
    ("harm", "tier", "step", "rejected"),
    [
        (nothing_happens, "memory", 5, []),
        (a_rank_was_killed_in_a_snapshot, "memory", 5, []),
        (memory_is_lost, "disk", 3, []),
        (a_bit_in_memory_flips, "disk", 3, ["step-00000005 is damaged: rank-00001.safetensors does not have the size"]),
        (
            a_newer_checkpoint_is_that_of_another_step,
            "disk",
            3,
            ["step-00000006 is damaged: its manifest is that of step 3"],
        ),
    ],
)
def test_a_restart_does_not_show_in_the_result(
    harm: Callable[[Path, Path], None],
    tier: str,
    step: int,
    rejected: list[str],
    data: Path,
    tmp_path: Path,
    crashed: Path,
    undisturbed: Run,
) -> None:
    shutil.copytree(crashed, tmp_path / "again")
    run_dir, rooms = RunDir(tmp_path / "again" / "run"), rooms_in(tmp_path / "again" / "memory")
    config = config_of(data, snapshot_every_steps=1)
    harm(tmp_path / "again" / "memory", run_dir.checkpoints)
    with services(config, run_dir, rooms):
        events = train(config, run_dir, rooms)
    (started,) = of_kind(events, "training_started")
    folder = rooms[0].path if tier == "memory" else run_dir.checkpoints
    assert (started["tier"], started["step"]) == (tier, step)
    assert started["checkpoint"] == str(folder / store.folder_name(step))
    reasons = [event["reason"] for event in of_kind(events, "checkpoint_rejected")]
    assert len(reasons) == len(rejected) and all(text in reason for text, reason in zip(rejected, reasons, strict=True))
    assert_same_result(run_dir, undisturbed)
    assert store.steps(run_dir.checkpoints) == [3, 6, 7] and [each.step for each in rooms[0].snapshots()] == [7]


def started_from(events: list[Event]) -> tuple[str, int]:
    (started,) = of_kind(events, "training_started")
    return started["tier"], started["step"]


def test_the_newest_is_used_wherever_it_lies(data: Path, tmp_path: Path, memory: Path, undisturbed: Run) -> None:
    """On disk there is a newer one than in memory."""
    run_dir, rooms = RunDir(Path(shutil.copytree(undisturbed.run_dir.path, tmp_path / "run"))), rooms_in(memory)
    as_snapshot(run_dir.checkpoints / "step-00000003", rooms[0])
    shutil.rmtree(run_dir.checkpoints / "step-00000007")
    config = config_of(data)
    with services(config, run_dir, rooms):
        events = train(config, run_dir, rooms)
    assert started_from(events) == ("disk", 6)
    assert_same_result(run_dir, undisturbed)


def test_a_snapshot_of_another_layout_serves_nobody(data: Path, tmp_path: Path, memory: Path, undisturbed: Run) -> None:
    """It lacks what was on other machines; and it is no part of the history that goes on."""
    other = RunDir(tmp_path / "other")
    train(config_of(data, "TP2"), other)
    run_dir, rooms = RunDir(Path(shutil.copytree(undisturbed.run_dir.path, tmp_path / "run"))), rooms_in(memory)
    as_snapshot(other.checkpoints / "step-00000006", rooms[0], durable=False)
    for step in (6, 7):
        shutil.rmtree(run_dir.checkpoints / store.folder_name(step))
    config = config_of(data)
    with services(config, run_dir, rooms):
        events = train(config, run_dir, rooms)
    assert started_from(events) == ("disk", 3)
    assert_same_result(run_dir, undisturbed)


def test_a_snapshot_that_one_machine_lacks_holds_nobody_up(
    data: Path, tmp_path: Path, memory: Path, undisturbed: Run
) -> None:
    """The machine that has it would wait for the other's part."""
    run_dir = RunDir(Path(shutil.copytree(undisturbed.run_dir.path, tmp_path / "run")))
    rooms = rooms_in(memory, TWO_MACHINES)
    as_snapshot(run_dir.checkpoints / "step-00000006", rooms[0])
    for step in (6, 7):
        shutil.rmtree(run_dir.checkpoints / store.folder_name(step))
    config = config_of(data)
    with services(config, run_dir, rooms):
        events = train(config, run_dir, rooms)
    assert started_from(events) == ("disk", 3)
    assert_same_result(run_dir, undisturbed)
    assert store.steps(run_dir.checkpoints) == [3, 6, 7]


# --------------------------------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_is_found_and_the_checkpoint_before_is_used(undisturbed: Run, tmp_path: Path) -> None:
    """100 of 100, drawn over all bits of all files, and ten of the manifest's."""
    checkpoints = Path(shutil.copytree(undisturbed.run_dir.checkpoints, tmp_path / "checkpoints"))
    newest, draw = checkpoints / "step-00000007", random.Random(5)
    files = sorted(newest.iterdir())
    drawn = draw.choices(files, [path.stat().st_size for path in files], k=90) + [newest / MANIFEST] * 10
    assert store.newest_valid(checkpoints) == newest and len({path.name for path in drawn}) == 3
    for path in drawn:
        position, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        flip(path, position, bit)
        reasons: list[str] = []
        assert store.newest_valid(checkpoints, reasons.append) == checkpoints / "step-00000006"
        assert len(reasons) == 1 and reasons[0].startswith(f"{newest} ")
        assert path.name in reasons[0] or "has format" in reasons[0]
        flip(path, position, bit)
    store.verify(newest)


def truncated(newest: Path) -> None:
    os.truncate(newest / "rank-00001.safetensors", (newest / "rank-00001.safetensors").stat().st_size - 1)


def missing(newest: Path) -> None:
    (newest / "rank-00000.safetensors").unlink()


def with_an_empty_manifest(newest: Path) -> None:
    (newest / MANIFEST).write_bytes(b"")


def with_the_manifest_of_another(newest: Path) -> None:
    shutil.copyfile(newest.parent / "step-00000006" / MANIFEST, newest / MANIFEST)


def with_files_swapped(newest: Path) -> None:
    first, second = newest / "rank-00000.safetensors", newest / "rank-00001.safetensors"
    first.rename(newest / "aside")
    second.rename(first)
    (newest / "aside").rename(second)


def copied_from_another_step(newest: Path) -> None:
    shutil.rmtree(newest)
    shutil.copytree(newest.parent / "step-00000006", newest)


def of_one_machine_only(newest: Path) -> None:
    manifest = read_manifest(newest)
    first = {"rank-00000.safetensors": manifest.files["rank-00000.safetensors"]}
    write_manifest(newest, replace(manifest, files=first))


@pytest.mark.parametrize(
    ("damaged", "names"),
    [
        (truncated, "rank-00001.safetensors does not have the size and hash"),
        (missing, "rank-00000.safetensors is missing"),
        (with_an_empty_manifest, "no readable manifest.json"),
        (with_the_manifest_of_another, "its manifest is that of step 6"),
        (with_files_swapped, "rank-00000.safetensors does not have the size and hash"),
        (copied_from_another_step, "its manifest is that of step 6"),
        (of_one_machine_only, "is not whole: it has 1 of 2 files"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_what_is_wrong_with_it(
    damaged: Callable[[Path], None], names: str, undisturbed: Run, tmp_path: Path
) -> None:
    checkpoints = Path(shutil.copytree(undisturbed.run_dir.checkpoints, tmp_path / "checkpoints"))
    newest = checkpoints / "step-00000007"
    damaged(newest)
    with pytest.raises(UserError, match=names) as caught:
        store.verify(newest)
    assert str(caught.value).startswith(f"{newest} is ") and "\n" not in str(caught.value)
    assert store.newest_valid(checkpoints, lambda reason: None) == checkpoints / "step-00000006"


def test_a_run_passes_over_all_that_is_damaged(data: Path, tmp_path: Path, undisturbed: Run) -> None:
    run_dir = RunDir(Path(shutil.copytree(undisturbed.run_dir.path, tmp_path / "run")))
    with_files_swapped(run_dir.checkpoints / "step-00000007")
    flip(run_dir.checkpoints / "step-00000006" / MANIFEST, 100)
    events = train(config_of(data), run_dir)
    newest, before = (event["reason"] for event in of_kind(events, "checkpoint_rejected"))
    assert "step-00000007 is damaged: rank-0000" in newest and newest.endswith("; trying the one before")
    assert "step-00000006 is " in before and MANIFEST in before
    assert of_kind(events, "training_started")[0]["step"] == 3
    assert_same_result(run_dir, undisturbed)


# ---------------------------------------------------------------------------------------------------- another beginning


def test_a_run_from_given_weights_begins_anew(data: Path, tmp_path: Path, undisturbed: Run) -> None:
    given = undisturbed.run_dir.checkpoints / "step-00000006"
    events = train(config_of(data, weights_from=str(given)), RunDir(tmp_path / "run"))
    assert (events[0]["kind"], events[0]["step"], events[0]["checkpoint"]) == ("training_started", 0, str(given))
    before, after = results(undisturbed.events), results(events)
    assert after["evaluated", 0]["loss"] == before["evaluated", 6]["loss"]  # the weights, to the bit
    for name in ("lr", "tokens", "first_sample", "tokens_xxh3"):  # and nothing else
        assert after["step", 1][name] == before["step", 1][name]
    assert len(of_kind(events, "step")) == NUM_STEPS


def test_moments_begin_at_nothing_with_given_weights(data: Path, undisturbed: Run) -> None:
    given = undisturbed.run_dir.checkpoints / "step-00000006"

    def rank(config: RunConfig, device: torch.device) -> Any:
        engine = Engine(config, device)
        sharded.load(engine, given)  # so that there is something to forget
        loaded = [fragment.tensors[MASTER].clone() for fragment in engine.state.fragments()]
        moments = [each for f in engine.state.fragments() for kind, each in f.tensors.items() if kind != MASTER]
        assert engine.state.num_updates == 6 and any(bool(each.any()) for each in moments)
        sharded.load_initial_weights(engine, given)
        assert engine.state.num_updates == 0
        for fragment, weights in zip(engine.state.fragments(), loaded, strict=True):
            for kind, tensor in fragment.tensors.items():
                assert torch.equal(tensor, weights) if kind == MASTER else not bool(tensor.any()), kind

    run_on_ranks(config_of(data, "one rank"), rank)


# ------------------------------------------------------------------------------------------------------------ agreement


def test_the_clock_of_the_first_rank_says_when_a_save_is_due(data: Path) -> None:
    """Every second, where the others' clocks stand still."""

    def rank(config: RunConfig, device: torch.device) -> list[bool]:
        now = 100.0
        agreement = Agreement(config, StopRequest(None), FailureHistory(), lambda: now if dist.get_rank() == 0 else 0.0)
        agreed = []
        for step, seconds in enumerate([0.4, 0.4, 0.4, 0.4, 0.4, 2.4, 0.4], start=1):
            now += seconds
            due = agreement.after_step(step, 0).save
            agreed.append(due)
            if due:
                agreement.saved(step, 0.1)
        return agreed

    expected = [False, False, True, False, False, True, False]
    assert run_on_ranks(config_of(data, every_steps=None, every_seconds=1.0), rank) == [expected, expected]
