"""Open files and processes."""

import resource

import pytest

from launcher.doctor.checks.limits import Limits, judge_files, judge_processes, measure
from trainer.config import RunConfig
from trainer.config_file import from_tree


def config(ranks: int) -> RunConfig:
    return from_tree({"parallel": {"data": ranks}})


@pytest.mark.parametrize(
    ("files", "ranks", "verdict"),
    [
        (1023, 1, "fail"),
        (1024, 4, "warn"),
        (1024, 128, "fail"),  # 256 + 8 x 128
        (65_535, 128, "warn"),
        (65_536, 128, "ok"),
        (None, 128, "ok"),
    ],
)
def test_open_files_by_the_number_of_ranks(files: int | None, ranks: int, verdict: str) -> None:
    assert judge_files(Limits(files, 2**20, None), config(ranks)).verdict == verdict


def test_the_fix_for_open_files_is_one_that_the_user_may_do() -> None:
    found = judge_files(Limits(1000, 2**20, None), None)
    assert found.measured == "a process may have 1,000, and 1 rank(s) want 1,024"
    assert found.fix.startswith("ulimit -n 65536 before")
    assert judge_files(Limits(1000, 4096, None), None).fix.startswith("raise nofile in /etc/security/limits.conf")


@pytest.mark.parametrize(
    ("processes", "ranks", "verdict"),
    [(512, 1, "fail"), (1500, 8, "fail"), (1536, 8, "warn"), (16_384, 8, "ok"), (None, 8, "ok")],
)
def test_processes_by_the_number_of_ranks(processes: int | None, ranks: int, verdict: str) -> None:
    assert judge_processes(Limits(None, None, processes), config(ranks)).verdict == verdict


def test_limits_of_this_process() -> None:
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = measure()
    assert (found.files, found.most_files) == (files, most_files)
    assert found.processes is None or found.processes > 0
