"""What the position in the data decides: the batch size and the learning rate, as functions of tokens seen."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from trainer.config import RunConfig


@dataclass(frozen=True)
class Step:
    """One step of a run, and which samples it is made of."""

    number: int
    """1-based, as in events and in the names of checkpoints."""
    first_sample: int
    """Position of its first sequence in the data order: those that all steps before it have consumed."""
    batch_size: int
    """Sequences over all replicas."""
    tokens_after: int
    """Tokens that the run has consumed once this step is done."""


@dataclass(frozen=True)
class _Phase:
    """Steps in a row with the same batch size."""

    steps_before: int
    first_sample: int
    batch_size: int


class Schedule:
    """The steps of a run. The same in every layout; as large as the ramp has batch sizes, however long the run."""

    def __init__(self, config: RunConfig) -> None:
        self._seq_length = config.model.seq_length
        self._phases = tuple(_phases(config))
        num_samples = -(-config.train.total_tokens // self._seq_length)
        last = self._phases[max(0, bisect_right(self._phases, num_samples - 1, key=attrgetter("first_sample")) - 1)]
        self.num_steps = last.steps_before + -(-(num_samples - last.first_sample) // last.batch_size)
        """Steps in the run: train.total_tokens rounded up to whole steps."""

    def step_after(self, steps_done: int) -> Step:
        """The step that begins when `steps_done` steps are done; also beyond the end of the run."""
        index = bisect_right(self._phases, steps_done, key=attrgetter("steps_before")) - 1
        phase = self._phases[index]
        first_sample = phase.first_sample + (steps_done - phase.steps_before) * phase.batch_size
        after = (first_sample + phase.batch_size) * self._seq_length
        return Step(steps_done + 1, first_sample, phase.batch_size, after)

    def batches(self) -> Iterator[tuple[int, int]]:
        """(batch size, number of steps in a row that have it), over the run."""
        ends = [phase.steps_before for phase in self._phases[1:]] + [self.num_steps]
        for phase, end in zip(self._phases, ends, strict=True):
            if phase.steps_before < self.num_steps:
                yield phase.batch_size, min(end, self.num_steps) - phase.steps_before

    def consumed_samples(self, steps_done: int) -> int:
        """Sequences that the first `steps_done` steps consume, all replicas together."""
        return self.step_after(steps_done).first_sample

    def consumed_tokens(self, steps_done: int) -> int:
        return self.consumed_samples(steps_done) * self._seq_length


def _phases(config: RunConfig) -> Iterator[_Phase]:
    """Every step has the batch size that the ramp prescribes for the samples consumed before it."""
    steps, samples = 0, 0
    batch_size = config.train.ramp_start_batch_size or config.train.global_batch_size
    for reached_at, next_size in _increments(config):
        num_steps = max(0, -(-(reached_at - samples) // batch_size))
        if num_steps:
            yield _Phase(steps, samples, batch_size)
        steps, samples, batch_size = steps + num_steps, samples + num_steps * batch_size, next_size
    yield _Phase(steps, samples, batch_size)


def _increments(config: RunConfig) -> Iterator[tuple[int, int]]:
    """(consumed samples, batch size from there on), after the first batch size; in whole numbers, so exact.

    With start size a, full size b and a ramp of r samples, the size after c samples is a + (b - a) c / r rounded down
    to a multiple of a, and b from r on (Brown et al. 2020, appendix B, has a = 32k tokens and r = 4-12B tokens).
    """
    start, full = config.train.ramp_start_batch_size, config.train.global_batch_size
    if start is None:
        return
    tokens, seq_length = config.train.ramp_tokens, config.model.seq_length
    for size in range(2 * start, full, start):
        yield -(-(size - start) * tokens // ((full - start) * seq_length)), size
    yield -(-tokens // seq_length), full


def learning_rate(config: RunConfig, tokens: int) -> float:
    """Linear warm-up from zero, then a cosine down to `min_lr_fraction` of the peak, then constant.

    The shape is GPT-3's (Brown et al. 2020, appendix B). `tokens` counts those seen once the step that uses this rate
    is done, so that the first step already moves.
    """
    optimizer = config.optimizer
    decay_tokens = config.train.total_tokens if optimizer.decay_tokens is None else optimizer.decay_tokens
    if tokens < optimizer.warmup_tokens:
        return optimizer.lr * tokens / optimizer.warmup_tokens
    if tokens >= decay_tokens:
        return optimizer.lr * optimizer.min_lr_fraction
    progress = (tokens - optimizer.warmup_tokens) / (decay_tokens - optimizer.warmup_tokens)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.lr * (optimizer.min_lr_fraction + (1 - optimizer.min_lr_fraction) * cosine)
