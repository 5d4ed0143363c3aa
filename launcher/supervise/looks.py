"""Looks at what ranks said last: every machine is asked, and some take longer to answer than others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.heartbeat import Beat

LOOK_SECONDS = 1.0  # between two looks
PATIENCE_SECONDS = 20.0
"""For a machine to answer, after which the others are looked at without it: a hang shows in all of them."""

Answer = Mapping[int, Beat]
"""By rank."""


class Looks:
    """Of one life. A machine that always takes longer than others makes looks rarer, and keeps none from being had."""

    def __init__(self, ask: Callable[[], Sequence[Any]], answer_of: Callable[[Any], Answer | None]) -> None:
        """`ask` asks every machine; `answer_of` is what one has answered by now, if anything."""
        self._ask, self._answer_of = ask, answer_of
        self._asked: Sequence[Any] = ()
        self._asked_at = float("-inf")

    def look(self, now: float) -> Answer | None:
        """What all ranks said last, where a look is to be had now; those of machines that do not answer are missing."""
        if now - self._asked_at < LOOK_SECONDS:
            return None
        answers = [answer for ref in self._asked if (answer := self._answer_of(ref)) is not None]
        if len(answers) < len(self._asked) and now - self._asked_at < PATIENCE_SECONDS:
            return None
        is_first = not self._asked
        self._asked, self._asked_at = self._ask(), now
        return None if is_first else {rank: beat for answer in answers for rank, beat in answer.items()}
