"""What ranks tell each other after every step, in one small all-reduce: what it was fed, save, stop, profile."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.distributed as dist

from trainer import parallel
from trainer.checkpoint.interval import FailureHistory, Moment, is_due, optimal_seconds
from trainer.config import RunConfig
from trainer.stop import StopRequest


@dataclass(frozen=True)
class Agreed:
    """The same on every rank."""

    data_digest: int
    """Of the samples that all replicas computed on; see `trainer.data.digest`."""
    save: bool
    """Whether a checkpoint is due."""
    stop: bool
    """Whether some rank was asked to save and end."""
    profile: bool = False
    """Whether some rank was asked for a profile."""


class Agreement:
    """One rank's part in the agreement. Whether a save is due depends on a clock: rank 0 decides."""

    def __init__(
        self,
        config: RunConfig,
        stop: StopRequest,
        history: FailureHistory,
        clock: Callable[[], float] = time.monotonic,
        is_profile_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """`history` is what earlier lives of the run have seen."""
        self._config, self._stop, self._history, self._clock = config, stop, history, clock
        self._is_profile_asked = is_profile_asked
        self._began = clock()
        self.saved(0)

    def saved(self, step: int, stall_seconds: float | None = None) -> None:
        """Training goes on from a step at which a save was due; it has held training up for so long, if it was done."""
        self._saved = Moment(step, self._clock())
        if stall_seconds is not None:
            stalls = (*self._history.stall_seconds, stall_seconds)
            self._history = replace(self._history, stall_seconds=stalls)

    def after_step(self, step: int, data_digest: int) -> Agreed:
        """Collective.

        Args:
            data_digest: of the samples of this rank's replica.
        """
        is_first = dist.get_rank() == 0
        digest, num_due, num_stops, num_profiles = parallel.sum_over_ranks(
            data_digest if parallel.speaks_for_replica() else 0,
            int(is_first and self._is_due(step)),
            int(self._stop.is_made()),
            int(self._is_profile_asked()),
        )
        return Agreed(digest, bool(num_due), bool(num_stops), bool(num_profiles))

    def _is_due(self, step: int) -> bool:
        now = self._clock()
        history = replace(self._history, trained_seconds=self._history.trained_seconds + now - self._began)
        optimum = optimal_seconds(history, self._config.parallel.num_ranks)
        return is_due(self._config.checkpoint, self._saved, Moment(step, now), optimum)
