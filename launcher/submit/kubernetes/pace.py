"""How whoever waits for a cluster waits, and how it tells a person."""

import time
from collections.abc import Callable
from dataclasses import dataclass

Say = Callable[[str], None]
"""Show a line."""


@dataclass(frozen=True)
class Pace:
    """How often the cluster is asked, by which clock."""

    seconds: float = 2.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
