"""Functions that take turns in one process, and the rates that come of it."""

import statistics
import time
from collections.abc import Callable, Mapping


def megabytes_per_second(
    contestants: Mapping[str, Callable[[], object]], megabytes: float | Mapping[str, float], rounds: int
) -> dict[str, list[float]]:
    """MB per second of processor time, all threads included: what else runs on the machine counts less. The first
    round of several warms up."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + (rounds > 1)):
        for name, run in contestants.items():
            started = time.process_time()
            run()
            if number or rounds == 1:
                size = megabytes if isinstance(megabytes, float) else megabytes[name]
                rates[name].append(size / (time.process_time() - started))
    return rates


def show(rates: Mapping[str, list[float]], base: str | None = None, notes: Mapping[str, str] | None = None) -> None:
    """A line for each; with a base, how many times as fast that one is."""
    for name, found in rates.items():
        ratio = f"  {base} is {statistics.median(rates[base]) / statistics.median(found):5.1f}x" if base else ""
        spread = f"({min(found):.1f} to {max(found):.1f})"
        print(
            f"{name:34}{statistics.median(found):8.1f} MB/s {spread:20}{ratio}  {(notes or {}).get(name, '')}".rstrip()
        )
