"""What is said of a run that has fallen silent."""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.node.stacks import Frame, ProcessState, RankReport
from launcher.supervise.hang import Verdict, silence_limit, verdict
from trainer.heartbeat import PHASES, Beat, Phase

NODES = {rank: "ab"[rank // 4] for rank in range(8)}
NOON = time.mktime((2026, 3, 14, 12, 0, 0, 0, 0, -1))
DISTRIBUTED = "/lib/torch/distributed/distributed_c10d.py"


def report(
    rank: int,
    phase: Phase = "computing",
    collective: str | None = None,
    process: ProcessState = "running",
    problem: str | None = None,
    step: int = 12,
    began: float = 123.0,
) -> RankReport:
    """`began` in seconds since noon."""
    beat = Beat(1000 + rank, 5, 7, step, step, phase, NOON + began, 60.0, {}, {})
    frames = [Frame("/app/trainer/loop.py", 9, "train")]
    if collective:
        frames.insert(0, Frame(DISTRIBUTED, 3, collective))
    stack = tuple(frames) if process == "running" and problem is None else None
    return RankReport(rank, beat, process, stack, problem)


def waiting(ranks: Sequence[int], collective: str = "all_reduce", step: int = 12) -> list[RankReport]:
    return [report(rank, collective=collective, step=step) for rank in ranks]


def others(*odd: int) -> list[int]:
    return [rank for rank in range(8) if rank not in odd]


STOPPED, DEAD = report(2, process="stopped"), report(2, process="gone")
DEAF = report(2, problem="does not answer within 5 s")
LOADING = [report(rank, "loading data") for rank in range(8)]


@pytest.mark.parametrize(
    ("reports", "line", "suspects"),
    [
        (
            [LOADING[5], *waiting(others(5))],
            "rank 5 on node b is in data loading; the other 7 wait in all_reduce since 12:02:03",
            (5,),
        ),
        (
            [LOADING[1], LOADING[2], LOADING[6], *waiting(others(1, 2, 6), "broadcast")],
            "ranks 1 and 2 on node a and 6 on node b are in data loading; the other 5 wait in broadcast since 12:02:03",
            (1, 2, 6),
        ),
        (
            [*LOADING[4:], *waiting(range(4))],
            "ranks 4-7 on node b are in data loading; the other 4 wait in all_reduce since 12:02:03",
            (4, 5, 6, 7),
        ),
        (
            [*LOADING[:7], *waiting([7])],
            "ranks 0-3 on node a and 4-6 on node b are in data loading; the other waits in all_reduce since 12:02:03",
            (0, 1, 2, 3, 4, 5, 6),
        ),
        (
            [STOPPED, *waiting(others(2))],
            "rank 2 on node a is stopped (SIGSTOP); the other 7 wait in all_reduce since 12:02:03",
            (2,),
        ),
        (
            [STOPPED, LOADING[5], *waiting(others(2, 5))],
            "rank 2 on node a is stopped (SIGSTOP); rank 5 on node b is in data loading; "
            "the other 6 wait in all_reduce since 12:02:03",
            (2, 5),
        ),
        (
            [DEAD, *waiting(others(2))],
            "rank 2 on node a is dead; the other 7 wait in all_reduce since 12:02:03",
            (2,),
        ),
        (
            [DEAF, *waiting(others(2))],
            "rank 2 on node a is computing and does not answer within 5 s; "
            "the other 7 wait in all_reduce since 12:02:03",
            (2,),
        ),
        (
            [RankReport(3), *waiting(others(3), "init_process_group")],
            "rank 3 on node a has given no sign of life; the other 7 wait in init_process_group since 12:02:03",
            (3,),
        ),
        (waiting(range(8)), "all 8 ranks wait in all_reduce since 12:02:03", ()),
        ([report(0)], "the only rank is computing since 12:02:03", ()),
        (LOADING, "all 8 ranks are in data loading since 12:02:03", ()),
        (
            [*waiting(range(3)), *waiting(range(3, 8), "barrier")],
            "ranks 0-2 on node a wait in all_reduce; ranks 3 on node a and 4-7 on node b wait in barrier; "
            "since 12:02:03",
            (),
        ),
        (
            [*waiting([0], "recv_forward", step=11), *waiting(range(1, 8))],
            "rank 0 on node a waits in recv_forward after step 11; the other 7 wait in all_reduce after step 12 "
            "since 12:02:03",
            (0,),
        ),
        (
            [report(rank, "saving" if rank == 6 else "computing") for rank in range(8)],
            "rank 6 on node b is saving; the other 7 are computing since 12:02:03",
            (6,),
        ),
        ([RankReport(rank) for rank in range(8)], "no rank has given a sign of life", ()),
        ([], "no rank has given a sign of life", ()),
    ],
)
def test_the_verdict_names_who_is_waited_for(reports: list[RankReport], line: str, suspects: tuple[int, ...]) -> None:
    assert verdict(reports, NODES, NOON + 600) == Verdict(line, suspects)


def test_the_date_is_told_of_another_day() -> None:
    line = verdict(waiting(range(2)), {}, NOON + 13 * 3600).line
    assert line == "all 2 ranks wait in all_reduce since 2026-03-14 12:02:03"


def test_since_is_when_the_last_of_the_others_came() -> None:
    reports = [report(rank, collective="all_reduce", began=60.0 * rank) for rank in (0, 1, 2)]
    late = report(3, "loading data", began=3000)
    assert verdict([*reports, late], {}, NOON).line == (
        "rank 3 is in data loading; the other 3 wait in all_reduce since 12:02:00"
    )


def test_one_process_that_was_stopped_is_named_whatever_else_is_known() -> None:
    alone = verdict([STOPPED], NODES, NOON)
    assert alone == Verdict("rank 2 on node a is stopped (SIGSTOP)", (2,))
    assert verdict([STOPPED, RankReport(5)], NODES, NOON) == Verdict(
        "rank 2 on node a is stopped (SIGSTOP); rank 5 on node b has given no sign of life", (2, 5)
    )


@st.composite
def any_reports(draw: st.DrawFn) -> list[RankReport]:
    ranks = draw(st.lists(st.integers(0, 40), unique=True, max_size=12))
    processes: list[ProcessState] = ["running", "running", "running", "stopped", "zombie", "gone"]
    found = []
    for rank in ranks:
        if draw(st.integers(0, 9)) == 0:
            found.append(RankReport(rank, problem="has given no sign of life"))
            continue
        found.append(
            report(
                rank,
                draw(st.sampled_from(PHASES)),
                draw(st.sampled_from([None, "all_reduce", "barrier"])),
                draw(st.sampled_from(processes)),
                draw(st.sampled_from([None, None, "does not answer within 5 s"])),
                draw(st.integers(11, 13)),
            )
        )
    return found


@given(any_reports(), st.randoms(use_true_random=False))
def test_whatever_is_known_the_verdict_is_one_line_about_these_ranks(
    reports: list[RankReport], shuffle: object
) -> None:
    found = verdict(reports, NODES, NOON)
    assert found.line and "\n" not in found.line
    assert set(found.suspects) <= {each.rank for each in reports} and list(found.suspects) == sorted(found.suspects)
    shuffled = list(reports)
    shuffle.shuffle(shuffled)  # type: ignore[attr-defined]
    assert verdict(shuffled, NODES, NOON) == found


@given(st.integers(2, 40), st.data())
def test_whoever_does_not_wait_is_the_suspect(num_ranks: int, data: st.DataObject) -> None:
    odd = data.draw(st.sets(st.integers(0, num_ranks - 1), min_size=1, max_size=num_ranks - 1))
    doing = st.sampled_from(["stopped", "gone", *PHASES])
    reports = []
    for rank in range(num_ranks):
        if rank not in odd:
            reports.append(report(rank, collective="all_reduce"))
        elif (does := data.draw(doing)) in ("stopped", "gone"):
            reports.append(report(rank, process=does))  # type: ignore[arg-type]
        else:
            reports.append(report(rank, does))  # type: ignore[arg-type]
    found = verdict(reports, {}, NOON)
    assert found.suspects == tuple(sorted(odd))
    number = num_ranks - len(odd)
    assert f"the other {number} wait in all_reduce" in found.line or (number == 1 and "the other waits" in found.line)


def test_a_limit_follows_the_pace_of_the_run() -> None:
    assert silence_limit(None, 10, 60) == 60
    assert silence_limit(2.0, 10, 60) == 60
    assert silence_limit(30.0, 10, 60) == 300


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1, 100), st.floats(0, 1e4))
def test_a_slower_run_may_be_silent_for_longer(one: float, other: float, factor: float, least: float) -> None:
    shorter, longer = (silence_limit(seconds, factor, least) for seconds in sorted([one, other]))
    assert least <= shorter <= longer
