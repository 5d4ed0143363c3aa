"""What a rank says of itself, as others read it: never half of one thing and half of another."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from trainer.device import memory
from trainer.heartbeat import PHASES, STEP_PHASES, Beat, Heartbeat, Memory, StepTime, beat_path, process_stat, read


def test_a_rank_is_seen_from_its_start_to_its_end(tmp_path: Path) -> None:
    path = beat_path(tmp_path, 3)
    assert read(path) is None
    before = time.time()
    heartbeat = Heartbeat(path)
    beat = reading(path)
    assert (beat.pid, beat.start_ticks) == (os.getpid(), process_stat(os.getpid()).start_ticks)
    assert (beat.phase, beat.step, beat.num_steps) == ("starting", 0, 0)
    assert before <= beat.began <= time.time()
    heartbeat.phase("computing")
    heartbeat.step_done(41)
    heartbeat.phase("ending")
    beat = reading(path)
    assert (beat.phase, beat.step, beat.num_steps) == ("ending", 41, 1)
    assert 0 <= beat.silent_seconds <= time.time() - before


def test_time_is_counted_for_the_phase_in_which_it_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    heartbeat = Heartbeat(tmp_path / "beat")
    for phase, seconds in (("loading data", 2.0), ("computing", 5.0), ("loading data", 1.0), ("agreeing", 0.25)):
        heartbeat.phase(phase)  # type: ignore[arg-type]
        now += seconds
        heartbeat.waited(seconds / 4)
    assert reading(tmp_path / "beat").silent_seconds == 0.25
    assert reading(tmp_path / "beat").seconds["agreeing"] == 0  # it is still in it
    heartbeat.phase("ending")
    beat = reading(tmp_path / "beat")
    assert beat.seconds == dict.fromkeys(PHASES, 0.0) | {"loading data": 3.0, "computing": 5.0, "agreeing": 0.25}
    assert beat.waited == {phase: seconds / 4 for phase, seconds in beat.seconds.items()}


def test_it_is_told_how_the_time_of_the_last_step_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, the end of the step too, and nothing of what lies between two steps."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    heartbeat = Heartbeat(tmp_path / "beat")
    for step in (1, 2):
        for place, phase in enumerate(STEP_PHASES):
            heartbeat.phase(phase)
            now += step * (place + 1)
            heartbeat.waited(step * place)
        heartbeat.step_done(step)
        expected = StepTime(
            {phase: step * (place + 1.0) for place, phase in enumerate(STEP_PHASES)},
            {phase: float(step * place) for place, phase in enumerate(STEP_PHASES)},
        )
        assert reading(tmp_path / "beat").last_step == heartbeat.last_step == expected
        assert expected.own_seconds == step * len(STEP_PHASES)
        heartbeat.phase("saving")
        now += 50
        heartbeat.phase("starting")
    assert reading(tmp_path / "beat").seconds["agreeing"] == 15 and reading(tmp_path / "beat").seconds["saving"] == 100


def test_memory_is_told_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, num_measured = 100.0, 0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def measured() -> Memory:
        nonlocal num_measured
        num_measured += 1
        return Memory(num_measured, 2, 3)

    heartbeat = Heartbeat(tmp_path / "beat")
    heartbeat.measure = measured
    for step, seconds in enumerate((0.0, 0.5, 0.4, 0.2), 1):
        now += seconds
        heartbeat.step_done(step)
    assert num_measured == 2 and reading(tmp_path / "beat").memory == Memory(2, 2, 3)


def test_a_step_pays_next_to_nothing_for_being_looked_at(tmp_path: Path) -> None:
    """Less than a thousandth of a step of 100 ms, with memory measured each time."""
    heartbeat = Heartbeat(tmp_path / "beat")
    heartbeat.measure = lambda: memory(torch.device("cpu"))
    took = []
    for step in range(500):
        heartbeat._measured = -1e9
        began = time.perf_counter()
        for phase in STEP_PHASES:
            heartbeat.phase(phase)
        heartbeat.step_done(step)
        took.append(time.perf_counter() - began)
    assert sorted(took)[len(took) // 2] < 100e-6


def test_a_rank_that_nobody_looks_at_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    heartbeat = Heartbeat()
    heartbeat.phase("computing")
    heartbeat.step_done(1)
    assert not heartbeat.is_kept and list(tmp_path.iterdir()) == []


def test_a_rank_trains_on_where_no_file_can_be_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    heartbeat = Heartbeat(tmp_path / "missing" / "beat")
    heartbeat.phase("computing")
    assert not heartbeat.is_kept
    assert "no heartbeat will be kept" in capfd.readouterr().err


def test_what_is_no_beat_is_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "beat"
    for content in (b"", b"short", bytes(1024), b"\xff" * 1024):
        path.write_bytes(content)
        assert read(path) is None


def test_half_a_beat_leaves_the_one_before_it(tmp_path: Path) -> None:
    """Whatever part of the newest beat is in the file when its writer is killed or stopped."""
    path = tmp_path / "beat"
    heartbeat = Heartbeat(path)
    heartbeat.step_done(1)
    before = path.read_bytes()
    heartbeat.step_done(2)
    after = path.read_bytes()
    changed = [place for place in range(len(before)) if before[place] != after[place]]
    assert len(changed) > 8
    seen = set()
    for num_written in range(len(changed) + 1):
        torn = bytearray(before)
        for place in changed[:num_written]:
            torn[place] = after[place]
        path.write_bytes(torn)
        seen.add((num_written == len(changed), reading(path).step))
    assert seen == {(False, 1), (True, 2)}


def test_a_reader_never_mixes_what_a_busy_writer_says(tmp_path: Path) -> None:
    """Nor after the writer was killed in the middle of it."""
    path = tmp_path / "beat"
    pid = os.fork()
    if pid == 0:
        heartbeat, step = Heartbeat(path), 0
        while True:  # by what each beat says of steps, all of its other numbers can be told
            step += 1
            heartbeat._step = heartbeat._num_steps = step
            heartbeat._seconds, heartbeat._waited = [float(step)] * len(PHASES), [step / 2] * len(PHASES)
            heartbeat._last_step = [step / 4] * (2 * len(STEP_PHASES))
            heartbeat._memory = Memory(step, 2 * step, 3 * step)
            heartbeat._write(time.monotonic())
    try:
        last, num_seen, deadline = 0, 0, time.monotonic() + 30
        while num_seen < 500 and time.monotonic() < deadline:
            beat = read(path)
            if beat is None or not beat.step:
                continue
            check(beat)
            assert beat.step >= last
            num_seen, last = num_seen + (beat.step > last), beat.step
        assert num_seen == 500
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    beat = reading(path)
    check(beat)
    assert beat.step >= last and beat.pid == pid


def test_a_new_life_of_a_rank_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "beat"
    Heartbeat(path).step_done(7)
    Heartbeat(path)
    assert (reading(path).step, reading(path).num_steps) == (0, 0)
    assert [item.name for item in tmp_path.iterdir()] == ["beat"]


def reading(path: Path) -> Beat:
    beat = read(path)
    assert beat is not None
    return beat


def check(beat: Beat) -> None:
    assert beat.num_steps == beat.step
    assert set(beat.seconds.values()) == {float(beat.step)}
    assert set(beat.waited.values()) == {beat.step / 2}
    assert {*beat.last_step.seconds.values(), *beat.last_step.waited.values()} == {beat.step / 4}
    assert beat.memory == Memory(beat.step, 2 * beat.step, 3 * beat.step)
