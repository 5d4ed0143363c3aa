"""How long a run stands still when something dies: kill -9, and the time to the next completed step.

`make bench-recovery`, or with other numbers `python -m benchmarks.recovery --ranks 20 --agents 20 --machines 20`.

Runs of four ranks on this machine, killed at random moments: a rank or the agent (tensor 2 x pipeline 2), or all
processes of one of two Ray nodes with two ranks each, beside a third that is a spare (tensor 2 x data 2). The state is
reloaded and verified each time, from the newest snapshot or checkpoint. The model is small: what is measured is the
machinery. The parts come from the times in the record of the run.
"""

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import drill
from deeds import find, kill
from drilled_run import DrilledRun, SmallJob
from launcher.job.fleet import Fleet
from launcher.verbs import stages
from machines import Machines, machines
from trainer.events import Event
from trainer.stop import Preempted

Deed = Callable[[DrilledRun], bool]
"""Whether it could be done; else it is tried again."""

_STEPS = 100_000  # more than it will do
_PAUSE_SECONDS = (1.0, 3.0)  # of training between two kills


@dataclass(frozen=True)
class Recovery:
    """Seconds from a kill to what followed."""

    noticed: float
    started: float
    restored: float
    stepped: float

    @classmethod
    def after(cls, killed_at: float, events: Sequence[Event]) -> "Recovery":
        later = [event for event in events if event["time"] >= killed_at]
        seconds = []
        for kind in ("life_failed", "life_started", "training_started", "step"):
            place = next(number for number, event in enumerate(later) if event["kind"] == kind)
            seconds.append(later[place]["time"] - killed_at)
            later = later[place:]
        return cls(*seconds)


class Killer(threading.Thread):
    """Kills again and again, waits for the next step each time, and asks the run to end."""

    def __init__(
        self, run: DrilledRun, number: int, seed: int, deed: Deed, mend: Callable[[], object] | None = None
    ) -> None:
        """`mend` is what follows each time, when the run trains again."""
        super().__init__(name="killer", daemon=True)
        self._run, self._number, self._deed, self._mend = run, number, deed, mend
        self._draw = random.Random(seed)
        self.recoveries: list[Recovery] = []

    def run(self) -> None:
        self._wait_for_step(0.0)
        for _ in range(self._number):
            time.sleep(self._draw.uniform(*_PAUSE_SECONDS))
            killed_at = time.time()
            while not self._deed(self._run):
                killed_at = time.time()
            self._wait_for_step(killed_at)
            self.recoveries.append(Recovery.after(killed_at, self._run.events()))
            if self._mend is not None:
                self._mend()
        self._run.run_dir.stop_path.touch()

    def _wait_for_step(self, since: float) -> None:
        """In the life after."""
        while True:
            events = [event for event in self._run.events() if event["time"] >= since]
            lives = [number for number, event in enumerate(events) if event["kind"] == "training_started"]
            if lives and any(event["kind"] == "step" for event in events[lives[-1] :]):
                return
            time.sleep(0.05)


def measure(
    run: DrilledRun,
    number: int,
    seed: int,
    deed_for: Callable[[Fleet], Deed],
    mend: Callable[[], object] | None = None,
) -> list[Recovery]:
    """On the Ray to which this process is connected."""
    with drill.claimed(run) as claim:
        killer = Killer(run, number, seed, deed_for(claim.ranks().fleet), mend)
        killer.start()
        with suppress(Preempted):
            stages.train(claim)
    assert len(killer.recoveries) == number, f"{len(killer.recoveries)} of {number} kills were survived"
    return killer.recoveries


def lose_a_machine(cluster: Machines, agents: Fleet, draw: random.Random) -> Deed:
    """When there is a warm spare: an agent answers when its fork server has imported what ranks need."""

    def do(run: DrilledRun) -> bool:
        rank = find(run, "rank", draw.randrange(4))
        if rank is None or len(agents.present()) < len(agents):
            time.sleep(0.1)
            return False
        cluster.kill_that_of(rank)
        return True

    return do


def show(what: str, found: Sequence[Recovery]) -> None:
    total = [each.stepped for each in found]
    parts = (
        ("noticed and the others killed", [each.noticed for each in found]),
        ("the next life begun", [each.started - each.noticed for each in found]),
        ("connected, restored, verified", [each.restored - each.started for each in found]),
        ("the first step", [each.stepped - each.restored for each in found]),
    )
    print(f"{what}: {len(total)} of {len(total)}; kill to next step {median(total):.2f} s, at most {max(total):.2f} s")
    for name, seconds in parts:
        print(f"  {name:32} {median(seconds):6.2f} s, at most {max(seconds):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=20, help="kills of a rank")
    parser.add_argument("--agents", type=int, default=20, help="kills of the agent")
    parser.add_argument("--machines", type=int, default=20, help="kills of a machine")
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    draw = random.Random(told.seed)

    def a_rank(run: DrilledRun) -> bool:
        return kill("rank", "", rank=draw.randrange(4)).do(run)

    with tempfile.TemporaryDirectory(prefix="broadgauge-") as scratch:
        job = SmallJob(Path(scratch))
        with drill.one_ray():
            for what, number, deed in (("rank", told.ranks, a_rank), ("agent", told.agents, kill("agent", "").do)):
                if number:
                    run = job.new_run(Path(scratch) / what, _STEPS, every_steps=20)
                    show(f"{what} killed", measure(run, number, told.seed, lambda _, deed=deed: deed))
        if told.machines:
            launch = {"nodes": 2, "spares": 1}
            run = job.new_run(Path(scratch) / "machines", _STEPS, "TP2 x DP2 ZeRO-1", launch=launch, every_steps=20)
            with machines(3) as cluster:
                found = measure(
                    run, told.machines, told.seed, lambda agents: lose_a_machine(cluster, agents, draw), cluster.start
                )
            show("machine lost", found)


if __name__ == "__main__":
    main()
