"""The checkpoint service as a process: what it is told and how, its deaths, and whom it keeps waiting at the end."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from launcher.node import ownership
from launcher.node.checkpoint_process import Ending, ServiceKeeper, ServiceOptions, restart_delay
from made_checkpoints import write_checkpoint
from made_snapshots import World, names
from trainer.checkpoint.format import store
from trainer.checkpoint.service.presence import Presence
from trainer.config_file import dump, from_tree
from trainer.events import Event, read_events
from trainer.run_dir import RunDir

REPOSITORY, TESTS = Path(__file__).parents[4], Path(__file__).parents[3]
PATIENCE_SECONDS = 60.0
TENSORS = {"master/weight": np.arange(64, dtype=np.float32).reshape(8, 8)}


class Bench:
    """A keeper of the service of a run on one machine, whose ranks are this test."""

    def __init__(self, folder: Path, **checkpoint: Any) -> None:
        self.world = World(folder)
        self.run_dir = RunDir(folder / "run")
        self.run_dir.logs.mkdir()
        lock = folder / "lock"
        ownership.claim(lock, "job", 1.0)
        self.options = ServiceOptions(
            room=str(self.world.rooms[0].path),
            run_dir=str(self.run_dir.path),
            config_yaml=dump(from_tree({"checkpoint": checkpoint})),
            first_rank=0,
            num_ranks=2,
            node=0,
            num_nodes=1,
            lock=str(lock),
            job_id="job",
        )

    def keeper(self, **options: Any) -> ServiceKeeper:
        return ServiceKeeper(replace(self.options, **options), self.run_dir.logs / "checkpoints-0.log", str(REPOSITORY))

    def events(self, kind: str) -> list[Event]:
        return [event for event in read_events(self.run_dir.events_path) if event["kind"] == kind]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError("it did not come")


def service_of(keeper: ServiceKeeper) -> psutil.Process:
    return psutil.Process(wait_for(lambda: keeper._process).pid)


def test_a_config_of_any_length_reaches_the_service_and_nobody_else(bench: Bench) -> None:
    secret = "s3://" + "key" * 60_000  # longer than an argument may be
    keeper = bench.keeper(config_yaml=bench.options.config_yaml + f"# {secret}\n")
    written = bench.world.snapshot(10)
    keeper.start()
    command = " ".join(service_of(keeper).cmdline())
    keeper.drain(Ending.WELL)
    assert bench.world.committed(10) == written and names(bench.world.folder / "memory") == []
    assert "key" not in command and bench.options.run_dir in command and not bench.events("checkpoint_service_died")


def test_a_death_is_recorded_and_another_goes_on(bench: Bench) -> None:
    keeper = bench.keeper()
    keeper.start()
    service_of(keeper).kill()
    (death,) = wait_for(lambda: bench.events("checkpoint_service_died"))
    assert (death["code"], death["log"]) == (-signal.SIGKILL, str(bench.run_dir.logs / "checkpoints-0.log"))
    written = bench.world.snapshot(10)
    wait_for(lambda: store.steps(bench.world.checkpoints))
    keeper.drain(Ending.WELL)
    assert bench.world.committed(10) == written


def test_a_service_waits_until_the_one_before_it_has_ended(bench: Bench) -> None:
    """An agent may die before it, and the next comes at once."""
    before = Presence(bench.world.rooms[0])
    assert before.show()
    written = bench.world.snapshot(10)
    keeper = bench.keeper()
    keeper.start()
    draining = threading.Thread(target=keeper.drain, args=[Ending.WELL])
    draining.start()
    draining.join(1.0)
    assert draining.is_alive() and not store.steps(bench.world.checkpoints)
    before.end()
    draining.join(PATIENCE_SECONDS)
    assert bench.world.committed(10) == written


@pytest.mark.parametrize("ending", [Ending.ELSEWHERE, Ending.FAILED])
def test_other_machines_are_waited_for_unless_ranks_begin_elsewhere(
    ending: Ending, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first machine has done its part, and the second does not come: for a minute it may."""
    keeper = bench.keeper(num_nodes=2)
    bench.world.snapshot(10)
    keeper.start()
    part = bench.world.checkpoints / f"{store.folder_name(10)}.tmp" / "part-00000.manifest.json"
    wait_for(part.exists)
    draining = threading.Thread(target=keeper.drain, args=[ending], daemon=True)
    draining.start()
    draining.join(2.0)
    assert draining.is_alive() == (ending is Ending.FAILED)
    if draining.is_alive():
        monkeypatch.setattr("launcher.node.checkpoint_process._MOST_DEATHS", 1)
        service_of(keeper).kill()
    draining.join(PATIENCE_SECONDS)
    assert not draining.is_alive()


def test_one_that_cannot_live_is_tried_less_and_less_often(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And neither it nor what cannot even be started ends its keeper, or holds up the end."""
    keeper = bench.keeper(config_yaml="model: nonsense")
    log = bench.run_dir.logs
    log.rename(log.with_name("away"))  # so that there is no file for what it says
    keeper.start()
    wait_for(lambda: [event["code"] for event in bench.events("checkpoint_service_died")] == [None])
    log.with_name("away").rename(log)
    wait_for(lambda: [event["code"] for event in bench.events("checkpoint_service_died")][1:2] == [1])
    assert "model" in (log / "checkpoints-0.log").read_text()
    monkeypatch.setattr("launcher.node.checkpoint_process._MOST_DEATHS", 1)
    keeper.drain(Ending.WELL)
    assert [restart_delay(number) for number in (0, 1, 2, 3)] == [0.2, 0.2, 0.4, 0.8] and restart_delay(10**6) == 30.0


# ------------------------------------------------------------------------------------------------------------- uploads


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    """A run whose store takes what is sent and never says so."""
    hang = "unreliable_store.UnreliableStore.trouble.hangs_in = os.environ['HANGS_IN']"
    (tmp_path / "sitecustomize.py").write_text(f"import os\nimport unreliable_store\n{hang}\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{TESTS}:{REPOSITORY}")
    monkeypatch.setenv("HANGS_IN", "connect")
    yield Bench(tmp_path, upload_to=f"unreliable://{tmp_path}/remote")


@pytest.mark.parametrize("hangs_in", ["connect", "list", "write"])
def test_a_store_that_hangs_holds_up_no_save_and_no_restart(
    hangs_in: str, hanging: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANGS_IN", hangs_in)
    keeper = hanging.keeper()
    keeper.start()
    for step in (10, 20):
        written = hanging.world.snapshot(step)
        wait_for(lambda step=step: step in store.steps(hanging.world.checkpoints))
        assert hanging.world.committed(step) == written
    keeper.drain(Ending.FAILED)  # returns
    assert not hanging.events("checkpoint_upload_failed")  # it does hang


@pytest.mark.parametrize("why", ["the agent is gone", "the grace period is over"])
def test_at_the_end_of_a_run_the_upload_is_waited_for_until(why: str, hanging: Bench) -> None:
    write_checkpoint(hanging.run_dir.checkpoints, 10, TENSORS, files=2)
    keeper = hanging.keeper()
    keeper.start()
    service = service_of(keeper)
    drain = threading.Thread(target=keeper.drain, args=[Ending.WELL], daemon=True)
    drain.start()
    wait_for(lambda: not (hanging.world.rooms[0].path.exists()))
    drain.join(timeout=1.0)
    assert drain.is_alive()
    if why == "the agent is gone":
        assert keeper._process is not None and keeper._process.stdin is not None
        keeper._process.stdin.close()  # as the kernel does it for an agent that is killed
    else:
        keeper.hurry()
    drain.join(timeout=PATIENCE_SECONDS)
    assert not drain.is_alive() and not service.is_running()


def test_what_a_run_has_saved_is_uploaded_before_it_ends(tmp_path: Path) -> None:
    bench = Bench(tmp_path, upload_to=str(tmp_path / "remote"))
    keeper = bench.keeper()
    keeper.start()
    service_of(keeper)
    bench.world.snapshot(10)
    keeper.drain(Ending.WELL)
    assert [event["step"] for event in bench.events("checkpoint_uploaded")] == [10]
    assert names(tmp_path / "remote") == ["step-00000010"]
