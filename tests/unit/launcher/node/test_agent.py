"""An agent with its fork server and real ranks, without Ray: it is a plain object until Ray hosts it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from launcher.job.failures import first_failure
from launcher.node import fork_server, ownership
from launcher.node.agent import Agent, Job, NodeEnd, Round
from launcher.node.fork_server import Ready, ServerOptions, Start
from launcher.placement import Placement
from made_checkpoints import write_checkpoint
from trainer.config_file import from_tree
from trainer.events import read_events
from trainer.rank_spec import Task

TESTS = Path(__file__).parents[3]
SIX_RANKS = {"parallel": {"data": 6}, "train": {"global_batch_size": 6}}
THREE_HERE = Placement(nodes=2, ranks_per_node=3, gpus_per_node=0)


class Bench:
    """Makes agents over a run folder and runs rounds on them."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._rounds = 0
        self.agents: list[Agent] = []

    def agent(self, target: str = "fake_ranks:as_told", job_id: str = "job", **checkpoint: Any) -> Agent:
        config = from_tree({**SIX_RANKS, "launch": {"nodes": 2, "threads_per_rank": 7}, "checkpoint": checkpoint})
        lock = self.run_dir / ".ranks.lock"
        ownership.claim(lock, "job", timeout_seconds=10)
        logs, folder = self.run_dir / "logs", self.run_dir / "memory"
        job = Job(job_id, config, self.run_dir, logs, lock, target, cwd=str(self.run_dir), folder=folder)
        self.agents.append(Agent(job, slot=1))
        return self.agents[-1]

    def run(self, agent: Agent, behaviour: str, task: Task = "evaluate") -> NodeEnd:
        (self.run_dir / "behaviour").write_text(behaviour)
        self._rounds += 1
        rendezvous = f"file:///nowhere-{self._rounds}"
        place = THREE_HERE, 1, self._rounds
        return agent.run(Round(task, rendezvous, agent._job.config, *place, Path("a/checkpoint"), Path("out")))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    (tmp_path / "logs").mkdir()
    bench = Bench(tmp_path)
    yield bench
    for agent in bench.agents:
        agent.leave()
    ownership.wait_until_free(tmp_path / ".ranks.lock", timeout_seconds=10)


def test_ranks_are_told_their_place_and_work_where_the_driver_does(bench: Bench) -> None:
    assert bench.run(bench.agent(), "succeed") == NodeEnd(())
    seen = [json.loads((bench.run_dir / f"rank-{rank}.json").read_text()) for rank in (3, 4, 5)]
    for local_rank, rank in enumerate(seen):
        assert (rank["rank"], rank["local_rank"]) == (3 + local_rank, local_rank)
        assert (rank["world_size"], rank["local_world_size"]) == (6, 3)
        assert (rank["task"], rank["rendezvous"]) == ("evaluate", "file:///nowhere-1")
        assert (rank["checkpoint"], rank["output"]) == ("a/checkpoint", "out")
        assert (rank["threads"], rank["env"]["OMP_NUM_THREADS"]) == (7, "7")
        assert rank["env"]["CUDA_VISIBLE_DEVICES"] == ""  # no GPUs were placed
        assert "GLOO_SOCKET_IFNAME" not in rank["env"]  # two machines do not meet on loopback
        assert rank["cwd"] == str(bench.run_dir)
    assert len({rank["pid"] for rank in seen}) == 3


def test_all_that_a_rank_writes_goes_to_its_log_round_after_round(bench: Bench) -> None:
    agent = bench.agent()
    for _ in range(2):
        assert bench.run(agent, "succeed") == NodeEnd(())
    lines = (bench.run_dir / "logs/rank-4.log").read_text().splitlines()
    assert sorted(lines) == sorted(["printed", "complained", "written past Python"] * 2)


def test_the_first_rank_to_raise_is_named_and_the_others_are_killed(bench: Bench) -> None:
    end = bench.run(bench.agent(), "second_raises")
    assert end.problem is None
    (failed,) = end.failed
    assert (failed.rank, failed.error) == (4, "raised ValueError: the batch is empty")
    assert not failed.by_signal and not failed.killed and failed.user_error is None
    log = (bench.run_dir / "logs/rank-4.log").read_text()
    assert "Traceback" in log and "and this is the second line" in log
    assert_dead(bench.run_dir)


def test_a_crash_is_reported_before_anything_is_uploaded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a store that hangs; the next life of the run sends it."""
    (bench.run_dir / "sitecustomize.py").write_text(
        "import unreliable_store\nunreliable_store.UnreliableStore.trouble.hangs_in = 'list'\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{bench.run_dir}:{TESTS}:{TESTS.parent}")
    (bench.run_dir / "run-id").write_text("run")
    weights = {"master/weight": np.zeros((6, 2), np.float32)}
    write_checkpoint(bench.run_dir / "checkpoints", 10, weights, files=6)
    upload_to = f"unreliable://{bench.run_dir}/remote"
    agent = bench.agent(upload_to=upload_to, snapshots_in=str(bench.run_dir))
    (failed,) = bench.run(agent, "second_raises", "train").failed
    assert failed.rank == 4
    events = read_events(bench.run_dir / "events.jsonl")
    assert not events, "it hangs, and lives"


def test_a_user_error_keeps_its_text(bench: Bench) -> None:
    (failed,) = bench.run(bench.agent(), "second_complains").failed
    assert failed.rank == 4
    assert failed.user_error == "the corpus is too small for one batch; add text"


def test_leaving_early_is_a_failure_whatever_the_exit_code(bench: Bench) -> None:
    (failed,) = bench.run(bench.agent(), "second_leaves").failed
    assert (failed.rank, failed.error) == (4, "exited with code 0 before its end")


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("no_such_module:main", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("fake_ranks:no_such_function", "AttributeError: module 'fake_ranks' has no attribute 'no_such_function'"),
    ],
)
def test_what_cannot_be_imported_is_said(bench: Bench, target: str, problem: str) -> None:
    end = bench.run(bench.agent(target), "succeed")
    assert end == NodeEnd((), f"importing {target} failed with {problem}")
    assert "Traceback" in (bench.run_dir / "logs/node-1.log").read_text()


def test_ranks_end_with_their_fork_server(bench: Bench) -> None:
    agent = bench.agent()
    end = bench.run(agent, "second_kills_the_fork_server")
    assert end == NodeEnd((), "the fork server died, and its ranks with it")
    ownership.wait_until_free(bench.run_dir / ".ranks.lock", timeout_seconds=5)
    assert_dead(bench.run_dir)


def test_a_fork_server_of_an_older_job_leaves_the_run_alone(bench: Bench) -> None:
    end = bench.run(bench.agent(job_id="older"), "succeed")
    assert end == NodeEnd((), "the fork server died, and its ranks with it")
    assert not list(bench.run_dir.glob("rank-*.json"))


def test_a_fork_server_that_cannot_start_is_a_failure_of_the_node(bench: Bench) -> None:
    (bench.run_dir / "logs").rmdir()
    end = bench.run(bench.agent(), "succeed")
    assert end.problem is not None and "logs/node-1.log" in end.problem


def test_a_rank_killed_by_a_signal_comes_with_the_errors_of_its_peers(bench: Bench) -> None:
    failed = bench.run(bench.agent(), "second_dies_and_its_peers_lose_the_connection").failed
    killed = [end for end in failed if end.by_signal]
    assert [(end.rank, end.error) for end in killed] == [(4, "was killed by SIGKILL (out of memory?)")]
    assert first_failure(failed) == killed[0]


def test_a_fork_server_ends_with_the_process_that_spawned_it(bench: Bench, tmp_path: Path) -> None:
    """Even while it imports, and with nobody at its socket."""
    (tmp_path / "endless.py").write_text("print('importing', flush=True)\nwhile True: pass\n")
    lock, folder = tmp_path / ".ranks.lock", tmp_path / "memory"
    options = ServerOptions("endless:main", tmp_path / "logs", 0, lock, "job", folder)
    ownership.claim(options.lock, "job", timeout_seconds=10)
    spawner = f"""
import os, signal, time
from pathlib import Path, PosixPath
from launcher.node.fork_server import ServerOptions, spawn
options = {options!r}
server = spawn(options, {{"PYTHONPATH": "."}}, os.getcwd(), keeper={os.getpid()})
while "importing" not in (options.logs / "node-0.log").read_text():
    time.sleep(0.005)
print(server.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    spawned = subprocess.run([sys.executable, "-c", spawner], cwd=tmp_path, capture_output=True, timeout=30)
    assert spawned.returncode == -signal.SIGKILL, spawned.stderr
    ownership.wait_until_free(options.lock, timeout_seconds=5)
    assert_ends(int(spawned.stdout))


# --------------------------------------------------------------------------------------- agents that die, and others


def succeed(bench: Bench, agent: Agent) -> int:
    """A round; returns the fork server's process id."""
    assert bench.run(agent, "succeed") == NodeEnd(())
    told = json.loads((bench.run_dir / "rank-3.json").read_text())
    return int(told["parent"])


def die(agent: Agent) -> None:
    """As seen by the fork server."""
    assert agent._server is not None
    agent._server.close()


def test_a_round_that_is_killed_before_its_ranks_are_forked_has_none(bench: Bench) -> None:
    """The kill may come while an agent still prepares the round; the next one is not meant."""
    agent = bench.agent()
    agent.kill_ranks(1)
    assert bench.run(agent, "block") == NodeEnd(())
    assert not list(bench.run_dir.glob("pid-*"))
    succeed(bench, agent)


def test_of_ranks_that_have_ended_nothing_is_told(bench: Bench) -> None:
    agent = bench.agent()
    succeed(bench, agent)
    assert agent.beats() == {} and agent.metrics_address() is not None


def test_the_fork_server_outlives_an_agent_and_serves_the_next(bench: Bench) -> None:
    first = bench.agent()
    server = succeed(bench, first)
    die(first)
    second = bench.agent()
    assert succeed(bench, second) == server
    second.leave()
    assert_ends(server)
    assert not (bench.run_dir / "memory").exists()
    assert succeed(bench, bench.agent()) != server


def test_ranks_end_with_their_agent(bench: Bench) -> None:
    (bench.run_dir / "behaviour").write_text("block")
    first = bench.agent()
    server = first._server
    assert server is not None
    this_round = Round("evaluate", "file:///nowhere", first._job.config, THREE_HERE, 1, 1)
    server.send(Start(first._specs(this_round), {}))
    until(lambda: len(list(bench.run_dir.glob("pid-*"))) == 3)
    pids = [int(path.read_text()) for path in bench.run_dir.glob("pid-*")]
    die(first)
    succeed(bench, bench.agent())
    assert not any(psutil.pid_exists(pid) for pid in pids)  # reaped before the next agent is heard


def test_while_no_agent_is_there_another_job_may_have_the_run(bench: Bench) -> None:
    """And the fork server of the first does nothing in it any more."""
    first = bench.agent()
    server = succeed(bench, first)
    die(first)
    ownership.claim(bench.run_dir / ".ranks.lock", "another", timeout_seconds=10)
    second = Agent(first._job, slot=1)
    assert bench.run(second, "succeed") == NodeEnd((), "the fork server died, and its ranks with it")
    assert_ends(server)


def test_a_fork_server_ends_with_its_keeper_and_takes_its_ranks_along(bench: Bench, tmp_path: Path) -> None:
    job = bench.agent()._job
    bench.agents.pop().leave()
    ownership.wait_until_free(job.lock, timeout_seconds=10)
    with subprocess.Popen(["sleep", "1000"]) as keeper:
        options = job.server_options(1)
        server = fork_server.spawn(options, {}, job.cwd, keeper.pid)
        with fork_server.connect(options) as agent:
            assert agent.recv() == Ready(None)
            keeper.kill()
            with pytest.raises(EOFError):
                agent.recv()
    assert server.wait(timeout=10) == 0
    ownership.wait_until_free(job.lock, timeout_seconds=10)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_ends(pid: int) -> None:
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


def assert_dead(run_dir: Path) -> None:
    pids = [int(path.read_text()) for path in run_dir.glob("pid-*")]
    assert len(pids) == 2, "the ranks that block say their pids"
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
