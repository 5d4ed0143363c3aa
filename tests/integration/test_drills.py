"""`kill -9` of any part of a job at any moment: it goes on from a sound checkpoint and ends as if undisturbed."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import drill
from drill import Campaign, DrilledRun, SmallJob, kill

FEW_STEPS, MANY_STEPS = 24, 40


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    return SmallJob(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    with drill.one_ray() as folder:
        yield folder


@pytest.fixture(scope="module")
def undisturbed(
    job: SmallJob, ray_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], DrilledRun]:
    """A run that nobody disturbed, of each kind once."""
    runs: dict[tuple[int, str], DrilledRun] = {}

    def run(num_steps: int, layout: str) -> DrilledRun:
        if (num_steps, layout) not in runs:
            new = job.new_run(tmp_path_factory.mktemp("undisturbed"), num_steps, layout)
            drill.train_to_the_end(new, ray_folder)
            drill.expect_as_if_undisturbed(new, new)
            runs[num_steps, layout] = new
        return runs[num_steps, layout]

    return run


def test_a_rank_and_the_service_are_killed_during_saves(
    job: SmallJob, ray_folder: Path, undisturbed: Callable[[int, str], DrilledRun], tmp_path: Path
) -> None:
    """The service twice in one life, then a rank that is copying its state; what follows is the rest of the run."""
    layout = "TP2 x PP2"
    campaign = Campaign(job, tmp_path, layout, FEW_STEPS, undisturbed(FEW_STEPS, layout))
    kills = [
        kill("service", "checkpoints step-*.tmp/rank-*"),
        kill("service", "event step", 3),
        kill("rank", "room step-*/rank-*.part", 2, rank=2),
    ]
    campaign.carry_out(kills, ray_folder)
    assert len(campaign.done) == len(kills)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", drill.LAYOUTS)
def test_killed_at_many_moments(
    layout: str, job: SmallJob, ray_folder: Path, undisturbed: Callable[[int, str], DrilledRun], tmp_path: Path
) -> None:
    """`make drill`: DRILL_KILLS moments in all, 50 unless it is set, drawn from DRILL_SEED."""
    number = int(os.environ.get("DRILL_KILLS", "50")) // len(drill.LAYOUTS)
    seed = int(os.environ.get("DRILL_SEED", "0")) * len(drill.LAYOUTS) + list(drill.LAYOUTS).index(layout)
    campaign = Campaign(job, tmp_path, layout, MANY_STEPS, undisturbed(MANY_STEPS, layout))
    of_parts, of_the_job = drill.plan_kills(seed, number)
    try:
        campaign.carry_out(of_parts, ray_folder)
        campaign.carry_out(of_the_job, None)
    finally:
        print(f"\n{layout}, seed {seed}: {len(campaign.done)} of {number} kills", *campaign.lines, sep="\n  ")
    assert len(campaign.done) == number
