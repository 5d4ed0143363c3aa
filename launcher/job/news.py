"""What becomes of the agents of a job, by their slots."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Up:
    """An agent answers."""

    slot: int
    machine: str
    """Ray's name of it (hex)."""


@dataclass(frozen=True)
class Down:
    """An agent was lost; another one for its slot has been asked for, and comes up when there is a machine."""

    slot: int
