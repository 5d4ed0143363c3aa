"""Ranks as one sees them from outside: real ones, which train on gloo, stop, hang and go on."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.node.forked_rank import ForkedRank, RankEnd, fork_rank
from launcher.node.stacks import RankReport, collect
from launcher.supervise.hang import verdict
from launcher.supervise.stragglers import find
from small_loop import NUM_STEPS, TOKENS_PER_STEP, config_of, of_kind, prepare_data
from trainer import config_file, rank
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.data.batches import MicroBatch, ReadAhead, TrainingData
from trainer.data.ledger.audit import audit
from trainer.engine.engine import Engine, StepStats
from trainer.events import read_events
from trainer.heartbeat import Beat, Phase, beat_path, read
from trainer.rank_spec import RankSpec
from trainer.run_dir import RunDir

NODES = {0: "a", 1: "a", 2: "b", 3: "b"}
STEPS_BEFORE = 3  # the hang


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


def config_for(layout: dict[str, int], data: Path, num_steps: int = NUM_STEPS) -> RunConfig:
    tree = config_of(data).model_dump(mode="json")
    tree["train"] |= {"micro_batch_size": 2, "total_tokens": num_steps * TOKENS_PER_STEP}
    return from_tree({**tree, "parallel": layout, "launch": {"device": "cpu"}})


def reads_when_told(rank_that_waits: int, told: Path) -> Callable[[RankSpec], None]:
    """The entry of ranks, one of which reads its samples of the step after `STEPS_BEFORE` only once a file exists."""
    read_tokens = TrainingData.replica_tokens

    def entry(spec: RankSpec) -> None:
        num_reads = 0

        def patiently(self: TrainingData, first_sample: int, batch_size: int, data_rank: int) -> object:
            nonlocal num_reads
            num_reads += 1
            while num_reads == STEPS_BEFORE + 1 and spec.rank == rank_that_waits and not told.exists():
                time.sleep(0.01)
            return read_tokens(self, first_sample, batch_size, data_rank)

        TrainingData.replica_tokens = patiently  # type: ignore[method-assign, assignment]
        rank.main(spec)

    return entry


@contextmanager
def training(
    config: RunConfig, run_dir: RunDir, folder: Path, entry: Callable[[RankSpec], None]
) -> Iterator[tuple[list[ForkedRank], list[RankEnd]]]:
    """Forked ranks of the config; what is left of them at the end is killed."""
    run_dir.create(config)
    size = config.parallel.num_ranks
    ranks = []
    for number in range(size):
        spec = RankSpec(
            rank=number,
            world_size=size,
            local_rank=number,
            local_world_size=size,
            rendezvous=f"file://{folder}/rendezvous",
            config_yaml=config_file.dump(config),
            run_dir=run_dir.path,
            heartbeats=folder,
        )
        ranks.append(fork_rank(spec, entry, {"GLOO_SOCKET_IFNAME": "lo"}, run_dir.logs))
    ends: list[RankEnd] = []
    try:
        yield ranks, ends
    finally:
        for each in ranks[len(ends) :]:
            each.kill()
            each.reap()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited 60 s in vain"
        time.sleep(0.01)


def beats(folder: Path) -> list[Beat | None]:
    return [read(beat_path(folder, number)) for number in NODES]


def phases(folder: Path) -> list[str | None]:
    """Where the rank that waits to be told has done its steps."""
    known = beats(folder)
    is_there = known[2] is not None and known[2].step == STEPS_BEFORE
    return [beat.phase if beat is not None and is_there else None for beat in known]


def all_wait_but(odd: Sequence[int], folder: Path) -> Callable[[], bool]:
    def condition() -> bool:
        return all(report.collective for report in collect(folder, [r for r in NODES if r not in odd], 5))

    return condition


def test_a_hang_is_explained_and_asking_for_it_disturbs_nobody(data: Path, tmp_path: Path) -> None:
    config, run_dir, told = config_for({"data": 4}, data), RunDir(tmp_path / "run"), tmp_path / "told"
    with training(config, run_dir, tmp_path, reads_when_told(2, told)) as (ranks, ends):
        until(lambda: phases(tmp_path) == ["computing", "computing", "loading data", "computing"])
        until(all_wait_but([2], tmp_path))
        assert [beat.step for beat in beats(tmp_path) if beat] == [STEPS_BEFORE] * 4
        reports = collect(tmp_path, NODES, 5)
        since = time.strftime("%H:%M:%S", time.localtime(max(r.beat.began for r in reports if r.beat and r.rank != 2)))
        found = verdict(reports, NODES)
        assert found.line == f"rank 2 on node b is in data loading; the other 3 wait in all_reduce since {since}"
        assert found.suspects == (2,)
        assert shown_in(reports[2], "micro_batches") and shown_in(reports[2], "advance")
        assert shown_in(reports[0], "train_step") and shown_in(reports[0], "main")

        stopped = reports[1].beat
        assert stopped is not None
        os.kill(stopped.pid, signal.SIGSTOP)
        until(lambda: collect(tmp_path, [1], 5)[0].process == "stopped")
        reports = collect(tmp_path, NODES, 5)
        assert reports[1].stack is None and reports[1].problem == "is stopped"
        found = verdict(reports, NODES)
        assert found.line == (
            "rank 1 on node a is stopped (SIGSTOP); rank 2 on node b is in data loading; "
            f"the other 2 wait in all_reduce since {since}"
        )
        assert found.suspects == (1, 2)

        told.touch()  # now rank 1 alone keeps them waiting
        until(all_wait_but([1], tmp_path))
        found = verdict(collect(tmp_path, NODES, 5), NODES)
        assert found.line.startswith("rank 1 on node a is stopped (SIGSTOP); the other 3 wait in ")

        os.kill(stopped.pid, signal.SIGCONT)
        ends += [each.reap() for each in ranks]
        assert [end.error for end in ends] == [None] * 4
    last = beats(tmp_path)
    assert [(b.phase, b.step, b.num_steps) for b in last if b] == [("ending", NUM_STEPS, NUM_STEPS)] * 4
    assert [report.process for report in collect(tmp_path, NODES, 5)] == ["gone"] * 4
    assert len(of_kind(read_events(run_dir.events_path), "step")) == NUM_STEPS
    assert audit(run_dir).findings == []


def shown_in(report: RankReport, function: str) -> bool:
    return any(frame.function == function for frame in report.stack or ())


def test_a_pipeline_tells_who_keeps_it_waiting(data: Path, tmp_path: Path) -> None:
    """Of two replicas of two stages: the stage before waits for it to take what it sends, the others for both."""
    config, run_dir = config_for({"data": 2, "pipeline": 2}, data), RunDir(tmp_path / "run")
    with training(config, run_dir, tmp_path, reads_when_told(2, tmp_path / "told")):
        until(lambda: phases(tmp_path) == ["computing", "computing", "loading data", "computing"])
        expected = ["send_forward", "all_reduce", None, "all_reduce"]
        until(lambda: [report.collective for report in collect(tmp_path, NODES, 5)] == expected)
        found = verdict(collect(tmp_path, NODES, 5), NODES)
        assert found.suspects == (2,)
        assert found.line.startswith(
            "rank 2 on node b is in data loading; the other 3 wait in all_reduce (2) and send_forward (1) since"
        )


def is_slow_in(phase: Phase, slow: int) -> Callable[[RankSpec], None]:
    """The entry of ranks, one of which takes in this phase twice as long again as it needs to compute a step."""
    micro_batches, train_step = ReadAhead.micro_batches, Engine.train_step

    def entry(spec: RankSpec) -> None:
        step_seconds = 0.0

        def load(self: ReadAhead, step: int) -> list[MicroBatch]:
            time.sleep(2 * step_seconds if phase == "loading data" else 0)
            return micro_batches(self, step)

        def compute(self: Engine, *args: Any) -> StepStats:
            nonlocal step_seconds
            time.sleep(2 * step_seconds if phase == "computing" else 0)
            began = time.monotonic()
            stats = train_step(self, *args)
            step_seconds = time.monotonic() - began
            return stats

        if spec.rank == slow:
            ReadAhead.micro_batches = load  # type: ignore[method-assign]
            Engine.train_step = compute  # type: ignore[method-assign, assignment]
        rank.main(spec)

    return entry


@pytest.mark.parametrize(
    ("layout", "phase"),
    [
        ({"data": 2, "tensor": 2}, "loading data"),
        ({"data": 2, "pipeline": 2}, "computing"),
        pytest.param({"data": 4}, "computing", marks=pytest.mark.slow),
    ],
)
def test_a_slow_rank_is_named_though_all_ranks_take_as_long(
    layout: dict[str, int], phase: Phase, data: Path, tmp_path: Path
) -> None:
    config, run_dir = config_for(layout, data, num_steps=10_000), RunDir(tmp_path / "run")
    with training(config, run_dir, tmp_path, is_slow_in(phase, 1)):
        earlier = beats_after(3, tmp_path)
        later = beats_after(13, tmp_path)
    took = [sum(beat.seconds[each] for each in ("computing", "loading data")) for beat in later.values()]
    assert max(took) < 1.5 * min(took)  # time alone tells nothing
    worst, *others = find(earlier, later, 0.0)
    assert (worst.rank, worst.phase) == (1, phase) and worst.ratio > 1.5
    assert all(each.ratio < 1.3 for each in others)


def beats_after(step: int, folder: Path) -> dict[int, Beat]:
    until(lambda: all(beat is not None and beat.step >= step for beat in beats(folder)))
    return {number: beat for number, beat in enumerate(beats(folder)) if beat is not None}
