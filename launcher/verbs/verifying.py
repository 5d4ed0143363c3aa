"""Every rank of a run's layout, built without memory and compared with the plan."""

import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from trainer import plan
from trainer.config import RunConfig
from trainer.progress import Update, unheard

if TYPE_CHECKING:
    from trainer.engine.meta_rank import BuiltRank


@dataclass(frozen=True)
class Difference:
    """One number of one rank that is not the plan's."""

    rank: int
    what: str
    planned: int
    built: int


@dataclass(frozen=True)
class Verification:
    ranks: list["BuiltRank"]
    differences: list[Difference]
    seconds: float

    @property
    def num_equal(self) -> int:
        """Ranks of which every number is the plan's."""
        return len(self.ranks) - len({each.rank for each in self.differences})

    def as_tree(self) -> dict[str, Any]:
        """For machines."""
        return {
            "num_ranks": len(self.ranks),
            "num_equal": self.num_equal,
            "seconds": round(self.seconds, 3),
            "ranks": [asdict(each) for each in self.ranks],
            "differences": [asdict(each) for each in self.differences],
        }


def verify(config: RunConfig, ranks: Sequence[int] | None = None, update: Update = unheard) -> Verification:
    """Build these ranks, or all of the layout, one after another on each of this machine's cores."""
    began = time.monotonic()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing is computed, and DeepSpeed would look for a device
    wanted = range(config.parallel.num_ranks) if ranks is None else ranks
    update("starting", 0, len(wanted), "ranks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional packages that megatron-core does without
        from trainer.engine import meta_rank  # before the fork: every process has what one has imported

    config = _without_transformer_engine(config)
    num_processes = min(len(os.sched_getaffinity(0)), len(wanted))
    built = []
    with ProcessPoolExecutor(num_processes, get_context("fork"), meta_rank.prepare_process) as pool:
        for rank in pool.map(
            partial(meta_rank.build, config), wanted, chunksize=-(-len(wanted) // num_processes // 16)
        ):
            built.append(rank)
            update("building", len(built), len(wanted), "ranks")
    return Verification(built, differences(config, built), time.monotonic() - began)


def differences(config: RunConfig, built: Sequence["BuiltRank"]) -> list[Difference]:
    """Between the plan of `config` and what was built."""
    return [
        Difference(rank.rank, what, planned, getattr(rank, what))
        for rank in built
        for what, planned in _planned(config, rank).items()
        if planned != getattr(rank, what)
    ]


def _planned(config: RunConfig, rank: "BuiltRank") -> dict[str, int]:
    state = plan.state_bytes_per_rank(config, rank.stage, rank.replica)
    return {
        "num_parameters": plan.parameters_per_rank(config, rank.stage),
        "weights": state.weights,
        "gradients": state.gradients + state.offload_buffers,
        "optimizer": state.optimizer,
    }


def _without_transformer_engine(config: RunConfig) -> RunConfig:
    """Its layers have the same parameters, and it needs CUDA."""
    return config.model_copy(update={"train": config.train.model_copy(update={"transformer_engine": False})})
