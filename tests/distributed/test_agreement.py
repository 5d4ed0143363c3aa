"""What ranks tell each other after a step adds up the same on all of them, whatever the layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ranks import run_on_ranks
from trainer import parallel
from trainer.config import RunConfig
from trainer.config_file import from_tree

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2 x CP2": {"tensor": 2, "context": 2},
    "PP2 x DP2": {"pipeline": 2, "data": 2},
    "CP2 x DP2": {"context": 2, "data": 2},
}
LARGE = 2**64 - 3


def add_up(factors: tuple[int, ...]) -> Callable[[RunConfig, torch.device], list[int]]:
    def rank(config: RunConfig, device: torch.device) -> list[int]:
        mine = [factor * (torch.distributed.get_rank() + 1) % 2**64 for factor in factors]
        return parallel.sum_over_ranks(*mine, int(parallel.speaks_for_replica()))

    return rank


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_exact_and_each_replica_has_one_speaker(layout: str) -> None:
    config = from_tree(
        {"model": {"num_heads": 4, "hidden_size": 32, "num_layers": 2}, "parallel": LAYOUTS[layout], "train": {}}
    )
    factors = (0, 1, 2**32 - 1, 2**63, LARGE)
    ranks = sum(range(1, config.parallel.num_ranks + 1))
    sums = run_on_ranks(config, add_up(factors))
    assert sums == [[factor * ranks % 2**64 for factor in factors] + [config.parallel.data]] * config.parallel.num_ranks
