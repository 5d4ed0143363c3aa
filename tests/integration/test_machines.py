"""Machines that are lost, leave and come back: the run goes on with those there are, and computes the same."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

import drill
from deeds import Deed, Doer, Done, find, kill
from drilled_run import (
    DrilledRun,
    SmallJob,
    expect_exact_ledger,
    expect_nothing_left,
    expect_sound_resumes,
    processes_of,
)
from launcher.job.fleet import Fleet
from launcher.verbs import stages
from machines import Machines, machines
from trainer.checkpoint.format import store
from trainer.checkpoint.service.room import room_path
from trainer.events import surviving_steps
from trainer.stop import Preempted

pytestmark = pytest.mark.timeout(300)

LAYOUT, NUM_STEPS = "DP2 ZeRO-1", 40


def train(run: DrilledRun, cluster: Machines, deeds: Callable[[Fleet], list[Deed]]) -> None:
    """To the end, while that is done; `deeds` are told of the agents."""
    done: list[Done] = []
    with drill.claimed(run) as claim:
        planned = deeds(claim.ranks().fleet)
        with Doer(run, deque(planned), done):
            stages.train(claim)
    assert len(done) == len(planned)
    expect_sound_resumes(run)
    expect_exact_ledger(run)
    assert not processes_of(run)


def losses(run: DrilledRun) -> list[float]:
    return [event["loss"] for event in surviving_steps(run.events())]


def lives(run: DrilledRun) -> list[tuple[int, int]]:
    return [(event["nodes"], event["data"]) for event in run.events("life_started")]


@pytest.fixture(scope="module")
def expected(small_job: SmallJob, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What a run to which nothing happens computes."""
    return undisturbed_losses(small_job, tmp_path_factory.mktemp("undisturbed"), NUM_STEPS)


def undisturbed_losses(small_job: SmallJob, folder: Path, num_steps: int, layout: str = LAYOUT) -> list[float]:
    run = small_job.new_run(folder, num_steps, layout)
    assert subprocess.run(run.command, capture_output=True, timeout=drill.PATIENCE_SECONDS, check=False).returncode == 0
    return losses(run)


def drain(cluster: Machines, agents: Fleet, slot: int) -> Callable[[DrilledRun], bool]:
    """As `ray drain-node` does, which takes 127.0.0.1 for another address of the machine."""

    def do(_: DrilledRun) -> bool:
        gcs = GcsClient(address=cluster.address)
        deadline_ms = time.time_ns() // 1_000_000 + 60_000
        preemption = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
        is_accepted, why_not = gcs.drain_node(str(agents.machine_of(slot)), preemption, "drill", deadline_ms)
        assert is_accepted, why_not
        return True

    return do


def lose(cluster: Machines, agents: Fleet, slot: int) -> Callable[[DrilledRun], bool]:
    def do(_: DrilledRun) -> bool:
        cluster.kill(str(agents.machine_of(slot)))
        return True

    return do


def add(cluster: Machines) -> Callable[[DrilledRun], bool]:
    def do(_: DrilledRun) -> bool:
        cluster.start()
        return True

    return do


def wake_when(is_time: Callable[[], bool]) -> Callable[[DrilledRun], bool]:
    """Have rank 0 go on, that was stopped so that the run does not end meanwhile."""

    def do(run: DrilledRun) -> bool:
        pid = find(run, "rank")
        if not is_time() or pid is None:
            return False
        os.kill(pid, signal.SIGCONT)
        return True

    return do


@pytest.mark.slow
def test_a_run_shrinks_to_the_machines_there_are_and_grows_with_them(small_job: SmallJob, tmp_path: Path) -> None:
    """The ledger is exact over all sizes, and the losses are those of one process, as they are in any layout."""
    num_steps = 100
    run = small_job.new_run(
        tmp_path, num_steps, LAYOUT, launch={"nodes": 2}, supervise={"patience_seconds": 1.0, "grow_seconds": 0.5}
    )
    with machines(2) as cluster:
        train(
            run,
            cluster,
            lambda agents: [
                Deed("lose a machine", lose(cluster, agents, 1), "event step", 4),
                kill("rank", "event training_started", number=signal.SIGSTOP),
                Deed("add one", add(cluster), "event step", 0),
                Deed("go on", wake_when(lambda: agents.machine_of(1) is not None), "event step", 0),
            ],
        )
    assert lives(run) == [(2, 2), (1, 1), (2, 2)]
    assert [event["nodes"] for event in run.events("planned")] == [2, 1, 2] and not run.events("unplanned")
    assert run.events("plan_checked")
    assert losses(run) == pytest.approx(undisturbed_losses(small_job, tmp_path / "undisturbed", num_steps), rel=1e-3)


@pytest.mark.slow
def test_a_spare_takes_the_place_of_a_machine_that_is_lost(
    small_job: SmallJob, expected: list[float], tmp_path: Path
) -> None:
    run = small_job.new_run(tmp_path, NUM_STEPS, LAYOUT, launch={"nodes": 2, "spares": 1})
    with machines(3) as cluster:
        train(
            run,
            cluster,
            lambda agents: [
                kill("rank", "event step", 4, number=signal.SIGSTOP),  # so that the run does not end meanwhile
                Deed("lose its machine", lose(cluster, agents, 0), "event step", 0),
            ],
        )
    assert lives(run) == [(2, 2), (2, 2)] and losses(run) == expected


@pytest.mark.slow
def test_the_only_machine_is_to_be_drained_and_the_run_ends(small_job: SmallJob, tmp_path: Path) -> None:
    run = small_job.new_run(tmp_path, num_steps=400)
    with machines(1) as cluster, pytest.raises(Preempted) as end:
        train(run, cluster, lambda agents: [Deed("drain", drain(cluster, agents, 0), "event step", 2)])
    assert re.match(r"node [0-9a-f]{8} is to be drained: stopped after step \d+, saved", str(end.value))
    (preempted,) = run.events("preempted")
    assert preempted["saved_step"] == preempted["step"] < 400
    checkpoint = run.run_dir.checkpoints / store.folder_name(preempted["step"])
    assert store.newest_valid(run.run_dir.checkpoints) == checkpoint
    expect_nothing_left(run)


@pytest.mark.slow
def test_a_machine_that_is_to_be_drained_is_left_in_time(
    small_job: SmallJob, expected: list[float], tmp_path: Path
) -> None:
    run = small_job.new_run(tmp_path, NUM_STEPS, LAYOUT, launch={"nodes": 2, "spares": 1})
    with machines(3) as cluster:
        train(
            run,
            cluster,
            lambda agents: [
                kill("rank", "event step", 4, number=signal.SIGSTOP),
                Deed("drain", drain(cluster, agents, 1), "event step", 0),
                Deed("go on", wake_when(run.run_dir.stop_path.exists), "event step", 0),
            ],
        )
    (asked,) = run.events("preempted")
    assert asked["step"] == asked["saved_step"] and "is to be drained" in asked["reason"]
    assert run.events("training_started")[-1]["step"] == asked["step"] and not run.events("life_failed")
    assert lives(run) == [(2, 2), (2, 2)] and losses(run) == expected


@pytest.mark.slow
def test_stages_on_machines_of_their_own_shrink_and_grow_together(small_job: SmallJob, tmp_path: Path) -> None:
    """A lost machine costs a whole replica; the machine left over waits until there is another."""
    num_steps = 100
    run = small_job.new_run(
        tmp_path, num_steps, "PP2 x DP2", launch={"nodes": 4}, supervise={"patience_seconds": 1.0, "grow_seconds": 0.5}
    )
    with machines(4) as cluster:
        train(
            run,
            cluster,
            lambda agents: [
                kill("rank", "event step", 4, number=signal.SIGSTOP),
                Deed("lose a machine", lose(cluster, agents, 3), "event step", 0),
                kill("rank", "event training_started", number=signal.SIGSTOP),
                Deed("add one", add(cluster), "event step", 0),
                Deed("go on", wake_when(lambda: len(agents.present()) == 4), "event step", 0),
            ],
        )
    assert lives(run) == [(4, 2), (2, 1), (4, 2)]
    expected = undisturbed_losses(small_job, tmp_path / "undisturbed", num_steps, "PP2 x DP2")
    assert losses(run) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_the_memory_of_a_lost_machine_is_had_from_its_neighbour_by_the_spare(
    small_job: SmallJob, expected: list[float], tmp_path: Path
) -> None:
    """Nothing is on disk but the beginning."""
    run = small_job.new_run(
        tmp_path, NUM_STEPS, LAYOUT, launch={"nodes": 2, "spares": 1}, every_steps=1000, replicate=True
    )
    second_room = room_path(run.snapshots_in, run.run_dir.path.resolve(), run.run_dir.id, node=1)

    def lose_with_memory(cluster: Machines, agents: Fleet) -> Callable[[DrilledRun], bool]:
        def do(_: DrilledRun) -> bool:
            if len(list(run.snapshots_in.rglob("replica/step-*/manifest.json"))) < 2:
                return False
            cluster.kill(str(agents.machine_of(1)))
            shutil.rmtree(second_room)
            return True

        return do

    with machines(3) as cluster:
        train(
            run,
            cluster,
            lambda agents: [
                kill("rank", "event step", 6, number=signal.SIGSTOP),
                Deed("lose a machine", lose_with_memory(cluster, agents), "event step", 0),
            ],
        )
    first, second = run.events("training_started")
    assert first["step"] == 0 and second["step"] > 0 and second["tier"] == "memory"
    assert lives(run) == [(2, 2), (2, 2)] and losses(run) == expected


@pytest.mark.slow
def test_a_machine_that_fails_again_and_again_is_left_out(
    small_job: SmallJob, expected: list[float], tmp_path: Path
) -> None:
    run = small_job.new_run(
        tmp_path, NUM_STEPS, LAYOUT, launch={"nodes": 1, "spares": 1}, supervise={"max_node_failures": 2}
    )
    seen: list[str] = []
    with machines(2) as cluster:

        def look(run: DrilledRun) -> bool:
            pid = find(run, "rank")
            seen.extend([] if pid is None else [cluster.name_of(pid)])
            return pid is not None

        train(
            run,
            cluster,
            lambda _: [
                part
                for _ in range(3)
                for part in (
                    kill("rank", "event step", number=signal.SIGSTOP),
                    Deed("look where it is", look, "event step", 0),
                    kill("rank", "event step", 0),
                )
            ],
        )
    assert seen[0] == seen[1] != seen[2]
    (left_out,) = run.events("machine_excluded")
    assert left_out["failures"] == 2 and left_out["machine"] == run.events("life_failed")[0]["machine"]
    assert lives(run) == [(1, 2)] * 4 and losses(run) == expected


@pytest.mark.slow
def test_a_command_that_is_killed_leaves_nothing_on_any_machine_and_goes_on_when_run_again(
    small_job: SmallJob, expected: list[float], tmp_path: Path
) -> None:
    run = small_job.new_run(tmp_path, NUM_STEPS, LAYOUT, launch={"nodes": 2})
    with machines(2) as cluster:
        command = [*run.command, "--ray", cluster.address]
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        kill_it = Deed("kill the command", lambda _: first.kill() is None, "event step", 4)
        with Doer(run, deque([kill_it]), []):
            _, complaint = first.communicate(timeout=drill.PATIENCE_SECONDS)
        assert first.returncode == -signal.SIGKILL, complaint
        deadline = time.monotonic() + drill.PATIENCE_SECONDS
        while processes_of(run):
            assert time.monotonic() < deadline, processes_of(run)
            time.sleep(0.1)
        second = subprocess.run(command, capture_output=True, text=True, timeout=drill.PATIENCE_SECONDS, check=False)
        assert second.returncode == 0, second.stderr
    assert run.events("training_started")[-1]["step"] > 0 and losses(run) == expected
    expect_exact_ledger(run)
    expect_nothing_left(run)


@pytest.mark.slow
def test_a_spare_that_is_lost_with_the_machine_that_it_should_replace_is_no_end(
    small_job: SmallJob, tmp_path: Path
) -> None:
    """Ray believes for a while that it is there, and ranks are to be started on it."""
    num_steps = 40
    supervise = {"patience_seconds": 1.0, "grow_seconds": 1000.0}
    run = small_job.new_run(tmp_path, num_steps, LAYOUT, launch={"nodes": 2, "spares": 1}, supervise=supervise)
    with machines(3) as cluster:
        train(
            run,
            cluster,
            lambda agents: [
                kill("rank", "event step", 4, number=signal.SIGSTOP),
                Deed("lose the spare", lose(cluster, agents, 2), "event step", 0),
                Deed("lose its machine", lose(cluster, agents, 0), "event step", 0),
            ],
        )
    assert lives(run) == [(2, 2), (2, 2), (1, 1)]
    assert "the ranks could not be started" in run.events("life_failed")[1]["error"]
    expected = undisturbed_losses(small_job, tmp_path / "undisturbed", num_steps)
    assert losses(run) == pytest.approx(expected, rel=1e-3)
