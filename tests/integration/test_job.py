"""Whole jobs on a real Ray, with `tests/fake_ranks.py` in place of the trainer."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from launcher.job.cluster import machines as cluster_has
from launcher.job.failures import NodeFailed, RankFailed
from launcher.job.ranks import Ranks, ready_ranks, run_ranks
from launcher.node import ownership
from launcher.placement import place
from machines import machines
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree, parse_yaml
from trainer.run_dir import RunDir

TESTS = Path(__file__).parents[1]
PATIENCE_SECONDS = 60  # only a broken program waits this long

pytestmark = pytest.mark.timeout(2 * PATIENCE_SECONDS)


@pytest.fixture(scope="module", autouse=True)
def fake_ranks_are_importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        yield


def config(**launch: object) -> RunConfig:
    return from_tree({"parallel": {"tensor": 2, "pipeline": 2}, "launch": {"device": "cpu", **launch}})


def new_run(path: Path, **launch: object) -> RunDir:
    run_dir = RunDir(path)
    run_dir.create(config(**launch))
    return run_dir


def do_nothing() -> None:
    pass


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def rank_pids(run_dir: RunDir) -> list[int]:
    return [int(path.read_text()) for path in run_dir.path.glob("pid-*")]


# ---------------------------------------------------------------------------------- one Ray, one round after another


@dataclass
class Bench:
    ranks: Ranks
    run_dir: RunDir
    foreign_ray: socket.socket

    def run(self, behaviour: str, on_poll: Callable[[], None] = do_nothing) -> None:
        for path in (*self.run_dir.path.glob("pid-*"), *self.run_dir.path.glob("*.sock")):
            path.unlink()
        (self.run_dir.path / "behaviour").write_text(behaviour)
        self.ranks.run("train", on_poll)


@pytest.fixture(scope="class")
def bench() -> Iterator[Bench]:
    """Warm agents; meanwhile the environment names another's Ray, which nobody must call."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as foreign_ray,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_ADDRESS", f"127.0.0.1:{foreign_ray.getsockname()[1]}")
        run_dir = new_run(Path(folder) / "run")
        with ready_ranks(config(), run_dir, "fake_ranks:as_told") as ranks:
            yield Bench(ranks, run_dir, foreign_ray)


class TestRoundsOnOneRay:
    def test_ranks_meet_in_a_private_file_and_talk_on_loopback(self, bench: Bench) -> None:
        bench.run("succeed")
        seen = [json.loads((bench.run_dir.path / f"rank-{rank}.json").read_text()) for rank in range(4)]
        assert [rank["rank"] for rank in seen] == [0, 1, 2, 3]
        (rendezvous,) = {rank["rendezvous"] for rank in seen}
        assert rendezvous.startswith("file://")
        session = Path(rendezvous.removeprefix("file://")).parent
        assert session.stat().st_mode & 0o077 == 0
        for rank in seen:
            assert rank["run_dir"] == str(bench.run_dir.path.resolve())
            assert rank["cwd"] == os.getcwd()
            assert rank["env"]["GLOO_SOCKET_IFNAME"] == "lo"
            assert from_tree(parse_yaml(rank["config_yaml"])) == config()

    def test_nothing_listens_beyond_loopback(self, bench: Bench) -> None:
        me = psutil.Process()
        listening = {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in [me, *me.children(recursive=True)]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}

    def test_another_ray_in_the_environment_is_left_alone(self, bench: Bench) -> None:
        bench.foreign_ray.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has knocked
            bench.foreign_ray.accept()

    def test_the_driver_is_called_again_and_again_while_ranks_run(self, bench: Bench) -> None:
        """The tenth call that sees all ranks up is what ends them."""
        calls_with_ranks = 0

        def kill_a_rank_at_last() -> None:
            nonlocal calls_with_ranks
            pids = rank_pids(bench.run_dir)
            calls_with_ranks += len(pids) == 4
            if calls_with_ranks == 10:
                os.kill(pids[0], signal.SIGTERM)

        with pytest.raises(RankFailed, match="was killed by SIGTERM; see"):
            bench.run("block", kill_a_rank_at_last)
        assert calls_with_ranks >= 10

    def test_a_rank_that_raises_is_named_with_its_log(self, bench: Bench) -> None:
        log = bench.run_dir.logs / "rank-1.log"
        with pytest.raises(RankFailed) as failure:
            bench.run("second_raises")
        assert str(failure.value) == f"rank 1 raised ValueError: the batch is empty; see {log}"
        assert (failure.value.rank, failure.value.log_path) == (1, log)
        assert "this is the second line" in log.read_text()

    def test_a_user_error_in_a_rank_is_a_user_error(self, bench: Bench) -> None:
        with pytest.raises(UserError) as failure:
            bench.run("second_complains")
        assert str(failure.value) == "the corpus is too small for one batch; add text"

    def test_a_killed_rank_is_named_and_takes_the_others_down_at_once(self, bench: Bench) -> None:
        with pytest.raises(RankFailed) as failure:
            bench.run("second_dies_and_its_peers_lose_the_connection")
        seconds = time.time() - float((bench.run_dir.path / "acted-at").read_text())
        assert str(failure.value).startswith("rank 1 was killed by SIGKILL")
        pids = rank_pids(bench.run_dir)
        assert len(pids) == 4 and not any(is_alive(pid) for pid in pids)
        assert seconds < 2

    def test_after_failures_the_same_agents_run_again(self, bench: Bench) -> None:
        bench.run("succeed")


# --------------------------------------------------------------------------------------------- the end of the driver

DRIVER = """
import sys
from pathlib import Path
from launcher.job.ranks import run_ranks
from trainer.config_file import load
from trainer.run_dir import RunDir
path = Path(sys.argv[1])
run_ranks(load(path / "config.yaml"), RunDir(path), "train", lambda: None, target="fake_ranks:block")
"""


@pytest.fixture
def temp_root() -> Iterator[Path]:
    """A short path for the driver's own temporary files, to see what it leaves."""
    with tempfile.TemporaryDirectory(prefix="bg-test-") as folder:
        yield Path(folder)


def start_driver(run_dir: RunDir, temp_root: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run_dir.path)],
        env={**os.environ, "TMPDIR": str(temp_root)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def descendants(pid: int) -> list[int]:
    return [process.pid for process in psutil.Process(pid).children(recursive=True)]


def test_kill_9_of_the_driver_leaves_nothing_and_the_next_job_starts_at_once(tmp_path: Path, temp_root: Path) -> None:
    run_dir = new_run(tmp_path / "run")
    driver = start_driver(run_dir, temp_root)
    until(lambda: len(rank_pids(run_dir)) == 4)
    family = descendants(driver.pid)
    assert set(rank_pids(run_dir)) < set(family)
    driver.kill()

    run_ranks(config(), run_dir, "train", do_nothing, target="fake_ranks:find_predecessors_dead")

    assert driver.wait() == -signal.SIGKILL
    until(lambda: not any(is_alive(pid) for pid in family))
    assert not list(temp_root.iterdir())


def test_kill_9_of_the_driver_while_ray_starts_leaves_nothing(tmp_path: Path, temp_root: Path) -> None:
    run_dir = new_run(tmp_path / "run")
    driver = start_driver(run_dir, temp_root)
    until(lambda: any("gcs_server" in name for name in map(process_name, descendants(driver.pid))))
    family = descendants(driver.pid)
    driver.kill()
    driver.wait()
    until(lambda: not any(is_alive(pid) for pid in family))
    assert not list(temp_root.iterdir())
    ownership.wait_until_free(run_dir.path / ".ranks.lock", PATIENCE_SECONDS)


def process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_driver_cleans_up(number: signal.Signals, tmp_path: Path, temp_root: Path) -> None:
    run_dir = new_run(tmp_path / "run")
    driver = start_driver(run_dir, temp_root)
    until(lambda: len(rank_pids(run_dir)) == 4)
    family = descendants(driver.pid)
    if number == signal.SIGINT:
        os.killpg(driver.pid, number)  # as a terminal does
    else:
        driver.send_signal(number)
    _, errors = driver.communicate(timeout=PATIENCE_SECONDS)
    assert b"KeyboardInterrupt" in errors
    assert not any(is_alive(pid) for pid in family)
    assert not list(temp_root.iterdir())


# ----------------------------------------------------------------------------------------------- agents and machines


def test_the_death_of_an_agent_is_told_from_that_of_a_rank(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run")

    def kill_the_agent_once_ranks_are_up() -> None:
        if len(rank_pids(run_dir)) == 4:
            for pid in descendants(os.getpid()):
                if process_name(pid).startswith("ray::Agent"):
                    os.kill(pid, signal.SIGKILL)

    with pytest.raises(NodeFailed) as failure:
        run_ranks(config(), run_dir, "train", kill_the_agent_once_ranks_are_up, target="fake_ranks:block")
    log = run_dir.logs / "node-0.log"
    assert str(failure.value) == f"node 0: the agent died, and its ranks with it; see {log}"
    assert not any(is_alive(pid) for pid in rank_pids(run_dir))


def test_two_machines_without_a_cluster_are_refused_before_anything_starts(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run", nodes=2)
    with pytest.raises(UserError, match=r"launch.nodes is 2, .*; set it to 1"):
        run_ranks(config(nodes=2), run_dir, "train", do_nothing)
    assert not list(run_dir.logs.iterdir())


@pytest.mark.slow
def test_a_task_after_a_machine_was_lost_runs_on_those_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.job.ranks._ARRIVAL_SECONDS", 1.0)
    whole = from_tree({"parallel": {"data": 2}, "launch": {"device": "cpu", "nodes": 2}})
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(whole)
    with machines(2) as cluster, ready_ranks(whole, run_dir, "fake_ranks:succeed", on_cluster=True) as ranks:
        ranks.run("evaluate", do_nothing)
        cluster.kill(str(ranks.fleet.machine_of(0)))
        until(lambda: (ranks.fleet.news(), len(ranks.fleet.present()))[1] == 1)
        ranks.run("evaluate", do_nothing)
    told = json.loads((run_dir.path / "rank-0.json").read_text())
    assert told["world_size"] == 1 and from_tree(parse_yaml(told["config_yaml"])).parallel.data == 1


def test_ranks_of_two_machines_meet_at_the_first(tmp_path: Path) -> None:
    """On the machines that the labels ask for, in their order, and with the environment that the run asks for."""
    launch = {"nodes": 2, "labels": {"kind": "fast"}, "topology": "rack", "env": {"NCCL_DEBUG": "WARN"}}
    run_dir, target = new_run(tmp_path / "run", **launch), "fake_ranks:meet_at_rendezvous"
    with machines(0) as cluster:
        names = []
        for kind, rack in (("fast", "2"), ("slow", "0"), ("fast", "1")):
            names.append(cluster.start(kind=kind, rack=rack))
            cluster.wait_for(names[-1])
        with ready_ranks(config(**launch), run_dir, target, on_cluster=True) as ranks:
            ranks.run("train", do_nothing)
            here = [json.loads((run_dir.path / f"rank-{rank}.json").read_text()) for rank in range(4)]
            assert [cluster.name_of(rank["parent"]) for rank in here] == [names[2], names[2], names[0], names[0]]
        with pytest.raises(UserError, match=r"launch.labels kind=odd are on 0 of 4 machines, .* has kind=fast, kind=s"):
            place(config(**{**launch, "labels": {"kind": "odd"}}), cluster_has())
    seen = [json.loads((run_dir.path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert [rank["local_rank"] for rank in seen] == [0, 1, 0, 1]
    assert len({rank["rendezvous"] for rank in seen}) == 1
    assert {rank["env"]["NCCL_DEBUG"] for rank in seen} == {"WARN"}
