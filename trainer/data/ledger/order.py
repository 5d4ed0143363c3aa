"""Whether the steps of a history follow each other, each with the samples that the schedule gives it."""

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config import RunConfig
from trainer.data.ledger.history import History, StepRecord
from trainer.data.ledger.report import Stretch, span
from trainer.schedule import Schedule, Step


@dataclass(frozen=True, slots=True)
class PlacedStep:
    """A step with the samples that it used: those that it records, or, where it records none, those of the schedule."""

    record: StepRecord
    first_sample: int
    num_samples: int

    @property
    def end(self) -> int:
        """The position after its last sample."""
        return self.first_sample + self.num_samples


def place_steps(history: History, config: RunConfig, findings: list[str]) -> Iterator[PlacedStep]:
    """The steps in order; `findings` hears of those that do not begin where the one before ended, or as planned."""
    schedule = Schedule(config)
    done, end = history.origin.step, schedule.consumed_samples(history.origin.step)
    for record in history.steps:
        planned = schedule.step_after(record.number - 1)
        if record.number > done + 1:
            missing = span("sample", schedule.consumed_samples(done), planned.first_sample)
            findings.append(f"no event records {span('step', done + 1, record.number)}, with {missing}")
            end = planned.first_sample
        step, finding = _place(record, planned, end, config.train.global_batch_size)
        wanted_tokens = step.end * config.model.seq_length
        if finding is None and record.tokens_after not in (None, wanted_tokens):
            finding = f"states {record.tokens_after} tokens consumed, and its samples end at {wanted_tokens}"
        if finding is not None:
            findings.append(f"step {record.number} {finding}")
        done, end = record.number, step.end
        yield step


def _place(record: StepRecord, planned: Step, end: int, largest_batch: int) -> tuple[PlacedStep, str | None]:
    """The step's samples, and what is wrong with them; `end` is where the step before ended."""
    as_planned = PlacedStep(record, planned.first_sample, planned.batch_size)
    if record.first_sample is None or record.num_samples is None:
        return as_planned, None
    of_schedule = f"the schedule gives it {planned.first_sample} to {planned.first_sample + planned.batch_size - 1}"
    if record.first_sample < 0 or not 0 < record.num_samples <= largest_batch:
        return as_planned, f"records {record.num_samples} samples from {record.first_sample} on, and {of_schedule}"
    step = PlacedStep(record, record.first_sample, record.num_samples)
    if step == as_planned and step.first_sample == end:
        return step, None
    if step.first_sample > end:
        return step, f"has {record.samples} and leaves out {span('sample', end, step.first_sample)} ({of_schedule})"
    if step.first_sample < end:
        again = span("sample", step.first_sample, min(end, step.end))
        return step, f"has {record.samples}, of which the steps before had {again} ({of_schedule})"
    return step, f"has {record.samples}, and {of_schedule}"


def extend(stretches: list[Stretch], step: PlacedStep) -> None:
    """Add a step to the last stretch if it goes on like it, else begin another."""
    record, last = step.record, stretches[-1] if stretches else None
    if (
        last is not None
        and (record.number, step.first_sample) == (last.last_step + 1, last.last_sample + 1)
        and (step.num_samples, record.reason) == (last.batch_size, last.reason)
    ):
        last.last_step, last.last_sample = record.number, step.end - 1
        return
    stretches.append(
        Stretch(record.number, record.number, step.first_sample, step.end - 1, step.num_samples, record.reason)
    )
