"""Asking processes where they are."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.node.stacks import Frame, RankReport, collect, parse
from trainer.heartbeat import Heartbeat, answer_with_stacks, beat_path, read, stack_path

DUMP = """\
Thread 0x00007f18ab7fe6c0 (most recent call first):
  File "/lib/concurrent/futures/thread.py", line 81 in _worker
  File "/lib/threading.py", line 1002 in _bootstrap

Current thread 0x00007f191b466b80 (most recent call first):
  File "/app/trainer/parallel.py", line 51 in timed_wait
  File "/lib/torch/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "/lib/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/app/trainer/loop.py", line ??? in train
  File "<string>", line 1 in <module>
"""
MAIN = 0x7F191B466B80


def test_a_dump_is_read_once_it_is_whole() -> None:
    assert parse(DUMP, MAIN) == (
        Frame("/app/trainer/parallel.py", 51, "timed_wait"),
        Frame("/lib/torch/distributed/distributed_c10d.py", 3252, "all_reduce"),
        Frame("/lib/torch/distributed/c10d_logger.py", 83, "wrapper"),
        Frame("/app/trainer/loop.py", 0, "train"),
        Frame("<string>", 1, "<module>"),
    )
    for length in range(len(DUMP) - 1):
        assert parse(DUMP[:length], MAIN) is None
    assert parse(DUMP, MAIN + 1) is None


def test_the_stack_of_one_thread_has_no_name() -> None:
    one = f"Stack (most recent call first):{DUMP.partition(f'{MAIN:x} (most recent call first):')[2]}"
    assert len(parse(one, MAIN) or ()) == 5 and parse(one, MAIN) == parse(DUMP, MAIN) == parse(one, 1)


def test_a_stack_of_too_many_frames_ends_where_it_was_cut() -> None:
    cut = DUMP.replace('  File "<string>", line 1 in <module>', "  ...")
    assert [frame.function for frame in parse(cut, MAIN) or ()] == ["timed_wait", "all_reduce", "wrapper", "train"]


def test_a_thread_that_is_being_started_is_not_taken_for_the_one_that_starts_it() -> None:
    starting = f"Thread 0x{MAIN:016x} (most recent call first):\n  <no Python frame>\n\n"
    assert parse(starting, MAIN) is None
    assert parse(starting + DUMP, MAIN) == parse(DUMP, MAIN)


def test_of_several_dumps_the_last_whole_one_counts() -> None:
    later = DUMP.replace("all_reduce", "barrier")
    assert parse(DUMP + later, MAIN) == parse(later, MAIN)
    assert parse(DUMP + later[:-20], MAIN) == parse(DUMP, MAIN)


@pytest.mark.parametrize(
    ("frames", "collective"),
    [
        ([("torch/distributed/distributed_c10d.py", "barrier")], "barrier"),
        ([("trainer/parallel.py", "timed_wait"), ("torch/distributed/distributed_c10d.py", "broadcast")], "broadcast"),
        (
            [
                ("torch/distributed/distributed_c10d.py", "_store_based_barrier"),
                ("torch/distributed/distributed_c10d.py", "init_process_group"),
            ],
            "init_process_group",
        ),
        (
            [
                ("trainer/parallel.py", "timed_wait"),
                ("megatron/core/pipeline_parallel/p2p_communication.py", "_communicate"),
                ("megatron/core/pipeline_parallel/p2p_communication.py", "recv_forward"),
                ("megatron/core/pipeline_parallel/schedules.py", "forward_backward_pipelining"),
            ],
            "recv_forward",
        ),
        ([("trainer/parallel.py", "timed_wait"), ("deepspeed/runtime/zero/stage3.py", "step")], "wait"),
        (
            [("trainer/pipeline.py", "sum_over_replicas"), ("trainer/engine/engine.py", "train_step")],
            "sum_over_replicas",
        ),
        ([("trainer/loop.py", "record"), ("trainer/pipeline.py", "sum_over_replicas")], None),
        ([("torch/distributed/distributed_c10d.py", "get_world_size"), ("trainer/loop.py", "train")], None),
        ([("trainer/data/batches.py", "micro_batches")], None),
        ([], None),
    ],
)
def test_the_collective_is_the_innermost_public_function_that_waits(
    frames: list[tuple[str, str]], collective: str | None
) -> None:
    stack = tuple(Frame(f"/lib/{file}", 1, function) for file, function in frames)
    assert RankReport(0, stack=stack).collective == collective


def test_a_rank_without_a_stack_is_in_no_known_collective() -> None:
    assert RankReport(0).collective is None


# ------------------------------------------------------------------------------------------------------ real processes


def test_a_process_that_waits_in_c_tells_where(tmp_path: Path) -> None:
    ears, mouth = os.pipe()
    with a_rank(tmp_path, lambda: os.read(ears, 1)):
        for _ in range(20):
            (report,) = collect(tmp_path, [0], 20)
            assert report.stack is not None and report.process == "running" and report.problem is None
            assert report.stack[0].file == __file__ and report.stack[0].function == "<lambda>"
        assert report.beat == read_again(tmp_path, report)
        assert stack_path(tmp_path, 0).read_text().count("most recent call first") == 1
        (wordy,) = collect(tmp_path, [0], 20, all_threads=True)
        assert wordy.stack == report.stack and stack_path(tmp_path, 0).read_text().startswith("Current thread")
    os.close(ears)
    os.close(mouth)


def test_the_signal_does_not_cut_a_wait_short(tmp_path: Path) -> None:
    ears, mouth = os.pipe()
    heard, said = os.pipe()

    def waits() -> None:
        os.write(said, os.read(ears, 1))
        signal.pause()

    with a_rank(tmp_path, waits):
        assert collect(tmp_path, [0], 20)[0].stack
        os.write(mouth, b"!")
        assert os.read(heard, 1) == b"!"
    for descriptor in (ears, mouth, heard, said):
        os.close(descriptor)


@pytest.mark.parametrize("all_threads", [False, True])
def test_of_many_threads_the_main_one_is_told(all_threads: bool, tmp_path: Path) -> None:
    def spins() -> None:
        for _ in range(3):
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        while True:
            signal.pause()

    with a_rank(tmp_path, spins):
        deadline = time.monotonic() + 20
        while (stack := collect(tmp_path, [0], 20)[0].stack) is None or stack[0].function != "spins":
            assert time.monotonic() < deadline
        (report,) = collect(tmp_path, [0], 20, all_threads=all_threads)
        assert report.stack is not None and report.stack[0].function == "spins"
        num_stacks = stack_path(tmp_path, 0).read_text().count("most recent call first")
        assert num_stacks == (4 if all_threads else 1)


def test_whoever_cannot_answer_is_not_waited_for(tmp_path: Path) -> None:
    with a_rank(tmp_path, signal.pause) as pid:
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        began = time.monotonic()
        stopped, unknown = collect(tmp_path, [0, 1], 60)
        assert (stopped.process, stopped.stack, stopped.problem) == ("stopped", None, "is stopped")
        assert (unknown.process, unknown.beat, unknown.problem) == ("unknown", None, "has given no sign of life")
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        (zombie,) = collect(tmp_path, [0], 60)
        assert (zombie.process, zombie.stack, zombie.problem) == ("zombie", None, "has ended")
        assert time.monotonic() - began < 30
    (gone,) = collect(tmp_path, [0], 60)
    assert (gone.process, gone.stack, gone.problem) == ("gone", None, "is gone")


def test_a_rank_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    def is_deaf() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        block()

    with a_rank(tmp_path, is_deaf):
        deadline = time.monotonic() + 20
        while (report := collect(tmp_path, [0], 0.05)[0]).stack is not None:  # before it has closed its ears
            assert time.monotonic() < deadline
        assert (report.process, report.problem) == ("running", "does not answer within 0.05 s")


def test_a_process_that_would_die_of_the_signal_is_not_sent_it(tmp_path: Path) -> None:
    with a_rank(tmp_path, block, answers=False) as pid:
        (report,) = collect(tmp_path, [0], 20)
        assert (report.process, report.problem) == ("running", "does not tell its stacks")
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)


def test_another_process_with_the_pid_is_left_alone(tmp_path: Path) -> None:
    with a_rank(tmp_path, block) as pid:
        heartbeat = Heartbeat(beat_path(tmp_path, 0))
        heartbeat._process = (pid, 1, 1)  # as if the rank had begun long ago and the kernel had used its pid again
        heartbeat.step_done(1)
        assert collect(tmp_path, [0], 20)[0].process == "gone"
        assert stack_path(tmp_path, 0).read_bytes() == b""


def block() -> None:
    while True:
        signal.pause()


def read_again(folder: Path, report: RankReport) -> object:
    assert report.beat is not None
    beat = read(beat_path(folder, report.rank))
    assert beat is not None
    return type(beat)(**{**vars(beat), "silent_seconds": report.beat.silent_seconds})


@contextmanager
def a_rank(folder: Path, act: Callable[[], object], answers: bool = True) -> Iterator[int]:
    """A process that is known as rank 0; it is killed at the end."""
    sys.stdout.flush()
    beat_path(folder, 0).unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            if answers:
                answer_with_stacks(stack_path(folder, 0))
            Heartbeat(beat_path(folder, 0))
            act()
        finally:
            os._exit(1)
    try:
        deadline = time.monotonic() + 20
        while read(beat_path(folder, 0)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
