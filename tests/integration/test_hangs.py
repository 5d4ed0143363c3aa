"""Ranks that crash, hang or are slow: they are named, and the run goes on as if nothing had happened."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import drill
from deeds import Deed, find, kill
from drilled_run import NUM_STEPS, DrilledRun, SmallJob, expect_as_if_undisturbed


def test_ranks_that_crash_or_hang_are_named_and_the_run_goes_on_from_its_newest_snapshot(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    """After a crash from memory, and nothing is written.

    Both are within a step: elsewhere silence is borne for six times as long.
    """
    expected = undisturbed()
    policy, saving = {"hang_seconds": 2.0, "hang_factor": 2.0}, {"every_steps": 100, "snapshot_every_steps": 4}
    run = small_job.new_run(tmp_path, supervise=policy, **saving)
    crash, stop = (
        kill("rank", "event step", count, rank=2, number=number)
        for count, number in ((5, signal.SIGKILL), (2, signal.SIGSTOP))
    )
    drill.train_to_the_end(run, [crash, stop])
    crashed, hanging = run.events("life_failed")
    assert crashed["what"] == "rank" and "rank 2 was killed by SIGKILL" in crashed["error"]
    (hung,) = run.events("hung")
    assert hung["suspects"] == [2] and hung["verdict"].startswith("rank 2 on node 0 is stopped (SIGSTOP); the other 3 ")
    stacks = Path(hung["stacks"]).read_text()
    assert stacks.startswith(hung["verdict"]) and "rank 2: after step" in stacks and "trainer/loop.py" in stacks
    assert hanging["what"] == "hang" and hung["verdict"] in hanging["error"] and hanging["step"] >= 5
    first, *others = run.events("training_started")
    assert (first["step"], first["tier"]) == (0, "disk")
    for failed, started in zip((crashed, hanging), others, strict=True):
        copied = [event["step"] for event in run.events("checkpoint_snapshot") if event["time"] < failed["time"]]
        assert started["step"] >= copied[-1] >= 4
    assert others[0]["tier"] == "memory"
    *saved, last = run.events("checkpoint_saved")
    assert last["step"] == NUM_STEPS and all(event["time"] > hung["time"] for event in saved)
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
