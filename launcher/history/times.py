"""Where the time of training went, second by second, as the record tells: every one is counted once.

    productive   steps that count, less their wait for data
    startup      until the first life of a command trains
    recovery     from a failure that is known, or from being moved, until ranks train again
    lost         what was computed in vain: void and skipped steps, what a failure cut off
    checkpoint   training stood still to save
    evaluation   held-out evaluations
    stall        the wait for data, hangs until they are known, and what nothing explains

Counted is the time in which commands train; between two of them nobody does. A step that a restart makes void moves
from productive to lost.
"""

from array import array
from bisect import bisect_right
from typing import Literal, get_args

from trainer.events import Event

TimeState = Literal["productive", "startup", "recovery", "lost", "checkpoint", "evaluation", "stall"]
TIME_STATES: tuple[TimeState, ...] = get_args(TimeState)

_STALL_FACTOR = 5.0
"""Times the last step after which one that has not come yet is a stall."""


class Times:
    def __init__(self) -> None:
        self.seconds: dict[TimeState, float] = dict.fromkeys(TIME_STATES, 0.0)
        self.mode: Literal["idle", "startup", "recovery", "training"] = "idle"
        self._mark = 0.0
        """Up to when time has been counted."""
        self._steps, self._productive = array("q"), array("d")
        """Of the steps that count: number, and productive seconds."""

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def until(self, now: float) -> dict[TimeState, float]:
        """With what has passed since the last event."""
        open_seconds = max(0.0, now - self._mark)
        state: TimeState = "stall"
        match self.mode:
            case "idle":
                return dict(self.seconds)
            case "startup" | "recovery":
                state = self.mode
            case "training":
                usual = self._productive[-1] if self._productive else open_seconds
                state = "productive" if open_seconds <= _STALL_FACTOR * usual else "stall"
        return {**self.seconds, state: self.seconds[state] + open_seconds}

    def add(self, event: Event, *, stands_still: bool = False) -> None:
        """`stands_still`: whether training stood still for the seconds of this event of a save."""
        match event["kind"]:
            case "stage_started":
                self.mode = "startup" if event["stage"] == "train" else "idle"
                self._mark = event["time"]
            case "stage_finished" if event["stage"] == "train":
                self._spend("checkpoint", event)  # the last one, which the command waits for
                self.mode = "idle"
            case "life_started" if event["number"] > 1:
                self._spend("recovery", event)
                self.mode = "recovery"
            case "training_started":
                self._spend("recovery" if self.mode == "recovery" else "startup", event)
                self.mode = "training"
                self._void_after(event["step"])
            case "step":
                self._step(event)
            case "step_skipped":
                self._spend("lost", event)
            case "rolled_back":
                self._spend("recovery", event)
                self._void_after(event["to_step"])
            case "evaluated" | "answered":
                self._spend("evaluation", event)
            case "hung":
                self._spend("stall", event)
                self.mode = "recovery"
            case "life_failed":
                self._spend("recovery" if self.mode == "recovery" else "lost", event)
                self.mode = "recovery"
            case "preempted":
                self._spend("checkpoint", event)
                self.mode = "recovery"
            case "failed" | "diverged":
                self._spend("lost" if self.mode == "training" else "recovery", event)
                self.mode = "idle"
            case _ if stands_still:
                self._spend("checkpoint", event, event["seconds"])

    def _spend(self, state: TimeState, event: Event, seconds: float | None = None) -> None:
        """Count the time since the last event; beyond so many seconds as a stall."""
        if self.mode == "idle":
            return
        passed = max(0.0, event["time"] - self._mark)
        spent = passed if seconds is None else min(passed, seconds)
        self.seconds[state] += spent
        self.seconds["stall"] += passed - spent
        self._mark = max(self._mark, event["time"])

    def _step(self, event: Event) -> None:
        if self.mode == "idle":
            return
        passed = max(0.0, event["time"] - self._mark)
        data = (event.get("phases") or {}).get("loading data", 0.0)
        productive = max(0.0, min(passed, event["seconds"]) - data)
        self.seconds["productive"] += productive
        self.seconds["stall"] += passed - productive
        self._mark = max(self._mark, event["time"])
        self._void_after(event["step"] - 1)
        self._steps.append(event["step"])
        self._productive.append(productive)

    def _void_after(self, step: int) -> None:
        place = bisect_right(self._steps, step)
        lost = sum(self._productive[place:])
        del self._steps[place:], self._productive[place:]
        self.seconds["productive"] = max(0.0, self.seconds["productive"] - lost)  # rounding may leave less than nothing
        self.seconds["lost"] += lost
