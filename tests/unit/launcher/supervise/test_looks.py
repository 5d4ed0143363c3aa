"""Looks at ranks, whatever time their machines take to answer."""

import pytest

from launcher.supervise.looks import LOOK_SECONDS, PATIENCE_SECONDS, Looks
from trainer.heartbeat import Beat


def beat(pid: int) -> Beat:
    return Beat(pid, 5, 7, 1, 1, "computing", 0.0, 60.0, {}, {})


class Machines:
    """Two, of which one answers at once and the other so many seconds after it was asked."""

    def __init__(self, slow_seconds: float) -> None:
        self.slow_seconds, self.now, self.num_asked = slow_seconds, 0.0, 0

    def ask(self) -> list[tuple[int, float]]:
        self.num_asked += 1
        return [(0, self.now), (1, self.now + self.slow_seconds)]

    def answer_of(self, ref: tuple[int, float]) -> dict[int, Beat] | None:
        rank, ready = ref
        return {rank: beat(rank)} if self.now >= ready else None


def looks_in(seconds: float, machines: Machines) -> list[dict[int, Beat]]:
    looks, found = Looks(machines.ask, machines.answer_of), []
    for tick in range(int(seconds / 0.05)):
        machines.now = tick * 0.05
        look = looks.look(machines.now)
        found += [look] if look is not None else []
    return found


@pytest.mark.parametrize("slow_seconds", [0.0, 0.9, 1.5, 4.0, 15.0])
def test_a_slow_machine_makes_looks_rarer_but_whole(slow_seconds: float) -> None:
    found = looks_in(60, Machines(slow_seconds))
    assert all(look.keys() == {0, 1} for look in found)
    assert len(found) >= 60 / (max(slow_seconds, LOOK_SECONDS) + 0.1) - 2


def test_one_that_never_answers_is_done_without() -> None:
    machines = Machines(1e9)
    found = looks_in(5 * PATIENCE_SECONDS, machines)
    assert len(found) == 4 and all(look.keys() == {0} for look in found)
    assert machines.num_asked == 5


def test_nobody_is_asked_again_before_there_was_time_to_answer() -> None:
    machines = Machines(4.0)
    looks_in(60, machines)
    assert machines.num_asked <= 60 / 4 + 1
