"""The preStop hook of a pod, on runs that train: on the head it ends the run, on a worker the run goes on without."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

import drill
from deeds import Deed, Doer, Done, find, kill
from drilled_run import DrilledRun, SmallJob, expect_exact_ledger, expect_sound_resumes
from launcher.job.fleet import Fleet
from launcher.node.leaving import Process, drain_with_ray, leave, processes
from launcher.verbs import stages
from machines import machines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DEADLINE_SECONDS = 90.0


def test_a_head_that_leaves_has_the_run_save_and_end(small_job: SmallJob, tmp_path: Path) -> None:
    run = small_job.new_run(tmp_path, num_steps=400)
    driver = subprocess.Popen(run.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not run.events("step"):
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        hook = [sys.executable, "-m", "launcher.node.leaving", str(run.run_dir.path), str(DEADLINE_SECONDS)]
        assert subprocess.run(hook, timeout=DEADLINE_SECONDS, check=False).returncode == 0
        assert driver.wait(DEADLINE_SECONDS) == 75
    finally:
        driver.kill()
        driver.wait()
    (last,) = run.events("preempted")
    assert last["saved_step"] == last["step"] == run.events("step")[-1]["step"]


def test_a_worker_that_leaves_is_left_in_time_and_the_run_goes_on(small_job: SmallJob, tmp_path: Path) -> None:
    run = small_job.new_run(tmp_path, 40, "DP2 ZeRO-1", launch={"nodes": 2, "spares": 1})
    hooks: list[threading.Thread] = []
    left: list[bool] = []

    def hook(agents: Fleet) -> None:
        find_here = processes_of_machine(str(agents.machine_of(1)))
        hooks.append(threading.Thread(target=lambda: left.append(end(find_here))))
        hooks[0].start()

    def end(find_here: "FindHere") -> bool:
        return leave(run.run_dir, DEADLINE_SECONDS, find_here, drain_with_ray)

    done: list[Done] = []
    with machines(3), drill.claimed(run) as claim:
        agents = claim.ranks().fleet
        deeds = [
            kill("rank", "event step", 4, number=signal.SIGSTOP),  # so that the run does not end meanwhile
            Deed("leave", lambda _: hook(agents) is None, "event step", 0),
            Deed("go on", lambda run: run.run_dir.stop_path.exists() and wake(run), "event step", 0),
        ]
        with Doer(run, deque(deeds), done):
            stages.train(claim)
        hooks[0].join(DEADLINE_SECONDS)
    assert left == [True] and len(done) == 3
    (asked,) = run.events("preempted")
    assert asked["step"] == asked["saved_step"] and "is to be drained" in asked["reason"]
    assert [event["nodes"] for event in run.events("life_started")] == [2, 2] and not run.events("life_failed")
    expect_sound_resumes(run)
    expect_exact_ledger(run)


def wake(run: DrilledRun) -> bool:
    pid = find(run, "rank")
    if pid is not None:
        os.kill(pid, signal.SIGCONT)
    return pid is not None


class FindHere:
    """What `processes` would find in the pod of one of several Ray nodes of this machine."""

    def __init__(self, node_process: int) -> None:
        self._node_process = node_process

    def __call__(self) -> Sequence[Process]:
        family = {each.pid for each in psutil.Process(self._node_process).children(recursive=True)}
        return [process for process in processes() if process.pid in family]


def processes_of_machine(node_id: str) -> FindHere:
    """By Ray's name of it (hex): the process that has started its raylet, and all that came of it."""
    (raylet,) = (each.pid for each in processes() if f"--node_id={node_id}" in each.arguments)
    parent = psutil.Process(raylet).parent()
    assert parent is not None
    return FindHere(parent.pid)
