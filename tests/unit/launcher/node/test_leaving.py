"""A machine that is to leave tells the run that works on it, and waits for it; other runs are none of its business."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from launcher.node.leaving import Process, RayNode, leave, processes, ray_node
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
import os, pathlib, sys, time
server = os.getpid()
if os.fork() == 0:
    pathlib.Path(sys.argv[3]).touch()
    while os.getppid() == server and not pathlib.Path(sys.argv[4]).exists():
        time.sleep(0.01)
    os._exit(0)
os.wait()
time.sleep(600)
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
    """A fork server by its arguments, which stays, and a rank forked from it, which ends when its node is drained."""
    told = f'{{"logs": "{run_dir.logs}"}}'
    ready = folder / "ranks.ready"
    return start("-c", RANKS, FORK_SERVER, told, ready, folder / "drained", ready=ready)


def only(*started: subprocess.Popen[bytes]) -> Callable[[], Sequence[Process]]:
    """The processes of this machine that a pod would have: those that live of these, and their children."""
    ids = {process.pid for process in started}

    def find() -> Sequence[Process]:
        for process in started:
            process.poll()  # else its arguments stay
        return [RAYLET, *(each for each in processes() if ids & {each.pid, each.parent} and each.arguments != [""])]

    return find


RAYLET = Process(0, 0, ["/opt/ray/core/src/ray/raylet/raylet", "--node_id=c0ffee", "--gcs-address=10.0.0.1:6379"])


class Ray:
    """Whom it is told of nodes that leave; what lives on them ends then."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.told: list[tuple[RayNode, float]] = []

    def drain(self, node: RayNode, seconds: float) -> None:
        self.told.append((node, seconds))
        (self._folder / "drained").touch()


def made(path: Path) -> RunDir:
    path.mkdir(parents=True)
    return RunDir(path)


def test_the_driver_is_asked_and_waited_for(start: Start, tmp_path: Path) -> None:
    run_dir, ray = made(tmp_path / "runs" / "one"), Ray(tmp_path)
    mine = driver(start, tmp_path / "bin", run_dir.path)
    assert leave(run_dir, DEADLINE_SECONDS, only(mine), ray.drain)
    assert mine.wait() == 75 and not ray.told


def test_ray_is_told_where_there_are_ranks_alone(start: Start, tmp_path: Path) -> None:
    run_dir, ray = made(tmp_path / "runs" / "one"), Ray(tmp_path)
    mine = ranks(start, tmp_path, run_dir)
    assert leave(run_dir, DEADLINE_SECONDS, only(mine), ray.drain)
    assert mine.poll() is None  # the server stays
    assert ray.told == [(RayNode("10.0.0.1:6379", "c0ffee"), DEADLINE_SECONDS)]


def test_nobody_is_waited_for_longer_than_told(start: Start, tmp_path: Path) -> None:
    run_dir = made(tmp_path / "runs" / "one")
    mine = ranks(start, tmp_path, run_dir)
    assert not leave(run_dir, 0.5, only(mine), lambda *_: None)


def test_what_ranks_have_left_is_waited_for(start: Start, tmp_path: Path) -> None:
    """The driver takes its request back when it is saved."""
    run_dir, ray = made(tmp_path / "runs" / "one"), Ray(tmp_path)
    mine = ranks(start, tmp_path, run_dir)
    run_dir.stop_path.touch()
    assert not leave(run_dir, 1.0, only(mine), ray.drain) and ray.told


def test_where_nothing_is_at_work_nobody_is_told_nor_waited_for(start: Start, tmp_path: Path) -> None:
    run_dir, other, ray = made(tmp_path / "runs" / "one"), made(tmp_path / "runs" / "one-more"), Ray(tmp_path)
    others = driver(start, tmp_path / "bin", other.path), ranks(start, tmp_path, other)
    assert leave(run_dir, 0.0, only(*others), ray.drain)
    assert not ray.told and [process.poll() for process in others] == [None, None]


def test_a_machine_without_ray_has_no_node() -> None:
    assert ray_node([Process(1, 0, ["bash"]), Process(2, 1, [""])]) is None


def test_a_pod_that_never_saw_its_run_leaves_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.node.leaving", str(tmp_path / "nowhere"), "30"]
    root = Path(__file__).parents[4]
    done = subprocess.run(command, cwd=root, timeout=DEADLINE_SECONDS, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and not (tmp_path / "nowhere").exists()
