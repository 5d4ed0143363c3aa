"""A step's pipeline schedule, played through pass by pass: what every stage does when, and where it waits.

The order is that of megatron-core's schedules, 1F1B and interleaved (Narayanan et al. 2021, arXiv:2104.04473, section
2.2); each pass starts as soon as its stage is free and what it needs is there.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from launcher.planning.step_time import StepModel


@dataclass(frozen=True, order=True)
class Turn:
    """A micro-batch in a chunk of a stage's layers, in one direction: what a schedule puts in order."""

    chunk: int
    micro_batch: int
    is_forward: bool


@dataclass(frozen=True)
class ChunkSeconds:
    """Of a micro-batch in one chunk."""

    forward: float
    backward: float
    """Without what is repeated."""
    repeated: float = 0.0
    """Of the forward pass, by recomputation, right before the backward pass."""


@dataclass(frozen=True)
class Pass:
    """A turn when it is done."""

    stage: int
    turn: Turn
    start_seconds: float
    repeated_until_seconds: float
    """Until when a forward pass is repeated: the start where none is."""
    end_seconds: float


@dataclass(frozen=True)
class Timeline:
    """All passes of a step: a row per stage, in the order of time."""

    rows: tuple[tuple[Pass, ...], ...]

    @cached_property
    def seconds(self) -> float:
        """From the first pass to the end of the last."""
        return max(row[-1].end_seconds for row in self.rows)

    def idle_seconds(self, stage: int) -> float:
        """What a stage waits for others, or for messages."""
        return self.seconds - sum(each.end_seconds - each.start_seconds for each in self.rows[stage])

    def peak_in_flight(self, stage: int) -> float:
        """Most micro-batches between their forward and backward pass at once; fractions are chunks."""
        held = most = 0
        for each in self.rows[stage]:
            held += 1 if each.turn.is_forward else -1
            most = max(most, held)
        num_chunks = 1 + max(each.turn.chunk for each in self.rows[stage])
        return most / num_chunks


def order(num_stages: int, stage: int, num_chunks: int, num_microbatches: int) -> list[Turn]:
    """Of the passes of a stage.

    First forward passes alone, until the first gradients can be there: p - 1 - stage in 1F1B, and interleaved
    2 (p - 1 - stage) + (v - 1) p; then one forward and one backward in turn, and last the backward passes left.
    Interleaved, p micro-batches go through a chunk before they go through the next; backwards the last chunk is first.
    """
    after, total = num_stages - 1 - stage, num_microbatches * num_chunks
    warm_up = min(total, after if num_chunks == 1 else 2 * after + (num_chunks - 1) * num_stages)
    forward = [
        Turn(chunk, micro_batch, is_forward=True)
        for first in range(0, num_microbatches, num_stages)
        for chunk in range(num_chunks)
        for micro_batch in range(first, min(first + num_stages, num_microbatches))
    ]
    backward = [Turn(num_chunks - 1 - each.chunk, each.micro_batch, is_forward=False) for each in forward]
    steady = chain.from_iterable(zip(forward[warm_up:], backward, strict=False))
    return [*forward[:warm_up], *steady, *backward[total - warm_up :]]


def play(
    chunks: Sequence[Sequence[ChunkSeconds]],
    num_microbatches: int,
    message_seconds: float = 0.0,
    *,
    hides_messages: bool = False,
) -> Timeline:
    """Every stage does its turns in their order, each as soon as it can.

    Args:
        chunks: of each stage.
        hides_messages: a stage goes on while its message is on its way; otherwise it waits until it is sent.
    """
    num_stages, num_chunks = len(chunks), len(chunks[0])
    last = num_stages * num_chunks - 1
    orders = [order(num_stages, stage, num_chunks, num_microbatches) for stage in range(num_stages)]
    rows: list[list[Pass]] = [[] for _ in range(num_stages)]
    free = [0.0] * num_stages
    arrived: dict[tuple[int, int, bool], float] = {}  # by piece of the model, micro-batch, direction
    waiting: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
    ready = list(range(num_stages))
    while ready:
        stage = ready.pop()
        while len(rows[stage]) < len(orders[stage]):
            turn = orders[stage][len(rows[stage])]
            piece = turn.chunk * num_stages + stage
            input_piece, output_piece = (piece - 1, piece + 1) if turn.is_forward else (piece + 1, piece - 1)
            needed = (input_piece, turn.micro_batch, turn.is_forward)
            is_end = not 0 <= input_piece <= last  # the data, or the loss, which its own forward pass has
            if not is_end and needed not in arrived:
                waiting[needed].append(stage)
                break
            start = max(free[stage], 0.0 if is_end else arrived[needed])
            takes = chunks[stage][turn.chunk]
            repeated_until = start + (0.0 if turn.is_forward else takes.repeated)
            end = repeated_until + (takes.forward if turn.is_forward else takes.backward)
            sent = end + (message_seconds if 0 <= output_piece <= last else 0.0)
            done = (piece, turn.micro_batch, turn.is_forward)
            arrived[done] = sent
            free[stage] = end if hides_messages else sent
            rows[stage].append(Pass(stage, turn, start, repeated_until, end))
            ready += waiting.pop(done, [])
    return Timeline(tuple(tuple(row) for row in rows))


def timeline(model: StepModel) -> Timeline:
    """Of a step with the full batch; what replicas exchange and the optimizer come after it."""
    chunks = [
        [ChunkSeconds(each.forward.seconds, each.backward.seconds, each.repeated.seconds) for each in stage]
        for stage in model.chunks
    ]
    num, hides = model.config.num_microbatches, model.practice.hides_pipeline
    return play(chunks, num, model.message_seconds, hides_messages=hides)
