"""A schedule played through, against closed forms of its length and of the micro-batches in flight."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.planning.cluster import load
from launcher.planning.step_time import StepModel
from launcher.planning.timeline import ChunkSeconds, Timeline, order, play, timeline
from trainer import plan
from trainer.config import ParallelConfig, RunConfig
from trainer.config_file import from_tree

H100 = load("h100")
FASTEST_LINKS = H100.model_copy(
    update={
        "link_bytes_per_second": 1e30,
        "network_bytes_per_second": 1e30,
        "link_latency_seconds": 0.0,
        "network_latency_seconds": 0.0,
    }
)
LAYOUTS = st.tuples(st.integers(2, 6), st.integers(1, 4), st.integers(1, 5))  # stages, chunks, groups of micro-batches


def equal(num_stages: int, num_chunks: int, num: int, *, repeated: float = 0.0) -> Timeline:
    """A stage takes 1 forward, 2 backward for all its chunks."""
    chunk = ChunkSeconds(1 / num_chunks, 2 / num_chunks, repeated / num_chunks)
    return play([[chunk] * num_chunks] * num_stages, num)


def config_of(preset: str, num: int, **parallel: int) -> RunConfig:
    train = {"global_batch_size": num, "ramp_start_batch_size": None, "ramp_tokens": 0}
    return from_tree({"preset": preset, "launch": {"device": "cuda"}, "train": train, "parallel": parallel})


@settings(max_examples=20)
@given(layout=LAYOUTS, recomputes=st.booleans())
def test_equal_stages_wait_as_long_as_published(layout: tuple[int, int, int], recomputes: bool) -> None:
    """(m + (p - 1) / v) (f + b), Narayanan et al. 2021, section 2.2; every stage waits for (p - 1) / v of these."""
    num_stages, num_chunks, groups = layout
    num, one = groups * num_stages, 4.0 if recomputes else 3.0
    times = equal(num_stages, num_chunks, num, repeated=float(recomputes))
    bubble = (num_stages - 1) / num_chunks * one
    assert times.seconds == pytest.approx(num * one + bubble)
    assert [times.idle_seconds(stage) for stage in range(num_stages)] == pytest.approx([bubble] * num_stages)


@settings(max_examples=20)
@given(layout=LAYOUTS)
def test_micro_batches_in_flight_are_those_that_memory_is_planned_for(layout: tuple[int, int, int]) -> None:
    num_stages, num_chunks, groups = layout
    times = equal(num_stages, num_chunks, groups * num_stages)
    parallel = ParallelConfig(pipeline=num_stages, virtual_pipeline=num_chunks)
    for stage in range(num_stages):
        planned = plan.microbatches_in_flight(parallel, groups * num_stages, stage)
        assert times.peak_in_flight(stage) == pytest.approx(planned)


@settings(max_examples=20)
@given(layout=LAYOUTS, message=st.sampled_from([0.0, 0.25]))
def test_nothing_starts_before_its_input_is_there(layout: tuple[int, int, int], message: float) -> None:
    num_stages, num_chunks, groups = layout
    num, last = groups * num_stages, num_stages * num_chunks - 1
    times = play([[ChunkSeconds(1.0, 2.0)] * num_chunks] * num_stages, num, message)
    passes = {(each.turn, each.stage): each for row in times.rows for each in row}
    assert len(passes) == 2 * num * num_chunks * num_stages
    pieces = {(t.chunk * num_stages + s, t.micro_batch, t.is_forward): each for (t, s), each in passes.items()}
    for (piece, micro_batch, is_forward), each in pieces.items():
        if is_forward and piece > 0:
            assert each.start_seconds >= pieces[piece - 1, micro_batch, True].end_seconds + message
        if not is_forward:
            assert each.start_seconds >= pieces[piece, micro_batch, True].end_seconds
            if piece < last:
                assert each.start_seconds >= pieces[piece + 1, micro_batch, False].end_seconds + message
    for row in times.rows:
        assert all(before.end_seconds <= after.start_seconds for before, after in pairwise(row))


@pytest.mark.parametrize(
    ("preset", "pipeline", "chunks", "num", "limit"),
    [
        ("gpt3_175b", 2, 1, 2, 1e-9),
        ("gpt3_175b", 4, 1, 9, 1e-9),
        ("gpt3_175b", 16, 1, 64, 1e-9),
        ("gpt2_xl", 16, 1, 16, 1e-9),  # the last stage takes 1.9 times as long as others
        ("llama3_8b", 16, 1, 32, 1e-9),
        ("gpt3_175b", 16, 6, 64, 0.02),
        ("llama3_8b", 8, 4, 32, 0.002),
        ("llama3_8b", 16, 2, 32, 0.002),
        ("gpt2_xl", 8, 6, 32, 0.002),
    ],
)
def test_the_closed_form_of_a_step_agrees_with_stages_as_they_are(
    preset: str, pipeline: int, chunks: int, num: int, limit: float
) -> None:
    """Exact in 1F1B however unequal the stages; interleaved it is short by what the output layer adds to one chunk."""
    model = StepModel(config_of(preset, num, pipeline=pipeline, virtual_pipeline=chunks), FASTEST_LINKS)
    step, played = model.step(), timeline(model).seconds - 2 * num * chunks * model.message_seconds
    closed = sum((step.matrix, step.attention, step.memory_bound, step.recomputation, step.tensor, step.bubble))
    assert model.message_seconds < 1e-5
    assert closed == pytest.approx(played, rel=limit, abs=4 * pipeline * model.message_seconds * chunks)


def test_messages_delay_a_step_by_no_more_than_planned() -> None:
    """The last stage sends but one way, so that the plan, which counts both for all, is above by up to 2 %."""
    model = StepModel(config_of("llama3_8b", 32, pipeline=8, virtual_pipeline=2), H100)
    step, played = model.step(), timeline(model).seconds
    closed = step.matrix + step.attention + step.memory_bound + step.bubble + step.pipeline
    assert played < closed < 1.02 * played


def test_without_a_pipeline_passes_alternate() -> None:
    assert [turn.is_forward for turn in order(1, 0, 1, 3)] == [True, False] * 3
    assert equal(1, 1, 3).seconds == 9.0
