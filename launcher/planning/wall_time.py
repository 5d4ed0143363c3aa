"""How long a run takes on its cluster: its steps, what saving adds to them, and, where its rate is known, failing."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from launcher.planning import goodput
from launcher.planning.cluster import Cluster
from launcher.planning.goodput import STANDSTILL, Failures, Restarts, Run, Saving, Size
from launcher.planning.saving import SaveTimes
from launcher.planning.step_time import StepModel, StepTime
from trainer.config import RunConfig
from trainer.rules import broken
from trainer.schedule import Schedule
from trainer.support import RULES

_MOST_MISSING = 64  # machines without which a layout is looked for: more are rarely away at once


@dataclass(frozen=True)
class WallTime:
    config: RunConfig
    cluster: Cluster
    step: StepTime
    """Of the full batch."""
    first_step: StepTime
    """Of the first batch of a ramp; of the full one without a ramp."""

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule(self.config)

    @cached_property
    def seconds(self) -> float:
        """Of all steps and saves, if nothing fails."""
        return sum(num * self._step_seconds(size) for size, num in self.schedule.batches())

    def _step_seconds(self, batch_size: int) -> float:
        """A step has a fixed part, and one for every micro-batch."""
        first, full = self.config.train.ramp_start_batch_size, self.config.train.global_batch_size
        if first is None or first == full:
            return self.step.seconds
        each = (self.step.seconds - self.first_step.seconds) / (full - first)
        return self.step.seconds - (full - batch_size) * each

    # ------------------------------------------------------------------------------------------------------- failures

    @property
    def knows_failures(self) -> bool:
        return self.cluster.node_failure_seconds is not None

    @cached_property
    def goodput(self) -> float:
        """Share of the expected time that goes into steps whose result is kept, neither saving nor failing."""
        return self._run.goodput

    @property
    def expected_seconds(self) -> float:
        """With failures, where their rate is known."""
        if not self.knows_failures:
            return self.seconds
        working = self.seconds * self._work_seconds / self.step.seconds
        return working / self.goodput if self.goodput else float("inf")

    @property
    def seconds_between_failures(self) -> float:
        return 1 / self._run.failures.per_second(self.num_nodes)

    @property
    def interval_steps(self) -> int:
        """Between checkpoints, the last of which ends the run."""
        return round(min(self._saves.interval_steps(self._work_seconds), self.schedule.num_steps))

    @cached_property
    def best_interval_steps(self) -> int:
        """Between checkpoints, for the most goodput: as configured where nothing that is tried is better."""
        snapshot_steps = self.config.checkpoint.snapshot_every_steps
        found = goodput.best_interval(self._run, self._work_seconds, self.schedule.num_steps, snapshot_steps)
        return found if self._goodput_every(found) > self.goodput else self.interval_steps

    @cached_property
    def best_goodput(self) -> float:
        """With checkpoints as often as is best."""
        return self._goodput_every(self.best_interval_steps)

    def _goodput_every(self, num_steps: int) -> float:
        snapshot_steps = self.config.checkpoint.snapshot_every_steps
        return goodput.at_interval(self._run, num_steps, self._work_seconds, snapshot_steps).goodput

    def goodput_with(self, num_spares: int) -> float:
        """With other spares."""
        return replace(self._run, num_spares=num_spares).goodput

    @property
    def goodput_without_snapshots(self) -> float:
        """With checkpoints alone, as often as they are."""
        settings = {"snapshot_every_steps": None, "replicate": False}
        checkpoint = self.config.checkpoint.model_copy(update=settings)
        return replace(self, config=self.config.model_copy(update={"checkpoint": checkpoint})).goodput

    def as_tree(self) -> dict[str, Any] | None:
        """For machines; None where nothing is known of failures."""
        if not self.knows_failures:
            return None
        spares = self.config.launch.spares
        return {
            "seconds_between_failures": self.seconds_between_failures,
            "goodput": self.goodput,
            "goodput_by_spares": {str(num): self.goodput_with(num) for num in sorted({0, spares, spares + 1})},
            "goodput_without_snapshots": self.goodput_without_snapshots,
            "checkpoint_every_steps": self.interval_steps,
            "best_checkpoint_every_steps": self.best_interval_steps,
            "best_checkpoint_goodput": self.best_goodput,
        }

    @property
    def num_nodes(self) -> int:
        return self.cluster.num_nodes(self.config.parallel.num_ranks)

    @property
    def _work_seconds(self) -> float:
        """Of a step, without saving."""
        return self.step.seconds - self.step.checkpoint

    @property
    def _saves(self) -> SaveTimes:
        return SaveTimes(self.config, self.cluster)

    @cached_property
    def _run(self) -> Run:
        cluster, policy, saves = self.cluster, self.config.checkpoint, self._saves
        assert cluster.node_failure_seconds is not None
        replicated = policy.replicates(self.num_nodes) and policy.asynchronous
        steps = self.interval_steps
        from_memory = saves.load_from_memory_seconds if policy.asynchronous else saves.load_from_storage_seconds
        of_others = saves.load_from_neighbour_seconds if replicated else saves.load_from_storage_seconds
        return Run(
            Failures(
                node_seconds=cluster.node_failure_seconds,
                lost_share=cluster.node_loss_share,
                repair_seconds=3600 * cluster.repair_hours,
            ),
            Saving(
                interval_seconds=steps * self._work_seconds,
                stall_seconds=saves.stall_seconds,
                written_seconds=saves.written_seconds,
                num_snapshots=saves.num_snapshots(steps),
                snapshot_stall_seconds=saves.snapshot_seconds,
                replicated=replicated,
            ),
            Restarts(
                rank_seconds=cluster.restart_seconds + from_memory,
                machine_seconds=cluster.restart_seconds + of_others,
                patience_seconds=self.config.supervise.patience_seconds,
                growing_seconds=cluster.restart_seconds + from_memory + saves.stall_seconds,
            ),
            self.config.launch.spares,
            self.sizes,
        )

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """With none missing, one, two and so on, by the rules of `launcher.sizing`: fewer replicas, the same batch."""
        found = [Size(self.num_nodes, 1.0)]
        least = self.config.supervise.min_nodes or 1
        for num_nodes in range(self.num_nodes - 1, max(least, self.num_nodes - _MOST_MISSING) - 1, -1):
            if num_nodes < found[-1].num_nodes:
                found.append(self._largest(num_nodes, least))
            elif found[-1] is not STANDSTILL:
                found.append(found[-1])
        return (*found, STANDSTILL)

    def _largest(self, most_nodes: int, least_nodes: int) -> Size:
        parallel, here = self.config.parallel, self.cluster.devices_per_node
        model_ranks = parallel.num_ranks // parallel.data
        for num_nodes in range(most_nodes, least_nodes - 1, -1):
            data, rest = divmod(num_nodes * here, model_ranks)
            if data and not rest and self._comes_out_even(num_nodes, data):
                return Size(num_nodes, data / parallel.data)
        return STANDSTILL

    def _comes_out_even(self, num_nodes: int, data: int) -> bool:
        config = self.config
        if config.train.global_batch_size % (config.train.micro_batch_size * data):
            return False
        layout = {"nodes": num_nodes, "ranks_per_node": self.cluster.devices_per_node}
        smaller = config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update={"data": data}),
                "launch": config.launch.model_copy(update=layout),
            }
        )
        return next(iter(broken(smaller, RULES)), None) is None


def wall_time(model: StepModel, step: StepTime) -> WallTime:
    """`step` is that of the model."""
    config = model.config
    first = config.train.ramp_start_batch_size
    if first is None:
        return WallTime(config, model.cluster, step, step)
    train = config.train.model_copy(update={"global_batch_size": first, "ramp_start_batch_size": None})
    small = replace(model, config=config.model_copy(update={"train": train}))
    return WallTime(config, model.cluster, step, small.step())
