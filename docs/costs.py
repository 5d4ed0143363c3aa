"""Writes docs/costs.md, the plans of the ready runs in configs/: `make docs`."""

from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.planning import cluster as clusters
from launcher.planning.planner import Plan, make_plan
from launcher.report.planning import duration
from trainer import config_file
from trainer.config import RunConfig

TARGET = Path(__file__).with_suffix(".md")
RUNS = TARGET.parents[1] / "configs"

HEADER = """\
# What the ready runs cost

Every run in [configs](../configs) that names its cluster, as `broadgauge plan configs/NAME.yaml` has it, by arithmetic
alone; [planning.md](planning.md) says what is counted, and how far to trust it. For machines, prices and layouts of
your own: `broadgauge plan configs/NAME.yaml --cluster my-cluster.yaml --set parallel.data=8`.

This page is made from the planner by `make docs`.
"""

LEGEND = """
Time, device-hours and energy are those expected with failures; goodput is the share of the time that goes into steps
whose result is kept.

Layouts are the sizes of `parallel`, a pipeline's with its chunks where it is interleaved. Without another word replicas
split the optimizer's state (ZeRO 1), and nothing is recomputed. Memory is that of the fullest rank.
"""

Column = tuple[str, Callable[[Plan], str]]


def render() -> str:
    plans = list(_plans())
    prices: list[Column] = (
        [("price", lambda plan: f"{plan.price or 0:,.0f}")] if any(plan.price for plan in plans) else []
    )
    return "\n".join([HEADER, *_table(COSTS + prices, plans), LEGEND, *_table(LAYOUTS, plans)]) + "\n"


def _plans() -> Iterator[Plan]:
    """The smallest first, those of one kind of model together."""
    configs = [config_file.load(path) for path in RUNS.glob("*.yaml")]
    plans = [make_plan(config, clusters.load(config.launch.cluster)) for config in configs if config.launch.cluster]
    yield from sorted(plans, key=lambda plan: (plan.config.name[:4], plan.num_parameters))


def _table(columns: list[Column], plans: list[Plan]) -> Iterator[str]:
    yield f"| {' | '.join(heading for heading, _ in columns)} |"
    yield "|---|" + "---:|" * (len(columns) - 1)
    for plan in plans:
        yield f"| {' | '.join(text(plan) for _, text in columns)} |"


def _run(plan: Plan) -> str:
    return f"[{plan.config.name}](../configs/{plan.config.name}.yaml)"


def _layout(config: RunConfig) -> str:
    parallel, recompute = config.parallel, config.train.recompute
    chunks = f" x {parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
    sizes = (
        ("tensor", parallel.tensor, ""),
        ("pipeline", parallel.pipeline, chunks),
        ("context", parallel.context, ""),
        ("data", parallel.data, ""),
    )
    parts = [f"{name} {size}{more}" for name, size, more in sizes if size > 1]
    parts += [f"ZeRO {parallel.zero}"] * (parallel.zero > 1) + [f"{recompute} recomputation"] * (recompute != "none")
    return ", ".join(parts)


COSTS: list[Column] = [
    ("run", _run),
    ("parameters", lambda plan: f"{plan.num_parameters / 1e6:,.0f}M"),
    ("tokens", lambda plan: f"{plan.config.train.total_tokens / 1e9:,.0f}B"),
    ("devices", lambda plan: f"{plan.num_devices:,} x {plan.cluster.device}"),
    ("time", lambda plan: duration(plan.expected_seconds)),
    ("goodput", lambda plan: f"{plan.wall.goodput:.1%}"),
    ("device-hours", lambda plan: f"{plan.device_hours:,.0f}"),
    ("energy", lambda plan: f"{(plan.energy_kwh or 0) / 1e3:,.1f} MWh"),
]
LAYOUTS: list[Column] = [
    ("run", _run),
    ("layout", lambda plan: _layout(plan.config)),
    ("micro-batch", lambda plan: f"{plan.config.train.micro_batch_size}"),
    ("memory", lambda plan: f"{plan.memory.total / 2**30:.1f} of {plan.cluster.memory_bytes / 2**30:.1f} GiB"),
    ("step", lambda plan: duration(plan.step.seconds)),
    ("tokens/s", lambda plan: f"{plan.tokens_per_second / 1e3:,.0f}k"),
    ("MFU", lambda plan: f"{plan.mfu:.1%}"),
]


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
