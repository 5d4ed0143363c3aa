"""The planner beside small runs on this machine's CPUs: `make bench-plan`.

Real ranks, a thread each, of a model of 16 M weights in every layout of tests/planned_runs.py. Memory, in MB of the
rank that holds most: what is in use at the peak, beyond the process itself, beside the plan's parts; and all that is
resident at the peak, with the holes of the C library's heap, beside the plan's total. Time: the fastest of the steps
after the first, by the slowest rank, beside the plan for this machine. Layouts take turns, `--rounds` times.
"""

import argparse
import statistics
from dataclasses import dataclass, field

from launcher.planning.rank_memory import fullest
from launcher.planning.step_time import StepModel
from launcher.planning.this_machine import cpu_cluster
from planned_runs import ALL, UNSEEN, config_of, in_use_bytes, measure, resident_bytes

_NUM_STEPS = 4


@dataclass
class Row:
    """Predicted and measured of one layout: bytes, and the best time of each round (seconds)."""

    planned: tuple[float, float, float]
    in_use: float = 0.0
    resident: float = 0.0
    seconds: list[float] = field(default_factory=list)

    @property
    def measured(self) -> tuple[float, float, float]:
        return self.in_use, self.resident, min(self.seconds)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Predicted over measured."""
        return tuple(one / other for one, other in zip(self.planned, self.measured, strict=True))


def planned(layout: str) -> tuple[float, float, float]:
    config = config_of(layout)
    cluster = cpu_cluster(config.parallel.num_ranks, config.launch.threads_per_rank)
    memory = fullest(config, cluster).memory
    parts = memory.total - memory.context - memory.fragmentation
    return parts, memory.total, StepModel(config, cluster).without_storage().seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("layouts", nargs="*", help="of tests/planned_runs.py; all of them by default")
    arguments = parser.parse_args()
    rows = {layout: Row(planned(layout)) for layout in arguments.layouts or ALL}
    for layout, row in rows.items():
        row.in_use = in_use_bytes(config_of(layout))
    for _ in range(arguments.rounds):
        for layout, row in rows.items():
            ranks = measure(config_of(layout), _NUM_STEPS, returns_memory=False)
            row.resident = max(row.resident, resident_bytes(ranks))
            row.seconds.append(min(max(rank.step_seconds[n] for rank in ranks) for n in range(1, _NUM_STEPS)))
    print(f"{'':28}{'in use, MB':>22}{'resident, MB':>24}{'a step, s':>24}")
    print(f"{'layout':28}" + "planned measured ratio  ".rjust(24) * 3)
    for layout, row in rows.items():
        cells = zip(row.planned, row.measured, row.ratios, (1e6, 1e6, 1.0), (0, 0, 2), strict=True)
        print(f"{layout:28}" + "".join(f"{p / u:8.{d}f} {m / u:8.{d}f} {r:5.2f} " for p, m, r, u, d in cells))
    print("off by a factor of")
    for index, name in enumerate(("in use", "resident", "time")):
        for which, is_unseen in (("rules were chosen on", False), ("they were not", True)):
            ratios = [row.ratios[index] for layout, row in rows.items() if (layout in UNSEEN) == is_unseen]
            factors = [max(ratio, 1 / ratio) for ratio in ratios]
            if factors:
                told = f"{statistics.median(factors):.2f} at the median, {max(factors):.2f} at worst"
                print(f"{name:9}{told}, of {len(factors)} layouts that {which}")


if __name__ == "__main__":
    main()
