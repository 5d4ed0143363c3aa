"""The planner against published measurements: predicted and measured, row by row, misses included."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import Field

from launcher.planning.cluster import Cluster, load
from launcher.planning.constants import GPU, Constants
from launcher.planning.practice import Practice
from launcher.planning.step_time import StepModel
from trainer import config_file, plan
from trainer.config import RunConfig
from trainer.section import Section

_PUBLISHED = Path(__file__).with_name("published.yaml")
_GIB = 2**30

Quantity = Literal[
    "step_seconds", "hardware_tflops", "model_tflops", "tokens_per_second", "activation_gib", "state_gib"
]


class System(Section):
    """What was measured of one system."""

    system: str
    source: str
    measured: Quantity
    cluster: str
    cluster_changes: dict[str, float] = Field({})
    practice: Practice
    shared: dict[str, Any]
    columns: list[str]
    rows: list[list[Any]]
    fitted: list[str] = Field([])


@dataclass(frozen=True)
class Row:
    """A published measurement."""

    system: str
    name: str
    quantity: Quantity
    published: float
    is_fitted: bool
    config: RunConfig
    cluster: Cluster
    practice: Practice

    def predicted(self, constants: Constants = GPU) -> float:
        config = self.config
        if self.quantity == "activation_gib":
            return _activation_bytes(config, self.practice) / _GIB
        if self.quantity == "state_gib":
            middle = config.parallel.pipeline // 2
            return plan.state_bytes_per_rank(config, middle).total / _GIB
        seconds = StepModel(config, self.cluster, self.practice, constants).step().seconds
        tokens_per_second = config.tokens_per_step / config.parallel.num_ranks / seconds
        match self.quantity:
            case "hardware_tflops":
                return plan.hardware_flops_per_token(config) * tokens_per_second / 1e12
            case "model_tflops":
                return plan.model_flops_per_token(config.model) * tokens_per_second / 1e12
            case "tokens_per_second":
                return tokens_per_second
        return seconds


@dataclass(frozen=True)
class Comparison:
    """A row and what is predicted for it."""

    row: Row
    predicted: float

    @property
    def error(self) -> float:
        """Relative, positive where too much is predicted."""
        return self.predicted / self.row.published - 1

    @property
    def is_missed(self) -> bool:
        """Whether it is further off than the worst row may be."""
        limits = [goal.limit for goal in GOALS if goal.statistic == "worst" and self.row.quantity in goal.quantities]
        return abs(self.error) > min(limits)

    def as_tree(self) -> dict[str, Any]:
        """For machines."""
        row = self.row
        return {
            "system": row.system,
            "name": row.name,
            "quantity": row.quantity,
            "published": row.published,
            "predicted": self.predicted,
            "error": self.error,
            "is_fitted": row.is_fitted,
        }


@dataclass(frozen=True)
class Goal:
    """How near predictions are to be."""

    name: str
    quantities: tuple[Quantity, ...]
    statistic: Literal["median", "worst"]
    limit: float
    held_out_only: bool = False

    def value(self, comparisons: list[Comparison]) -> float:
        errors = [
            abs(each.error)
            for each in comparisons
            if each.row.quantity in self.quantities and not (self.held_out_only and each.row.is_fitted)
        ]
        return median(errors) if self.statistic == "median" else max(errors)


_SPEED: tuple[Quantity, ...] = ("step_seconds", "hardware_tflops", "model_tflops", "tokens_per_second")
GOALS = (
    Goal("speed, median of rows held out", _SPEED, "median", 0.07, held_out_only=True),
    Goal("speed, worst of rows held out", _SPEED, "worst", 0.15, held_out_only=True),
    Goal("speed, median of all rows", _SPEED, "median", 0.07),
    Goal("speed, worst of all rows", _SPEED, "worst", 0.15),
    Goal("activations, worst", ("activation_gib",), "worst", 0.05),
    Goal("weights, gradients and optimizer, worst", ("state_gib",), "worst", 0.03),
)


def rows() -> Iterator[Row]:
    """Every published measurement."""
    for tree in config_file.parse_yaml(_PUBLISHED.read_text(encoding="utf-8")):
        system = config_file.validated(System, tree)
        for values in system.rows:
            yield _row(system, dict(zip(system.columns, values, strict=True)))


def compare(constants: Constants = GPU) -> list[Comparison]:
    return [Comparison(row, row.predicted(constants)) for row in rows()]


def _row(system: System, cells: dict[str, Any]) -> Row:
    name, published = str(cells.pop("name")), float(cells.pop("published"))
    cluster = load(cells.pop("cluster", system.cluster)).model_copy(update=system.cluster_changes)
    tree: dict[str, Any] = {"launch": {"device": "cuda"}}
    for key, value in (system.shared | cells).items():
        section, _, field = key.partition(".")
        tree.setdefault(section, {})[field] = value
    return Row(
        system.system,
        name,
        system.measured,
        published,
        name in system.fitted,
        config_file.from_tree(tree),
        cluster,
        system.practice.model_copy(update={"uses_storage": False}),
    )


def _activation_bytes(config: RunConfig, practice: Practice) -> float:
    """Of the layers on the first stage.

    A kernel that is not fused keeps what a flash kernel does not: the softmax, dropout's mask and its result, 5 bytes
    for every pair of a query and a key (Korthikanti et al. 2022, equation 1), and no sums of softmaxes (4 a head).
    """
    per_layer = plan.activation_bytes_per_layer(config, 0)
    if practice.attention == "unfused" and config.train.recompute == "none":
        heads = config.model.num_heads // config.parallel.tensor
        queries = config.train.micro_batch_size * config.model.seq_length
        per_layer += heads * queries * (5 * config.model.seq_length - 4)
    layers = config.model.num_layers // config.parallel.pipeline
    return per_layer * layers * plan.microbatches_in_flight(config.parallel, config.num_microbatches, 0)
