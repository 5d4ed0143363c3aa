"""`broadgauge plan`: one screen for a person, JSON for machines, exit code 1 where a run does not fit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli.main import main
from launcher.planning.cluster import FOLDER, load
from launcher.planning.planner import make_plan
from launcher.report import planning
from trainer.config_file import dump_tree, from_tree

QUICKSTART = Path(__file__).parents[4] / "configs" / "quickstart.yaml"


@pytest.fixture
def gpt3(tmp_path: Path) -> Path:
    path = tmp_path / "gpt3.yaml"
    path.write_text(
        "name: gpt3\npreset: gpt3_13b\nparallel: {tensor: 4, data: 16, sequence: true}\ntrain: {recompute: selective}\n"
    )
    return path


def outcome(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, errors."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code, *capsys.readouterr()


def test_a_screen_shows_memory_time_numbers_and_warnings(capsys: pytest.CaptureFixture[str], gpt3: Path) -> None:
    code, out, _ = outcome(capsys, "plan", gpt3, "--cluster", "h200")
    assert code == 0
    assert "12,852,771,840 parameters on 64 x H200 141GB SXM (8 machines)" in out
    assert len([line for line in out.splitlines() if set(line) <= {"█", "░"} and len(line) == 72]) == 2
    for word in (
        "memory of a rank",
        "optimizer",
        "time of a step",
        "matrix",
        "MFU",
        "300B tokens in",
        "goodput",
        "energy",
    ):
        assert word in out
    assert len(out.splitlines()) <= 30
    parts = re.findall(r"█ ([a-z ]+?) [\d.]+ (?:GiB|s|ms)", out)  # no part is torn from its colour or its number
    assert {"weights", "activations", "memory bound", "data"} <= set(parts) and len(parts) == out.count("█ ")


def test_json_holds_the_same_numbers(capsys: pytest.CaptureFixture[str], gpt3: Path) -> None:
    code, out, _ = outcome(capsys, "plan", gpt3, "--cluster", "h100", "--json")
    tree = json.loads(out)
    assert code == 0 and tree["fits"]
    memory, step = tree["memory_bytes"], tree["step_seconds"]
    assert sum(memory.values()) == pytest.approx(2 * memory["total"])
    assert sum(step.values()) == pytest.approx(2 * step["total"])
    assert tree["mfu"] == pytest.approx(
        tree["model_flops_per_token"] * tree["tokens_per_step"] / step["total"] / (64 * 989.5e12)
    )
    assert tree["device_hours"] == pytest.approx(64 * tree["expected_seconds"] / 3600)
    assert tree["run_seconds"] < tree["expected_seconds"]
    failures = tree["failures"]
    working = tree["run_seconds"] * (1 - step["checkpoint"] / step["total"])
    assert failures["goodput"] == pytest.approx(working / tree["expected_seconds"])
    assert failures["goodput_by_spares"]["0"] == failures["goodput"] <= failures["best_checkpoint_goodput"]


def test_a_run_that_fails_more_often_than_it_saves_is_never_done(
    capsys: pytest.CaptureFixture[str], gpt3: Path, tmp_path: Path
) -> None:
    unsound = tmp_path / "unsound.yaml"
    unsound.write_text((FOLDER / "h100.yaml").read_text() + "node_mtbf_hours: 0.2\n")
    _, out, _ = outcome(capsys, "plan", gpt3, "--cluster", unsound)
    assert "device-hours" not in out and "energy" not in out
    assert "never done" in out and "a checkpoint every 1,000 steps leaves 0.0% of the time" in out
    _, out, _ = outcome(capsys, "plan", gpt3, "--cluster", unsound, "--json")
    tree = json.loads(out)
    assert tree["failures"]["goodput"] == 0 and tree["expected_seconds"] is tree["device_hours"] is None


def test_a_run_that_does_not_fit_ends_with_1(capsys: pytest.CaptureFixture[str], gpt3: Path) -> None:
    code, out, _ = outcome(capsys, "plan", gpt3, "--set", "parallel.tensor=1", "parallel.sequence=false")
    assert code == 1
    assert "does not fit" in out and "warning: the fullest rank has no room; try train.recompute=full" in out


def test_cpus_are_planned_for_where_the_config_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "plan", QUICKSTART)
    assert code == 0 and "on 4 x CPU (1 machine)" in out
    assert "failure" not in out and "goodput" not in out


def test_validation_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "plan", "--validate", "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) == 47
    code, out, _ = outcome(capsys, "plan", "--validate")
    assert all(name in out for name in ("1008B", "BLOOM: s a step", "70b", "reached"))
    in_a_line = re.findall(r"^(\S+) +([\d,.]+) +([\d,.]+) +[+-][\d.]+%", out, re.MULTILINE)
    assert [name for name, *_ in in_a_line] == [row["name"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a plan is of a config, and none is given; name one, or use --validate"),
        ((QUICKSTART, "--devices", 8), "--devices is for --search"),
        ((QUICKSTART, "--search", "--devices", 10**30), "Invalid value for '--devices'"),
        ((QUICKSTART, "--cluster", ""), "no cluster  comes along"),
        ((QUICKSTART, "--cluster", "h1000"), "no cluster h1000 comes along; did you mean h100?"),
    ],
)
def test_mistakes_are_refused(capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str) -> None:
    code, _, err = outcome(capsys, "plan", *arguments)
    assert code == 2 and message in err


def test_money_is_told_where_a_cluster_has_prices(gpt3: Path) -> None:
    config = from_tree({"preset": "gpt3_13b", "parallel": {"tensor": 4, "data": 16}})
    free, priced = (
        make_plan(config, load("h100").model_copy(update={"price_per_device_hour": price})) for price in (None, 2.0)
    )
    assert free.price is None and priced.price == pytest.approx(2 * priced.device_hours)


def test_a_bar_is_as_long_as_its_parts() -> None:
    text = planning.bar({"a": 1.0, "b": 2.0, "c": 1.0}, 8.0).plain
    assert text == "█" * 36 + "░" * 36


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A run whose search has few layouts to look through."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\npreset: gpt2_medium\ntrain: {global_batch_size: 16}\nparallel: {pipeline: 2, data: 2}\n"
    )
    return path


def test_a_search_shows_a_list_reasons_and_how_to_use_the_best(capsys: pytest.CaptureFixture[str], small: Path) -> None:
    code, out, _ = outcome(capsys, "plan", small, "--search", "--cluster", "h100", "--top", 3)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "small on 4 x H100 80GB SXM"
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit() and "MFU" not in line][:4][1:] == list(
        "123"
    )
    for word in ("of which", "why the first: its step is", "instead of it:", "% slower", "the config's own layout"):
        assert word in out
    assert max(map(len, lines)) <= 80


def test_what_a_search_tells_to_set_is_the_best_plan(capsys: pytest.CaptureFixture[str], small: Path) -> None:
    _, out, _ = outcome(capsys, "plan", small, "--search", "--cluster", "h100")
    settings = out.split("to use it: --set ")[1].split()
    code, again, _ = outcome(capsys, "plan", small, "--cluster", "h100", "--json", "--set", *settings)
    _, found, _ = outcome(capsys, "plan", small, "--cluster", "h100", "--search", "--json")
    best = json.loads(found)["layouts"][0]
    del best["settings"]
    assert code == 0 and json.loads(again) == best
    _, out, _ = outcome(capsys, "plan", small, "--search", "--cluster", "h100", "--set", *settings)
    assert "the config has it already" in out and ": the best" in " ".join(out.split())


def test_a_search_may_find_nothing(capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(dump_tree(load("h100").model_dump(mode="json") | {"memory_bytes": 2.4e9}))
    code, out, _ = outcome(capsys, "plan", small, "--search", "--devices", 1, "--cluster", tiny)
    out = " ".join(out.split())
    assert code == 1
    assert "nothing fits 1 device of 2.2 GiB; the nearest takes 3." in out and "2 devices would do" in out
    code, out, _ = outcome(capsys, "plan", small, "--search", "--devices", 7, "--cluster", "h100")
    assert code == 1 and "there are some for 6 or 8" in " ".join(out.split())
    code, out, _ = outcome(capsys, "plan", small, "--search", "--devices", 7, "--cluster", "h100", "--json")
    assert code == 1 and json.loads(out)["layouts"] == [] and json.loads(out)["possible_devices"] == [6, 8]


def test_a_search_imports_no_torch(small: Path) -> None:
    code = f"""
import sys
from launcher.cli.main import main
try:
    main(["plan", {str(small)!r}, "--search"])
except SystemExit as end:
    assert not end.code
assert not {{"torch", "ray", "numpy"}} & {{*sys.modules}}
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
