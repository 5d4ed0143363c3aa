"""Ranks that hang or are slow: they are named, and the run goes on as if nothing had happened."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import drill
from deeds import Deed, find, kill
from drilled_run import DrilledRun, SmallJob, expect_as_if_undisturbed


def test_a_rank_that_is_stopped_is_named_and_the_run_goes_on_without_it(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    expected = undisturbed()
    run = small_job.new_run(tmp_path, supervise={"hang_seconds": 2.0, "hang_factor": 2.0})
    drill.train_to_the_end(run, [kill("rank", "event step", 3, rank=2, number=signal.SIGSTOP)])
    (hung,) = run.events("hung")
    assert hung["suspects"] == [2] and hung["verdict"].startswith("rank 2 on node 0 is stopped (SIGSTOP); the other 3 ")
    stacks = Path(hung["stacks"]).read_text()
    assert stacks.startswith(hung["verdict"]) and "rank 2: after step" in stacks and "trainer/loop.py" in stacks
    (failed,) = run.events("life_failed")
    assert failed["what"] == "hang" and hung["verdict"] in failed["error"]
    assert failed["step"] >= 3
    expect_as_if_undisturbed(run, expected)


@pytest.mark.slow
def test_a_rank_that_is_slow_is_named_and_the_run_goes_on_with_it(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    """It is stopped for most of the time, beside others that wait for it, and would else wait for a core."""
    layout, policy = "TP2 x DP2 ZeRO-1", {"straggler_seconds": 2.0, "straggler_factor": 1.3}
    expected = undisturbed(100, layout)
    run = small_job.new_run(tmp_path, 100, layout, supervise=policy)
    is_over = threading.Event()

    def slow_down(run: DrilledRun) -> bool:
        threading.Thread(target=stop_and_go, args=(run, 3, is_over), daemon=True).start()
        return True

    try:
        drill.train_to_the_end(run, [Deed("slow", slow_down, "event step", 3)])
    finally:
        is_over.set()
    named = run.events("straggler")
    assert named and {event["rank"] for event in named} == {3} and named[0]["ratio"] > 1.3
    assert not run.events("life_failed")
    expect_as_if_undisturbed(run, expected)


def stop_and_go(run: DrilledRun, rank: int, is_over: threading.Event) -> None:
    import os

    while not is_over.is_set():
        pid = find(run, "rank", rank)
        if pid is None:
            continue
        for number, seconds in ((signal.SIGSTOP, 0.2), (signal.SIGCONT, 0.02)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                break
            time.sleep(seconds)
