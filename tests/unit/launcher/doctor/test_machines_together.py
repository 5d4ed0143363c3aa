"""What is compared between machines: clocks, versions, the folder they share; and whether they are enough."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from launcher.doctor.checks import clock, layout, shared_folder, versions
from launcher.doctor.checks.clock import Clock
from launcher.doctor.cluster import examine_cluster, names, usable
from launcher.doctor.guard import Check, outcome
from launcher.doctor.machine import Subject
from launcher.placement import Machine
from trainer.config_file import from_tree


@pytest.mark.parametrize(
    ("ahead_seconds", "verdict"), [(0.001, "ok"), (-0.4, "ok"), (0.6, "warn"), (-4.0, "warn"), (-6.0, "fail")]
)
def test_clocks(ahead_seconds: float, verdict: str) -> None:
    assert clock.judge(Clock(ahead_seconds, uncertain_seconds=0.001)).verdict == verdict


def test_a_clock_is_off_only_as_far_as_is_certain() -> None:
    assert clock.judge(Clock(5.2, uncertain_seconds=0.4)).verdict == "warn"
    found = clock.judge(Clock(-6.0, uncertain_seconds=0.002))
    assert found.measured == "6,000.00 ms behind this machine's, within 2.00 ms; more than 5 s"
    assert found.fix == "have chrony or ntpd set its clock"


def test_the_quickest_answer_of_a_clock_counts() -> None:
    """The way there takes 1 s and the way back 3 s, but for one answer that takes 0.1 s each way."""
    now, number = 100.0, count()

    def ask() -> float:
        nonlocal now
        is_quick = next(number) == 4
        now += 0.1 if is_quick else 1.0
        answer = now + 7.0
        now += 0.1 if is_quick else 3.0
        return answer

    found = clock.measure(ask, lambda: now)
    assert found.ahead_seconds == pytest.approx(7.0) and found.uncertain_seconds == pytest.approx(0.1)


ONE = {"python": "3.11.7", "torch": "2.13.0", "code": "1f0c9a52"}


def test_versions_must_agree() -> None:
    assert versions.judge({"a": ONE}).verdict == "skipped"
    assert versions.judge({"a": ONE, "b": ONE}).verdict == "ok"
    found = versions.judge({"a": ONE, "b": ONE, "c": ONE | {"torch": "2.12.0", "code": "0"}})
    assert found.verdict == "fail"
    assert found.measured == "torch 2.13.0 on a, b; torch 2.12.0 on c (and code)"


def test_code_is_told_apart_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "a.py").write_text("a")
    before = versions.code_hash(tmp_path)
    assert before == versions.code_hash(tmp_path)
    (tmp_path / "trainer" / "a.py").write_text("b")
    assert versions.code_hash(tmp_path) != before
    assert versions.measure()["python"].startswith("3.")


def test_machines_must_see_what_is_written_to_the_runs_folder(tmp_path: Path) -> None:
    with shared_folder.marker(tmp_path / "runs" / "a") as path:
        assert path.exists() and path.parent == tmp_path
    assert not list(tmp_path.iterdir())
    assert shared_folder.judge(tmp_path, {"a": True, "b": True}).verdict == "ok"
    found = shared_folder.judge(tmp_path, {"a": True, "b": False})
    assert found.verdict == "fail" and found.measured == f"a file made in {tmp_path} is not seen on b"


def machines(number: int, address: str = "10.0.0.1", **resources: float) -> Iterator[Machine]:
    for i in range(number):
        yield Machine({"CPU": 8.0, "memory": 64e9, **resources}, {"kind": "big"}, address, f"{i:08x}ffff")


def test_machines_must_be_enough_for_the_run() -> None:
    config = from_tree({"parallel": {"data": 2}, "launch": {"nodes": 2, "device": "cpu"}})

    def found(number: int) -> tuple[str, str]:
        finding = outcome(Check("layout", 10.0, lambda: layout.judge(config, list(machines(number))), ""))
        return finding.verdict, finding.fix

    assert found(2)[0] == "ok"
    assert found(1) == ("fail", "set launch.nodes to 1, or add machines")
    assert layout.judge(None, []).verdict == "skipped"


def test_machines_are_those_on_which_agents_may_be_placed() -> None:
    big, head = list(machines(2)), Machine({"CPU": 0.0}, {"kind": "big"})
    assert usable(None, [*big, head]) == big
    assert usable(from_tree({"launch": {"labels": {"kind": "small"}}}), big) == []


def test_machines_of_one_address_are_told_apart() -> None:
    assert names([*machines(2), *machines(1, "10.0.0.2")]) == ["10.0.0.1/00000000", "10.0.0.1/00000001", "10.0.0.2"]


def test_a_cluster_that_is_not_there_fails() -> None:
    (found,) = examine_cluster(Subject(None, Path("/")), "127.0.0.1:1")
    assert (found.check, found.verdict, found.fix) == ("cluster", "fail", "start one, or leave --ray out")
    assert "nothing answers at" in found.measured
