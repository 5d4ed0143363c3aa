"""How long ranks have been silent, and who holds them up: what their signs of life say, look after look. Pure."""

from collections import deque
from collections.abc import Mapping
from statistics import median

from launcher.supervise.hang import silence_limit
from launcher.supervise.stragglers import LEAST_STEPS, Straggler, Streaks, find
from trainer.config import SuperviseConfig
from trainer.heartbeat import STEP_PHASES, Beat

_OTHER_PHASES_FACTOR = 6.0
"""What is no step takes longer, and says less meanwhile: reading a checkpoint, waiting for a disk, evaluating."""
_RECENT_STEPS = 50
_LOOKS_IN_A_ROW = 3
"""In which a rank must have held the others up before it is named."""


class Watch:
    """Over the ranks of one life."""

    def __init__(self, policy: SuperviseConfig, now: float) -> None:
        self._policy, self._heard = policy, now
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._beats: Mapping[int, Beat] = {}
        self._compared: tuple[float, Mapping[int, Beat]] = (now, {})
        self._streaks = Streaks()

    def step_took(self, seconds: float, now: float) -> None:
        self._step_seconds.append(seconds)
        self._heard = now

    def saw(self, beats: Mapping[int, Beat], now: float) -> list[Straggler]:
        """Note what all ranks said last; returns those that have held the others up for long, once."""
        self._beats = beats
        when, before = self._compared
        num_steps = [beats[rank].num_steps - before[rank].num_steps for rank in beats.keys() & before.keys()]
        if now - when < self._policy.straggler_seconds or min(num_steps, default=LEAST_STEPS) < LEAST_STEPS:
            return []
        found = find(before, beats, self._policy.straggler_factor)
        self._compared, self._streaks = (now, beats), self._streaks.after(found)
        named = self._streaks.reached(_LOOKS_IN_A_ROW)
        return [each for each in found if each.rank in named]

    def is_hung(self, now: float) -> bool:
        """Whether no rank has said anything for so long that none will, as of the last look."""
        if not self._beats:  # there may be no memory for them: then steps are all that is heard
            return now - self._heard > self._limit(in_step=False)
        silent_seconds = min(beat.silent_seconds for beat in self._beats.values())
        return silent_seconds > self._limit(in_step=any(b.phase in STEP_PHASES for b in self._beats.values()))

    def _limit(self, *, in_step: bool) -> float:
        seconds = median(self._step_seconds) if self._step_seconds else None
        limit = silence_limit(seconds, self._policy.hang_factor, self._policy.hang_seconds)
        return limit if in_step else _OTHER_PHASES_FACTOR * limit
