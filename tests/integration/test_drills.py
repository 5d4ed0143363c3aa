"""`kill -9` of any part of a job at any moment: it goes on from a sound checkpoint and ends as if undisturbed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deeds import kill, plan_kills
from drill import Campaign
from drilled_run import LAYOUTS, NUM_STEPS, DrilledRun, SmallJob


def test_a_rank_and_the_service_are_killed_during_saves(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    """The service twice in one life, then a rank that is copying its state; what follows is the rest of the run."""
    campaign = Campaign(small_job, tmp_path, "TP2 x PP2", NUM_STEPS, undisturbed())
    kills = [
        kill("service", "checkpoints step-*.tmp/rank-*"),
        kill("service", "event step", 2),
        kill("rank", "room step-*/rank-*.part", 2, rank=2),
    ]
    campaign.carry_out(kills, by_command=False)
    assert len(campaign.done) == len(kills)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_many_moments(
    layout: str, small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    """`make drill`: DRILL_KILLS moments in all, 50 unless it is set, drawn from DRILL_SEED."""
    number = int(os.environ.get("DRILL_KILLS", "50")) // len(LAYOUTS)
    seed = int(os.environ.get("DRILL_SEED", "0")) * len(LAYOUTS) + list(LAYOUTS).index(layout)
    campaign = Campaign(small_job, tmp_path, layout, 40, undisturbed(40, layout))
    of_parts, of_the_job = plan_kills(seed, number)
    try:
        campaign.carry_out(of_parts, by_command=False)
        campaign.carry_out(of_the_job, by_command=True)
    finally:
        print(f"\n{layout}, seed {seed}: {len(campaign.done)} of {number} kills", *campaign.lines, sep="\n  ")
    assert len(campaign.done) == number
