"""The record of a run survives what runs meet: several writers, a reader in the middle, and death in mid-line."""

import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import UserError
from trainer.events import SCHEMA, EventLog, EventReader, read_events, surviving_steps


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def fields(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key != "time"} for event in events]


def test_events_read_back_in_order_with_their_times(path: Path) -> None:
    log = EventLog(path)
    log.write("step", step=1, loss=np.float32(0.5), tokens=np.int64(3))
    log.write("failed", error="line one\nline two\r\u2028 \x85 \x0b end")
    log.close()
    events = read_events(path)
    assert fields(events) == [
        {"kind": "step", "step": 1, "loss": 0.5, "tokens": 3},
        {"kind": "failed", "error": "line one\nline two\r\u2028 \x85 \x0b end"},
    ]
    assert abs(events[0]["time"] - path.stat().st_mtime) < 60 and events[0]["time"] <= events[1]["time"]
    assert path.read_bytes().count(b"\n") == 2


def test_absent_and_empty_files_hold_no_events(path: Path) -> None:
    reader = EventReader(path)
    reader.skip_to_end()
    assert list(reader.new_events()) == read_events(path) == []
    EventLog(path).close()
    assert path.read_bytes() == b"" and read_events(path) == []


def test_opening_again_appends(path: Path) -> None:
    for number in range(3):
        log = EventLog(path)
        log.write("step", step=number)
        log.close()
    assert [event["step"] for event in read_events(path)] == [0, 1, 2]


@given(cut=st.integers(0, 200))
def test_a_line_torn_anywhere_costs_only_itself(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "events.jsonl"
    log = EventLog(path)
    log.write("step", step=1)
    whole_bytes = path.stat().st_size
    log.write("failed", error="é" * 30)
    log.close()
    os.truncate(path, min(path.stat().st_size, whole_bytes + cut))
    second_survives = path.read_bytes().endswith(b"\n") and path.stat().st_size > whole_bytes
    assert [event["kind"] for event in read_events(path)] == ["step", *["failed"] * second_survives]

    log = EventLog(path)
    log.write("step", step=2)
    log.close()
    kinds = [event["kind"] for event in read_events(path)]
    # a line that lacks nothing but its end is a whole event once the next writer ends it
    assert kinds in (["step", "step"], ["step", "failed", "step"])
    assert read_events(path)[-1]["step"] == 2 and path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    "line", [b"3", b"null", b'"kind"', b"[1]", b"{}", b'{"a": 1}', b"\xff\xfe", b"", b"{'kind': 1}"]
)
def test_lines_that_are_no_events_are_passed_over(path: Path, line: bytes) -> None:
    path.write_bytes(b'{"kind": "a"}\n' + line + b'\n{"kind": "b"}\n')
    assert [event["kind"] for event in read_events(path)] == ["a", "b"]


def test_a_reader_sees_each_event_once_and_only_whole(path: Path) -> None:
    log, reader = EventLog(path), EventReader(path)
    seen: list[Any] = []
    for number in range(5):
        log.write("step", step=number, text="x" * number)
        seen += [event["step"] for event in reader.new_events()]
        assert seen == list(range(number + 1))
    line = orjson.dumps({"kind": "step", "step": 5}) + b"\n"
    for byte in line:
        assert list(reader.new_events()) == []
        with open(path, "ab") as handle:
            handle.write(bytes([byte]))
    assert [event["step"] for event in reader.new_events()] == [5]
    assert list(reader.new_events()) == []
    late = EventReader(path)
    late.skip_to_end()
    log.write("step", step=6)
    assert [event["step"] for event in late.new_events()] == [6]


def test_a_line_is_one_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the next test can only make likely to show."""
    log, write, written = EventLog(path), os.write, []
    monkeypatch.setattr(os, "write", lambda fd, data: written.append(data) or write(fd, data))
    log.write("step", text="x" * 100_000)
    log.write("step")
    assert len(written) == 2 and b"".join(written) == path.read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight pages."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        assert os.environ.get("CI") != "true", f"mounting is part of what is tested: {done.stderr}"
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(path: Path) -> None:
    with pytest.raises(OSError, match="No space"), open(path, "ab", buffering=0) as file:
        while True:
            file.write(bytes(1000))


def test_what_a_full_disk_does_not_take_is_written_when_it_does(small_disk: Path) -> None:
    """Lines of 90 bytes: the last page takes a part of one."""
    path, filler = small_disk / "events.jsonl", small_disk / "filler"
    log, other = EventLog(path), EventLog(path)
    log.write("step", step=0, text="x" * 40)
    fill(filler)
    for step in range(1, 100):
        log.write("step", step=step, text="x" * 40)
    assert not path.read_bytes().endswith(b"\n"), "a part of a line"
    written = len(read_events(path))
    assert 0 < written < 60
    with pytest.raises(OSError, match="No space left"):
        log.sync()
    filler.unlink()
    other.write("evaluated", step=0)  # behind the piece
    log.write("step", step=100)
    log.close(), other.close()
    events = read_events(path)
    assert [event["step"] for event in events if event["kind"] == "step"] == list(range(101))
    assert [event["kind"] for event in events].index("evaluated") == written


def test_a_disk_that_stays_full_is_an_error_in_the_end() -> None:
    log = EventLog(Path("/dev/full"))
    for _ in range(16):
        log.write("step", text="x" * ((1 << 20) - 100))
    with pytest.raises(OSError, match="No space left"):
        log.write("step", text="x" * 10_000)
    with pytest.raises(OSError, match="No space left"):
        log.close()


def test_other_trouble_with_the_file_is_an_error_at_once(path: Path) -> None:
    log = EventLog(path)
    os.dup2(os.open(path, os.O_RDONLY), log._fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        log.write("step")


def test_a_piece_of_a_line_costs_not_the_line_behind_it(path: Path) -> None:
    log = EventLog(path)
    log.write("step", step=1, text="some text")
    line = path.read_bytes()
    for length in range(len(line)):
        path.write_bytes(line[:length])
        os.truncate(path, length)
        log.write("step", step=2, of={"time": 3})
        assert read_events(path)[-1]["step"] == 2, length


def test_who_holds_the_files_lock_holds_nobody_up(path: Path) -> None:
    log = EventLog(path, locks=True)
    log.write("step", step=1)
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for step in range(2, 50):
            log.write("step", step=step)
        assert [event["step"] for event in read_events(path)] == [1]
    deadline = time.monotonic() + 10
    while len(read_events(path)) < 49:  # with no further event
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [event["step"] for event in read_events(path)] == list(range(1, 50))
    log.close()


def test_no_locks_are_taken_where_appending_is_atomic(path: Path) -> None:
    log = EventLog(path)
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        log.write("step", step=1)
        assert [event["step"] for event in read_events(path)] == [1]
    log.close()


@pytest.mark.parametrize("locks", [False, True])
def test_several_processes_never_mix_their_lines(path: Path, locks: bool) -> None:
    writers, each = 4, 1000
    start_read, start_write = os.pipe()
    pids = [os.fork() or _write_many(path, locks, writer, each, start_read, start_write) for writer in range(writers)]
    os.close(start_read)
    os.close(start_write)  # the last writing end closes once all have been forked: now they start together
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * writers
    events = read_events(path)
    lines = path.read_bytes().splitlines()  # one may be empty: a writer that opens the file ends what looks torn
    assert len(list(filter(None, lines))) == len(events) == writers * each
    for writer in range(writers):
        mine = [event for event in events if event["writer"] == writer]
        assert [event["number"] for event in mine] == list(range(each))
        assert all(event["text"] == f"{writer}" * (event["number"] % 100) for event in mine)


def _write_many(path: Path, locks: bool, writer: int, count: int, start_read: int, start_write: int) -> int:
    status = 1
    try:
        os.close(start_write)
        os.read(start_read, 1)  # returns when the parent and all writers have closed the other end
        log = EventLog(path, locks)
        for number in range(count):
            log.write("step", writer=writer, number=number, text=f"{writer}" * (number % 100))
        log.close()
        status = 0
    finally:
        os._exit(status)


# ------------------------------------------------------------------------------------------------ rotation and flushing


def rotate(path: Path) -> None:
    """As logrotate does, without asking anybody."""
    aside = sorted((int(each.suffix[1:]) for each in path.parent.glob(f"{path.name}.*")), reverse=True)
    for number in (*aside, 0):
        before = path.with_name(f"{path.name}.{number}") if number else path
        before.rename(path.with_name(f"{path.name}.{number + 1}"))


def test_a_record_that_is_rotated_while_it_is_written_loses_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve times, so that numbers are more than digits; one reader looks all the time, one now and then."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    log, busy, idle = EventLog(path), EventReader(path), EventReader(path)
    seen: list[int] = []
    seen_late: list[int] = []
    for number in range(120):
        log.write("step", step=number)
        now += 0.3  # the writer looks once a second: the first events after a rotation go to the file put aside
        seen += [event["step"] for event in busy.new_events()]
        assert seen == list(range(number + 1))
        if number % 25 == 24:
            seen_late += [event["step"] for event in idle.new_events()]
            assert seen_late == list(range(number + 1))
        if number % 10 == 9:
            rotate(path)
    log.close()
    assert len(list(path.parent.iterdir())) == 12  # the last one is put aside, and no other was begun
    assert [event["step"] for event in read_events(path)] == list(range(120))


def test_a_record_that_is_copied_and_cut_is_read_on_from_its_beginning(path: Path) -> None:
    log, reader = EventLog(path), EventReader(path)
    log.write("step", step=1)
    log.write("step", step=2)
    assert len(list(reader.new_events())) == 2
    path.with_name("events.jsonl.1").write_bytes(path.read_bytes())
    os.truncate(path, 0)
    log.write("step", step=3)
    assert [event["step"] for event in reader.new_events()] == [3]
    assert [event["step"] for event in read_events(path)] == [1, 2, 3]


def test_who_looks_at_the_end_alone_does_not_see_what_was_put_aside(path: Path) -> None:
    log, reader = EventLog(path), EventReader(path)
    log.write("step", step=1)
    rotate(path)
    EventLog(path).write("step", step=2)
    reader.skip_to_end()
    assert list(reader.new_events()) == []
    EventLog(path).write("step", step=3)
    assert [event["step"] for event in reader.new_events()] == [3]


class Writer:
    """One that looks for a rotation only when told to."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.written = path, name, 0
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self) -> None:
        self.file.write(orjson.dumps({"kind": "step", "by": self.name, "number": self.written}) + b"\n")
        self.written += 1

    def look(self) -> None:
        self.file.close()
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115


def seen_of(reader: EventReader) -> list[tuple[str, int]]:
    return [(event["by"], event["number"]) for event in reader.new_events()]


def test_lines_added_late_to_files_put_aside_come_once(path: Path) -> None:
    """Two rotations in a row, one writer behind each; readers from before, made anew, and of what is new alone."""
    slow, late, prompt = (Writer(path, name) for name in ("slow", "late", "prompt"))
    reader = EventReader(path)
    slow.write()
    assert seen_of(reader) == [("slow", 0)]
    for writers in ([late, prompt], [prompt]):
        rotate(path)
        for writer in writers:
            writer.look()
        prompt.write()
    assert seen_of(reader) == [("prompt", 0), ("prompt", 1)]
    anew, at_end = EventReader(path), EventReader(path)
    assert seen_of(anew) == [("slow", 0), ("prompt", 0), ("prompt", 1)]
    at_end.skip_to_end()
    prompt.write(), late.write(), slow.write()
    rotate(path)
    path.with_name("events.jsonl.3").unlink()
    for each in (reader, anew, at_end):
        assert seen_of(each) == [("slow", 1), ("late", 0), ("prompt", 2)], "also of what is deleted by now"
        assert seen_of(each) == []


def test_files_put_aside_are_not_kept_open_for_ever(path: Path) -> None:
    now = 0.0
    writer, reader = Writer(path, "writer"), EventReader(path, clock=lambda: now)

    def num_open() -> int:
        files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return sum(file.startswith(str(path)) for file in files) - 1  # the writer's

    for _ in range(3):
        writer.write()
        assert len(seen_of(reader)) == 1
        rotate(path)
        writer.look()
        now += 20
    assert seen_of(reader) == [] and num_open() == 4
    now += 30
    assert seen_of(reader) == [] and num_open() == 3, "the first was left 70 seconds ago, the second 50"
    now += 90
    assert seen_of(reader) == [] and num_open() == 1
    for _ in range(30):
        rotate(path)
        writer.look()
        assert seen_of(reader) == [] and num_open() <= 16
    del reader
    assert num_open() == 0


@given(deeds=st.lists(st.sampled_from(["a", "b", "a looks", "b looks", "rotate", "delete", "read"]), max_size=30))
def test_whatever_is_done_to_the_files_a_reader_gets_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, deeds: list[str]
) -> None:
    path = tmp_path_factory.mktemp("rotated") / "events.jsonl"
    writers = {name: Writer(path, name) for name in "ab"}
    reader, seen = EventReader(path), list[tuple[str, int]]()
    for deed in [*deeds, "read"]:
        match deed.split():
            case [name]:
                if name in writers:
                    writers[name].write()
                elif name == "rotate" and path.exists():
                    rotate(path)
                elif name == "read":
                    seen += seen_of(reader)
                elif name == "delete" and (aside := list(path.parent.glob("*.jsonl.*"))):
                    seen += seen_of(reader)
                    max(aside, key=lambda each: int(each.suffix[1:])).unlink()
            case [name, _]:
                writers[name].look()
    for name, writer in writers.items():
        writer.file.close()
        assert [number for by, number in seen if by == name] == list(range(writer.written)), "each once, in order"
    assert seen_of(reader) == []


def test_other_files_beside_it_are_no_part_of_the_record(path: Path) -> None:
    EventLog(path).write("step", step=1)
    for name in ("events.jsonl.bak", "events.jsonl.1.gz", "events.jsonl.tmp"):
        path.with_name(name).write_bytes(b'{"kind": "step", "step": 9}\n')
    assert [event["step"] for event in read_events(path)] == [1]


def test_the_disk_has_every_event_within_a_second_and_at_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, has_synced = [], threading.Event()

    def fdatasync(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            synced.append(os.fstat(descriptor).st_size)
            has_synced.set()

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    log = EventLog(path)
    log.write("step", step=1)
    assert has_synced.wait(10) and synced == [path.stat().st_size]
    log.write("step", step=2)
    log.close()
    assert synced[-1] == path.stat().st_size


def test_a_record_of_a_later_version_is_refused_and_one_of_an_earlier_is_not(path: Path) -> None:
    log = EventLog(path)
    log.write("command_started", schema=SCHEMA, version="0.1.0")
    log.write("step", step=1)
    assert len(read_events(path)) == 2
    log.write("command_started", schema=SCHEMA + 1, version="7.0.0")
    with pytest.raises(UserError, match=f"has events of schema {SCHEMA + 1}, and this .*up to {SCHEMA};.* 7.0.0"):
        read_events(path)


# ---------------------------------------------------------------------------------------------------- surviving steps


def step(number: int, life: int = 0) -> dict[str, Any]:
    return {"kind": "step", "step": number, "life": life}


def started(at: int) -> dict[str, Any]:
    return {"kind": "training_started", "step": at}


def test_steps_of_an_undisturbed_run() -> None:
    events = [started(0), {"kind": "evaluated", "step": 0}, step(1), step(2), {"kind": "failed"}]
    assert surviving_steps(events) == [step(1), step(2)]
    assert surviving_steps([]) == surviving_steps([started(0)]) == []


def test_a_restart_voids_what_came_after_its_checkpoint() -> None:
    events = [started(0), *map(step, range(1, 8)), started(4), step(5, 1), step(6, 1)]
    assert surviving_steps(events) == [*map(step, range(1, 5)), step(5, 1), step(6, 1)]


def test_a_restart_from_the_seed_voids_everything() -> None:
    assert surviving_steps([started(0), step(1), step(2), started(0)]) == []


def skipped(number: int, life: int = 0) -> dict[str, Any]:
    return {"kind": "step_skipped", "step": number, "life": life}


def test_a_rollback_voids_what_came_after_its_checkpoint() -> None:
    events = [
        *(started(0), step(1), skipped(2), step(3), skipped(4), skipped(5)),
        {"kind": "rolled_back", "from_step": 5, "to_step": 2},
        *(step(3, 1), skipped(4, 1), skipped(5, 1), step(6, 1), skipped(7, 1)),
    ]
    assert surviving_steps(events) == [step(1), step(3, 1), step(6, 1)]
    assert surviving_steps(events, "step_skipped") == [skipped(2), skipped(4, 1), skipped(5, 1), skipped(7, 1)]
    assert surviving_steps([*events, started(6)]) == [step(1), step(3, 1), step(6, 1)]
    assert surviving_steps([*events, started(6)], "step_skipped") == [skipped(2), skipped(4, 1), skipped(5, 1)]


def test_many_restarts_keep_the_history_of_the_final_weights() -> None:
    events = [
        *(started(0), *map(step, range(1, 11))),
        *(started(8), step(9, 1)),  # dies before the next checkpoint
        *(started(8), step(9, 2), step(10, 2), step(11, 2)),
        *(started(4), step(5, 3)),  # the newest checkpoint turned out damaged
    ]
    assert surviving_steps(events) == [*map(step, range(1, 5)), step(5, 3)]
