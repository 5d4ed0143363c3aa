"""A machine that is to leave asks the run's driver to end, and waits for it; other runs are none of its business."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from launcher.node.leaving import Process, leave, processes
from trainer.run_dir import RunDir

FORK_SERVER = "from launcher.node.fork_server import serve; serve()"
DRIVER = """
import pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
pathlib.Path(sys.argv[0] + ".ready").touch()
while not asked:
    time.sleep(0.01)
sys.exit(75)
"""
RANKS = """
import pathlib, sys, time
pathlib.Path(sys.argv[3]).touch()
while not pathlib.Path(sys.argv[4]).exists():
    time.sleep(0.01)
"""
DEADLINE_SECONDS = 60.0

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: object, ready: Path) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, *map(str, arguments)]))
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def driver(start: Start, folder: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    """A process that is called as `broadgauge run` is, and ends as preempted when it is asked to."""
    folder.mkdir(parents=True)
    program = folder / "broadgauge"
    program.write_text(DRIVER)
    return start(program, "run", "config.yaml", "--run-dir", run_dir, ready=folder / "broadgauge.ready")


def ranks(start: Start, folder: Path, run_dir: RunDir) -> subprocess.Popen[bytes]:
    """A process with the arguments of a run's ranks, which ends when the run is asked to stop."""
    told = f'{{"logs": "{run_dir.logs}"}}'
    ready = folder / "ranks.ready"
    return start("-c", RANKS, FORK_SERVER, told, ready, run_dir.stop_path, ready=ready)


def only(*started: subprocess.Popen[bytes]) -> Callable[[], Sequence[Process]]:
    """The processes of this machine that a pod would have: those that live of these."""
    ids = {process.pid for process in started}

    def find() -> Sequence[Process]:
        for process in started:
            process.poll()  # else its arguments stay
        return [process for process in processes() if process.pid in ids and process.arguments != [""]]

    return find


def made(path: Path) -> RunDir:
    path.mkdir(parents=True)
    return RunDir(path)


def test_the_driver_is_asked_and_waited_for(start: Start, tmp_path: Path) -> None:
    run_dir = made(tmp_path / "runs" / "one")
    mine = driver(start, tmp_path / "bin", run_dir.path)
    assert leave(run_dir, DEADLINE_SECONDS, only(mine))
    assert mine.wait() == 75


def test_ranks_are_asked_through_the_folder_of_the_run(start: Start, tmp_path: Path) -> None:
    run_dir = made(tmp_path / "runs" / "one")
    mine = ranks(start, tmp_path, run_dir)
    assert leave(run_dir, DEADLINE_SECONDS, only(mine))
    assert mine.wait() == 0 and run_dir.stop_path.exists()


def test_nobody_is_waited_for_longer_than_told(start: Start, tmp_path: Path) -> None:
    run_dir = made(tmp_path / "runs" / "one")
    mine = ranks(start, tmp_path, run_dir)
    os.kill(mine.pid, signal.SIGSTOP)
    assert not leave(run_dir, 0.5, only(mine))


def test_where_nothing_is_at_work_nothing_is_asked_nor_waited_for(start: Start, tmp_path: Path) -> None:
    run_dir, other = made(tmp_path / "runs" / "one"), made(tmp_path / "runs" / "one-more")
    others = driver(start, tmp_path / "bin", other.path), ranks(start, tmp_path, other)
    assert leave(run_dir, 0.0, only(*others))
    assert not run_dir.stop_path.exists() and not other.stop_path.exists()
    assert [process.poll() for process in others] == [None, None]


def test_a_pod_that_never_saw_its_run_leaves_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.node.leaving", str(tmp_path / "nowhere"), "30"]
    root = Path(__file__).parents[4]
    done = subprocess.run(command, cwd=root, timeout=DEADLINE_SECONDS, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and not (tmp_path / "nowhere").exists()
