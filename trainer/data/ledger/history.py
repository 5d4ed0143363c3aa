"""The surviving history of a run: the steps that led to its final weights, as its events record them."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from trainer.config import UserError
from trainer.data.digest import from_hex
from trainer.data.ledger.report import span
from trainer.events import Event

QUARANTINED = "quarantined"
"""The reason of `trainer.stability` for a step that was not computed, so that its samples were not read."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What the event of a step says."""

    number: int
    """1-based."""
    first_sample: int | None
    """Position in the data order; None in the events of older versions."""
    num_samples: int | None
    digest: int | None
    """Of the tokens that it was fed; None where it was not computed, and in the events of older versions."""
    tokens_after: int | None
    """Tokens that the run has consumed after it; skipped steps do not say."""
    reason: str | None = None
    """Why the weights have not learned from it; None where they have."""

    @classmethod
    def of(cls, event: Event) -> "StepRecord":
        text = event.get("tokens_xxh3")
        has_samples = "first_sample" in event
        return cls(
            number=int(event["step"]),
            first_sample=int(event["first_sample"]) if has_samples else None,
            num_samples=int(event["num_samples"]) if has_samples else None,
            digest=None if text is None else from_hex(text),
            tokens_after=event.get("tokens"),
            reason=event["reason"] if event["kind"] == "step_skipped" else None,
        )

    @property
    def is_computed(self) -> bool:
        return self.reason != QUARANTINED

    @property
    def samples(self) -> str:
        """For messages."""
        if self.first_sample is None or self.num_samples is None:
            return "samples that it does not record"
        return span("sample", self.first_sample, self.first_sample + self.num_samples)


@dataclass(frozen=True)
class Origin:
    """What the surviving history begins from."""

    step: int = 0
    """Steps done by then, elsewhere; 0 for a run that began by itself."""
    checkpoint: str | None = None


@dataclass
class History:
    origin: Origin = Origin()
    steps: list[StepRecord] = field(default_factory=list)
    """In ascending order; a hole or a step that comes twice is a finding, not an error."""
    checkpoints: dict[int, str] = field(default_factory=dict)
    """Step -> where its checkpoint was said to lie, of this run's own."""
    num_restarts: int = 0
    num_rollbacks: int = 0
    num_computed: int = 0
    """Steps computed, void ones included."""
    num_voided: dict[str, int] = field(default_factory=lambda: {"restart": 0, "rollback": 0})
    """Steps computed whose updates are not in the final weights, by what took them back."""
    findings: list[str] = field(default_factory=list)


def read_history(events: Iterable[Event]) -> History:
    """Fold the events of a run, oldest first.

    Raises:
        UserError: an event lacks what its kind has had in every version.
    """
    fold = _Fold()
    for event in events:
        try:
            fold.take(event)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the event {event} cannot be understood: {error!r}; restore the run's events") from error
    return fold.result()


class _Fold:
    """What has survived so far."""

    def __init__(self) -> None:
        self._history = History()
        self._steps: dict[int, StepRecord] = {}
        self._findings: list[tuple[int, str]] = []  # with the step, that goes when the step does
        self._last = 0  # step done
        self._has_started = False

    def take(self, event: Event) -> None:
        match event["kind"]:
            case "step" | "step_skipped":
                self._add(StepRecord.of(event))
            case "training_started":
                self._history.num_restarts += self._has_started
                self._has_started = True
                self._go_back(int(event["step"]), event.get("checkpoint"), "restart")
            case "rolled_back":
                self._history.num_rollbacks += 1
                self._go_back(int(event["to_step"]), event.get("checkpoint"), "rollback")
            case "checkpoint_saved":
                self._history.checkpoints[int(event["step"])] = event["path"]

    def _add(self, record: StepRecord) -> None:
        before = self._steps.get(record.number)
        if before is not None:
            finding = f"is recorded twice with no restart in between: {before.samples}, then {record.samples}"
            self._findings.append((record.number, f"step {record.number} {finding}"))
        elif record.number <= self._last:
            finding = f"is recorded after step {self._last} with no restart in between: {record.samples}"
            self._findings.append((record.number, f"step {record.number} {finding}"))
        self._steps[record.number] = record
        self._last = max(self._last, record.number)
        self._history.num_computed += record.is_computed

    def _go_back(self, last: int, checkpoint: str | None, cause: str) -> None:
        history = self._history
        history.num_voided[cause] += sum(step.is_computed for step in self._steps.values() if step.number > last)
        self._steps = {number: step for number, step in self._steps.items() if number <= last}
        self._findings = [(number, finding) for number, finding in self._findings if number <= last]
        history.checkpoints = {number: path for number, path in history.checkpoints.items() if number <= last}
        self._last = last
        if not self._steps:
            history.origin = Origin(last, checkpoint)
        elif checkpoint is not None:
            history.checkpoints.setdefault(last, checkpoint)

    def result(self) -> History:
        self._history.steps = [self._steps[number] for number in sorted(self._steps)]
        self._history.findings = [finding for _, finding in self._findings]
        return self._history
