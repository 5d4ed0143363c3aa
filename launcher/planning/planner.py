"""A run on a cluster, planned: whether it fits, how long it takes, what it costs, what is likely to be wrong."""

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from launcher.planning.advice import Advice, advice, advice_on_saving
from launcher.planning.cluster import Cluster
from launcher.planning.rank_memory import RankMemory, fullest
from launcher.planning.step_time import StepModel, StepTime
from launcher.planning.wall_time import WallTime, wall_time
from trainer import plan
from trainer.config import RunConfig


@dataclass(frozen=True)
class Plan:
    config: RunConfig
    cluster: Cluster
    memory: RankMemory
    """Of a rank of the fullest stage."""
    stage: int
    """Which that is."""
    step: StepTime
    """Of a step with the full batch."""
    hidden_share: float | None
    """Of what data-parallel replicas send each other: what computation hides; None where they send nothing."""
    wall: WallTime
    """Of the whole run, with its failures."""
    advice: list[Advice]

    @property
    def num_devices(self) -> int:
        return self.config.parallel.num_ranks

    @property
    def num_nodes(self) -> int:
        return self.cluster.num_nodes(self.num_devices)

    @property
    def num_parameters(self) -> int:
        return plan.num_parameters(self.config.model)

    @property
    def free_bytes(self) -> float:
        """Of the fullest rank's device; negative where the run does not fit."""
        return self.cluster.memory_bytes - self.memory.total

    @property
    def fits(self) -> bool:
        return self.free_bytes >= 0

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.config.tokens_per_step / self.step.seconds

    @property
    def model_flops_per_token(self) -> int:
        return plan.model_flops_per_token(self.config.model)

    @property
    def hardware_flops_per_token(self) -> int:
        """With those that recomputation repeats."""
        return plan.hardware_flops_per_token(self.config)

    @property
    def mfu(self) -> float:
        """Operations that the model needs, over the devices' peak."""
        return self.model_flops_per_token * self._tokens_per_peak_flop

    @property
    def hfu(self) -> float:
        """The same with those that recomputation repeats."""
        return self.hardware_flops_per_token * self._tokens_per_peak_flop

    @property
    def seconds(self) -> float:
        """Of the whole run, its ramp and its saves included, if nothing fails."""
        return self.wall.seconds

    @property
    def expected_seconds(self) -> float:
        """With failures, where the cluster's rate of them is known."""
        return self.wall.expected_seconds

    @property
    def device_hours(self) -> float:
        """Of the expected time, spares included."""
        spares = self.config.launch.spares * self.cluster.devices_per_node
        return (self.num_devices + spares) * self.expected_seconds / 3600

    @property
    def price(self) -> float | None:
        """In the currency of the cluster's prices."""
        hourly = self.cluster.price_per_device_hour
        return None if hourly is None else hourly * self.device_hours

    @property
    def energy_kwh(self) -> float | None:
        watts = self.cluster.watts_per_device
        return None if watts is None else watts * self.device_hours / 1000

    @property
    def _tokens_per_peak_flop(self) -> float:
        peak = self.cluster.bf16_flops if self.config.train.precision == "bf16" else self.cluster.fp32_flops
        return self.tokens_per_second / (self.num_devices * peak)

    def as_tree(self) -> dict[str, Any]:
        """For machines."""
        return {
            "name": self.config.name,
            "layout": self.config.parallel.describe(),
            "device": self.cluster.device,
            "num_devices": self.num_devices,
            "num_nodes": self.num_nodes,
            "num_parameters": self.num_parameters,
            "model_flops_per_token": self.model_flops_per_token,
            "hardware_flops_per_token": self.hardware_flops_per_token,
            "fits": self.fits,
            "memory_bytes": asdict(self.memory) | {"total": self.memory.total},
            "device_memory_bytes": self.cluster.memory_bytes,
            "fullest_stage": self.stage,
            "step_seconds": asdict(self.step) | {"total": self.step.seconds},
            "hidden_share_of_data": self.hidden_share,
            "tokens_per_step": self.config.tokens_per_step,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "total_tokens": self.config.train.total_tokens,
            "run_seconds": self.seconds,
            "expected_seconds": _finite(self.expected_seconds),
            "failures": self.wall.as_tree(),
            "device_hours": _finite(self.device_hours),
            "price": _finite(self.price),
            "energy_kwh": _finite(self.energy_kwh),
            "warnings": [asdict(each) for each in self.advice],
        }


def make_plan(config: RunConfig, cluster: Cluster) -> Plan:
    """The run's ranks compute on the cluster's devices, whatever `launch.device` says."""
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"device": cluster.kind})})
    found = fullest(config, cluster)
    model = StepModel(config, cluster)
    step = model.step()
    wall = wall_time(model, step)
    found_advice = [*advice(config, cluster, model), *advice_on_saving(wall)]
    return Plan(config, cluster, found.memory, found.stage, step, model.hidden_share, wall, found_advice)


def _finite(number: float | None) -> float | None:
    """What JSON can say: a run that fails more often than it saves never ends."""
    return number if number is not None and isfinite(number) else None
