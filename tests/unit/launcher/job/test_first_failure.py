from launcher.job.failures import first_failure
from launcher.node.forked_rank import RankEnd


def test_the_first_to_raise_is_the_cause() -> None:
    ends = [RankEnd(0, 12.5, "raised A"), RankEnd(1, 12.25, "raised B"), RankEnd(2, 13.0, "raised C")]
    assert first_failure(ends).rank == 1


def test_a_death_by_signal_explains_what_others_raised_before_it_was_seen() -> None:
    ends = [RankEnd(0, 12.5, "raised A"), RankEnd(3, 12.75, "was killed by SIGSEGV", by_signal=True)]
    assert first_failure(ends).rank == 3


def test_of_several_deaths_by_signal_the_first_counts() -> None:
    ends = [
        RankEnd(5, 9.0, "was killed by SIGKILL", by_signal=True),
        RankEnd(4, 8.0, "was killed by SIGBUS", by_signal=True),
        RankEnd(0, 7.0, "raised A"),
    ]
    assert first_failure(ends).rank == 4
