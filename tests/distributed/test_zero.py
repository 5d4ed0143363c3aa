"""What ZeRO-3 does only to models larger than those of other tests: here DeepSpeed's limits are small instead."""

from typing import Any

import pytest
import torch

import parity
from ranks import run_on_ranks
from trainer.config import RunConfig
from trainer.engine import zero
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine

LIMITS = {
    "stage3_param_persistence_threshold": 0,  # all weights are released after use; by default those above 100,000
    "sub_group_size": 30_000,  # elements of a rank's share that are updated at a time; by default a billion
}
PP2 = {"parallel.zero": 3, "parallel.pipeline": 2}
CASES: dict[str, dict[str, Any]] = {
    "PP2": PP2,
    "PP2 interleaved full": PP2 | {"parallel.virtual_pipeline": 2, "train.recompute": "full"},
    "PP2 offload": PP2 | {"parallel.offload": "optimizer"},
    "PP2 offload bf16": PP2 | {"parallel.offload": "optimizer", "train.precision": "bf16"},
    "TP2 SP selective": {
        "parallel.zero": 3,
        "parallel.tensor": 2,
        "parallel.sequence": True,
        "train.recompute": "selective",
    },
}

SLOW = {"PP2", "PP2 interleaved full", "PP2 offload bf16", "TP2 SP selective"}


def with_limits(config: RunConfig) -> dict[str, Any]:
    settings = deepspeed_config(config)
    return settings | {"zero_optimization": settings["zero_optimization"] | LIMITS}


def num_parts(config: RunConfig, device: torch.device) -> int:
    return len(Engine(config, device)._zero.optimizer.fp16_groups)


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_large_models_compute_what_small_ones_do(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "deepspeed_config", with_limits)
    monkeypatch.setitem(parity.CASES, case, CASES[case])
    config = parity.config_of(case)
    parts = run_on_ranks(config, num_parts)
    assert min(parts) > 2 and (len(set(parts)) > 1 or config.parallel.pipeline == 1)  # stages are not alike
    difference = parity.compare(case)
    assert difference.is_within_tolerance, difference
