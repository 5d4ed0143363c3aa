"""The preStop hook of a pod, on a run that trains: it saves, ends as preempted, and the hook waits just so long."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from drilled_run import DrilledRun, SmallJob
from launcher.node.leaving import Process, leave, processes

DEADLINE_SECONDS = 90.0


@contextmanager
def training(run: DrilledRun) -> Iterator[subprocess.Popen[bytes]]:
    """The run's command, when it has made a step more."""
    steps = len(run.events("step"))
    driver = subprocess.Popen(run.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(run.events("step")) <= steps:
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield driver
    finally:
        driver.kill()
        driver.wait()


def expect_preempted(run: DrilledRun, driver: subprocess.Popen[bytes]) -> None:
    assert driver.wait(DEADLINE_SECONDS) == 75
    last = run.events("preempted")[-1]
    assert last["saved_step"] == last["step"] == run.events("step")[-1]["step"]


@pytest.mark.slow
def test_head_and_workers_make_a_run_save_before_they_leave(small_job: SmallJob, tmp_path: Path) -> None:
    run = small_job.new_run(tmp_path)
    with training(run) as driver:  # on the head, which has the driver
        hook = [sys.executable, "-m", "launcher.node.leaving", str(run.run_dir.path), str(DEADLINE_SECONDS)]
        assert subprocess.run(hook, timeout=DEADLINE_SECONDS, check=False).returncode == 0
        expect_preempted(run, driver)
    with training(run) as driver:  # on a worker, where ranks alone are seen

        def find() -> Sequence[Process]:
            return [each for each in processes() if each.pid != driver.pid]

        assert leave(run.run_dir, DEADLINE_SECONDS, find)
        expect_preempted(run, driver)
