"""Real worker processes, killed and failing in every way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from data_pipeline.tasks import MAX_TRIES, Advance, Done, Failed
from data_pipeline.workers import LocalWorkers
from trainer.config import UserError
from worker_tasks import Told

PATIENCE_SECONDS = 60  # only a broken program waits this long


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalWorkers]:
    with LocalWorkers(2) as workers:
        yield workers


def ignore(advance: Advance) -> None:
    pass


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s in vain"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids(folder: Path) -> list[int]:
    """Of the processes that tasks have run in, once they are written."""
    return [int(content) for path in sorted(folder.glob("*-*")) if (content := path.read_text())]


def test_outcomes_are_in_the_order_of_the_tasks_and_progress_is_their_sum(pool: LocalWorkers, tmp_path: Path) -> None:
    seen: list[Advance] = []
    outcomes = pool.run([Told(tmp_path, number) for number in range(20)], seen.append)
    assert outcomes == [Done(f"result {number}", Advance(10, 2, 3)) for number in range(20)]
    assert [advance.input_bytes for advance in seen] == sorted(advance.input_bytes for advance in seen)
    assert seen[-1] == Advance(200, 40, 60)
    assert len(set(pids(tmp_path))) == 2
    assert os.getpid() not in pids(tmp_path)
    assert pool.run([], ignore) == []


def test_progress_counts_what_has_finished_and_what_is_being_done(pool: LocalWorkers, tmp_path: Path) -> None:
    """The first task waits until the others are done, and its own first byte is heard of before that."""
    seen: list[Advance] = []

    def hear(advance: Advance) -> None:
        seen.append(advance)
        if advance.input_bytes >= 50:
            (tmp_path / "go").touch()

    pool.run([Told(tmp_path, 0, "wait_for_go"), *(Told(tmp_path, number) for number in range(1, 6))], hear)
    assert {50, 60} <= {advance.input_bytes for advance in seen}
    assert seen[-1] == Advance(60, 12, 18)


@pytest.mark.parametrize("behaviour", ["kill", "leave", "complain", "panic"])
def test_a_task_that_fails_at_first_is_tried_again(behaviour: str, pool: LocalWorkers, tmp_path: Path) -> None:
    tasks = [Told(tmp_path, 0), Told(tmp_path, 1, behaviour, times=MAX_TRIES - 1), Told(tmp_path, 2)]
    assert [outcome.result for outcome in pool.run(tasks, ignore) if isinstance(outcome, Done)] == [
        "result 0",
        "result 1",
        "result 2",
    ]
    assert len(list(tmp_path.glob("1-*"))) == MAX_TRIES


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("kill", "the worker died (SIGKILL)"),
        ("leave", "the worker died (exit code 7)"),
        ("complain", "ValueError: two lines"),
        ("panic", "BaseException: as Rust does"),
    ],
)
def test_a_task_that_always_fails_is_given_up_and_the_others_finish(
    behaviour: str, reason: str, pool: LocalWorkers, tmp_path: Path
) -> None:
    seen: list[Advance] = []
    tasks = [Told(tmp_path, number, behaviour if number == 1 else "succeed") for number in range(5)]
    outcomes = pool.run(tasks, seen.append)
    failed = outcomes.pop(1)
    assert isinstance(failed, Failed)
    assert failed.reason == reason and not failed.is_final
    assert ("Traceback" in failed.details) == (behaviour in ("complain", "panic"))
    assert all(isinstance(outcome, Done) for outcome in outcomes)
    assert len(list(tmp_path.glob("1-*"))) == MAX_TRIES
    assert seen[-1].input_bytes >= 40


@pytest.mark.parametrize(
    ("behaviour", "line"),
    [
        ("refuse", "mend it"),
        ("fill_disk", "the prepared data cannot be written (No space left on device); make room and run again"),
        ("be_denied", "/data/part cannot be written (Permission denied); allow it and run again"),
    ],
)
def test_what_the_user_can_mend_ends_the_run_at_once(
    behaviour: str, line: str, pool: LocalWorkers, tmp_path: Path
) -> None:
    tasks = [Told(tmp_path, 0, "block"), Told(tmp_path, 1, behaviour), *(Told(tmp_path, i) for i in range(2, 9))]
    with pytest.raises(UserError) as refusal:
        pool.run(tasks, ignore)
    assert str(refusal.value).startswith(line)
    assert len(list(tmp_path.glob("1-*"))) == 1, "it was not tried again"


def test_workers_that_answer_an_ended_run_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LocalWorkers(4) as pool:
        for number in range(6):
            folder = tmp_path / str(number)
            folder.mkdir()
            waiting = [Told(folder, i, "wait_for_go") for i in range(3)]
            with pytest.raises(UserError):
                pool.run([*waiting, Told(folder, 3, "let_go_and_refuse")], ignore)
    assert capfd.readouterr().err == ""


def test_what_an_ended_run_was_doing_is_not_taken_for_the_next_one(pool: LocalWorkers, tmp_path: Path) -> None:
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError):
        pool.run([Told(tmp_path / "before", 0, "block"), Told(tmp_path / "before", 1, "refuse")], ignore)
    outcomes = pool.run([Told(tmp_path / "after", number) for number in range(4)], ignore)
    assert outcomes == [Done(f"result {number}", Advance(10, 2, 3)) for number in range(4)]
    until(lambda: not set(filter(is_alive, pids(tmp_path / "before"))) - set(pids(tmp_path / "after")))


def test_a_worker_that_dies_while_idle_is_replaced(pool: LocalWorkers, tmp_path: Path) -> None:
    pool.run([Told(tmp_path, number) for number in range(8)], ignore)
    for pid in set(pids(tmp_path)):
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: not is_alive(pid))
    assert all(isinstance(outcome, Done) for outcome in pool.run([Told(tmp_path, n) for n in (10, 11)], ignore))


def begun(try_file: Path) -> int | None:
    """The process that this try of a task runs in, once it has begun."""
    return int(content) if try_file.exists() and (content := try_file.read_text()) else None


def test_a_worker_killed_from_outside_does_not_fail_its_task(pool: LocalWorkers, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_it(advance: Advance) -> None:
        if not killed and (pid := begun(tmp_path / "0-1")):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    tasks = [Told(tmp_path, 0, "block", times=1), *(Told(tmp_path, number) for number in range(1, 40))]
    assert all(isinstance(outcome, Done) for outcome in pool.run(tasks, kill_it))
    assert len(killed) == 1


def test_a_worker_does_not_hear_of_ctrl_c(pool: LocalWorkers, tmp_path: Path) -> None:
    interrupted: list[int] = []

    def interrupt_it(advance: Advance) -> None:
        if not interrupted and (pid := begun(tmp_path / "0-1")):
            os.kill(pid, signal.SIGINT)
            interrupted.append(pid)
            (tmp_path / "go").touch()

    tasks = [Told(tmp_path, 0, "wait_for_go"), *(Told(tmp_path, number) for number in range(1, 6))]
    assert isinstance(pool.run(tasks, interrupt_it)[0], Done)
    assert len(list(tmp_path.glob("0-*"))) == len(interrupted) == 1


def test_workers_end_with_the_pool(tmp_path: Path) -> None:
    with LocalWorkers(2) as workers:
        workers.run([Told(tmp_path, number) for number in range(8)], ignore)
        started = set(pids(tmp_path))
        assert all(map(is_alive, started))
    assert not any(map(is_alive, started))


def test_modules_come_from_where_the_driver_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the folder that the user happens to work in."""
    monkeypatch.chdir(tmp_path)
    for name in ("numpy", "errno", "worker_tasks"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('somebody else')")
    with LocalWorkers(1) as workers:
        assert isinstance(workers.run([Told(tmp_path, 0)], ignore)[0], Done)


DRIVER = """
import sys
from pathlib import Path
from data_pipeline.workers import LocalWorkers
from worker_tasks import Told
folder = Path(sys.argv[1])
with LocalWorkers(2) as workers:
    (folder / "ready").touch()
    workers.run([Told(folder, number, "block") for number in range(4)], lambda advance: None)
"""


def start_driver(folder: Path) -> "subprocess.Popen[str]":
    root = Path(__file__).parents[3]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)],
        env=os.environ | {"PYTHONPATH": f"{root}:{root}/tests"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_driver_that_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    driver = start_driver(tmp_path)
    until(lambda: len(pids(tmp_path)) == 2)
    driver.send_signal(number)
    assert driver.wait(PATIENCE_SECONDS) == -number
    until(lambda: not any(map(is_alive, pids(tmp_path))))


@pytest.mark.parametrize("moment", ["ready", "0-1"])
def test_ctrl_c_leaves_nothing_and_only_the_driver_speaks(moment: str, tmp_path: Path) -> None:
    """While workers start, and while they work."""
    driver = start_driver(tmp_path)
    until((tmp_path / moment).exists)
    family = [process.pid for process in psutil.Process(driver.pid).children(recursive=True)]
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
    _, errors = driver.communicate(timeout=PATIENCE_SECONDS)
    assert driver.returncode == -signal.SIGINT
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1
    assert len(family) == 2 and not any(map(is_alive, family))
