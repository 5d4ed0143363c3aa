"""Everything that the events of a run say, up to date with each one."""

from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any, Literal

from launcher.history.saves import Saves
from launcher.history.soundness import is_sound
from launcher.history.steps import Steps
from launcher.history.times import Times
from trainer.events import Event, read_events

RestartReason = Literal["rank", "agent", "machine", "hang", "preemption", "growth", "command"]
_RECENT = 100
_ENDS = ("run_finished", "preempted", "failed", "diverged")
_MARKED = (
    *("life_failed", "hung", "straggler", "machine_excluded", "rolled_back", "checkpoint_rejected"),
    *("checkpoint_failed", "checkpoint_upload_failed", "checkpoint_service_died", "preempted", "diverged", "failed"),
    *("training_started", "run_finished", "evaluation_failed"),
)
_MOST_MARKS = 1000
_MOST_LOOKS = 1000  # at all ranks


class RunHistory:
    """Of a run, all its commands and lives. `add` takes events in the order of the record."""

    def __init__(self) -> None:
        self.steps = Steps()
        self.skipped: dict[int, Event] = {}
        """By step: those that count and from which the weights have not learned."""
        self.saves, self.times = Saves(), Times()
        self.done: Counter[str] = Counter()
        """Steps and samples that have updated weights, and steps made void since; never taken back."""
        self.step_seconds = 0.0
        """Of all those steps."""
        self.phase_seconds: Counter[str] = Counter()
        """The same by phase."""
        self.num_skipped: Counter[str] = Counter()
        """Steps by reason, void ones too."""
        self.num_quarantined_samples = 0
        self.rollbacks: list[Event] = []
        self.evaluations: dict[int, Event] = {}
        """By step."""
        self.judgements: dict[int, Event] = {}
        """By step: evaluations of checkpoints."""
        self.unjudged: Counter[str] = Counter()
        """Checkpoints by what became of their evaluation: skipped, failed."""
        self.restarts: Counter[str] = Counter()
        self.stragglers: Counter[str] = Counter()
        self.num_lives = 0
        self.failures: list[Event] = []
        self.excluded: list[str] = []
        """Machines."""
        self.training: Event | None = None
        """The last `training_started`."""
        self.planned: Event | None = None
        """Of the layout that has trained last."""
        self.plan_checked: Event | None = None
        """What came of that."""
        self.began: float | None = None
        """When training first began (Unix time)."""
        self.ranks: list[Event] = []
        """What the command has seen of all ranks; of a long run a part, the last one always."""
        self.marks: deque[Event] = deque(maxlen=_MOST_MARKS)
        """What explains a bend in a curve, newest last."""
        self.data: Event | None = None
        """The last `blend`."""
        self.end: Event | None = None
        """The last event that ended a command or a stage, or began one."""
        self.stage: str | None = None
        """The last one that was begun."""
        self.stage_seconds: dict[str, float] = {}
        """Including what was done before an interruption."""
        self.export: Event | None = None
        self.num_unreadable = 0
        """Events of known kinds that were not as they must be."""
        self._cause: RestartReason = "command"
        self._nodes = 0
        self._stage_began: float | None = None
        self._stage_start: Event | None = None
        self._num_in_each, self._num_in_last = 1, 0
        """Looks at ranks that have become one, and how many of them the last one has."""
        self._latest = 0.0

    @classmethod
    def of(cls, events: Iterable[Event]) -> "RunHistory":
        history = cls()
        for event in events:
            history.add(event)
        return history

    @classmethod
    def read(cls, path: Path) -> "RunHistory":
        return cls.of(read_events(path))

    def add(self, event: Event) -> None:
        """One more event; one that is broken is passed over."""
        if is_sound(event):
            self._add(event)
        else:
            self.num_unreadable += 1

    # -------------------------------------------------------------------------------------------------------- questions

    @property
    def step(self) -> int:
        """The last one that is done and counts."""
        return max(self.steps.last, self._last_skipped)

    @property
    def _last_skipped(self) -> int:
        return next(reversed(self.skipped), 0)

    @property
    def last_evaluation(self) -> Event | None:
        return self.evaluated[-1] if self.evaluations else None

    @property
    def evaluated(self) -> list[Event]:
        """Held-out evaluations by step; the last one where a step was evaluated again."""
        return [self.evaluations[step] for step in sorted(self.evaluations)]

    @property
    def judged(self) -> list[Event]:
        """Evaluations of checkpoints, by step."""
        return [self.judgements[step] for step in sorted(self.judgements)]

    @property
    def heldout_sources(self) -> dict[str, dict[str, Any]]:
        """Loss and bits per byte of each data set in the last evaluation."""
        return (self.last_evaluation or {}).get("datasets") or {}

    @property
    def loss(self) -> float | None:
        return self.steps["loss"][-1] if len(self.steps) else None

    @property
    def recent(self) -> slice:
        """The last steps that count."""
        return slice(max(0, len(self.steps) - _RECENT), len(self.steps))

    def recent_median(self, column: str) -> float | None:
        values = self.steps[column][self.recent]
        return median(values) if values else None

    def tokens_per_second(self, seq_length: int, steps: slice | None = None) -> float:
        """Of the median step, of all unless told, so that start-up and disturbances do not count."""
        chosen = slice(None) if steps is None else steps
        columns = zip(self.steps["num_samples"][chosen], self.steps["seconds"][chosen], strict=True)
        rates = [samples * seq_length / seconds for samples, seconds in columns if seconds > 0]
        return median(rates) if rates else 0.0  # a short run may have skipped every step

    # ----------------------------------------------------------------------------------------------------------- events

    def _add(self, event: Event) -> None:
        kind, time = event["kind"], float(event["time"])
        stands_still = kind in ("checkpoint_snapshot", "checkpoint_waited") or (
            kind == "checkpoint_saved" and self.saves.held_training_up(event)
        )
        self.times.add(event, stands_still=stands_still)
        self.saves.add(event)
        self._add_stage(kind, event, time)
        self._add_training(kind, event)
        if kind in _MARKED:
            self.marks.append(event)
        if kind in (*_ENDS, "stage_started", "stage_finished"):
            self.end = event
        elif kind == "life_started":  # what ended a life was no end
            self.end = self._stage_start
        self._latest = time

    def _add_stage(self, kind: str, event: Event, time: float) -> None:
        if self._stage_began is not None and kind in ("run_started", "stage_started", "stage_finished"):
            end = time if kind == "stage_finished" else self._latest  # one that was cut off ended with its last word
            assert self.stage is not None
            self.stage_seconds[self.stage] = self.stage_seconds.get(self.stage, 0.0) + end - self._stage_began
            self._stage_began = None
        if kind == "stage_started":
            self.stage, self._stage_began, self._stage_start = event["stage"], time, event

    def _add_training(self, kind: str, event: Event) -> None:
        match kind:
            case "step":
                self._step(event)
            case "step_skipped":
                self._step_skipped(event)
            case "training_started":
                self._training_started(event)
            case "planned" | "unplanned":
                self.planned, self.plan_checked = (event if kind == "planned" else None), None
            case "plan_checked":
                self.plan_checked = event
            case "rolled_back":
                self._void_after(event["to_step"])
                self.rollbacks.append(event)
            case "evaluated":
                self.evaluations[event["step"]] = event
            case "checkpoint_evaluated":
                self.judgements[event["step"]] = event
            case "evaluation_skipped" | "evaluation_failed":
                self.unjudged[kind.removeprefix("evaluation_")] += 1
            case "life_started":
                self._life_started(event)
            case "life_failed":
                self.failures.append(event)
                self._cause = event["what"]
            case "machine_excluded":
                self.excluded.append(event["machine"])
            case "straggler":
                self.stragglers[event["phase"]] += 1
            case "ranks":
                self._add_ranks(event)
            case "blend":
                self.data = event
            case "export_verified":
                self.export = event

    def _training_started(self, event: Event) -> None:
        self._void_after(event["step"])
        self.training = event
        self.began = float(event["time"]) if self.began is None else self.began

    def _step(self, event: Event) -> None:
        self._void_after(event["step"] - 1)
        self.steps.add(event)
        self.done["steps"] += 1
        self.done["samples"] += event["num_samples"]
        self.step_seconds += event["seconds"]
        self.phase_seconds.update(event.get("phases") or {})

    def _step_skipped(self, event: Event) -> None:
        step, reason, num_samples = event["step"], event["reason"], event["num_samples"]
        self._void_after(step - 1)
        self.skipped[step] = event
        self.num_skipped[reason] += 1
        self.num_quarantined_samples += num_samples if reason == "quarantined" else 0

    def _void_after(self, step: int) -> None:
        self.done["void"] += self.steps.void_after(step)
        for found in (self.evaluations, self.judgements):
            for at in [at for at in found if at > step]:
                del found[at]
        if self._last_skipped > step:
            self.skipped = {number: event for number, event in self.skipped.items() if number <= step}

    def _add_ranks(self, event: Event) -> None:
        """Where there are many, so many in a row become one, which has the longest time of each rank."""
        if self._num_in_last < self._num_in_each and self.ranks:
            self.ranks[-1] = _together(self.ranks[-1], event)
            self._num_in_last += 1
            return
        self.ranks.append(event)
        self._num_in_last = 1
        if len(self.ranks) > _MOST_LOOKS:
            halves = zip(self.ranks[:-1:2], self.ranks[1:-1:2], strict=True)
            self.ranks = [*(_together(*both) for both in halves), self.ranks[-1]]
            self._num_in_each *= 2

    def _life_started(self, event: Event) -> None:
        self.num_lives += 1
        if self.num_lives > 1:
            reason: str = "command" if event["number"] == 1 else self._cause
            if reason == "preemption" and event["nodes"] > self._nodes:
                reason = "growth"
            self.restarts[reason] += 1
        self._nodes, self._cause = event["nodes"], "preemption"


def _together(earlier: Event, later: Event) -> Event:
    """Two looks at ranks as one, unless the layout has changed: then the later one."""
    before, after = earlier["seconds"], later["seconds"]
    if (len(before), earlier["group"]) != (len(after), later["group"]):
        return later
    return {**later, "seconds": list(map(max, before, after))}
