"""`broadgauge eval` and `results`: what is refused, before any work and in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from launcher.cli.main import main
from made_tasks import results_at
from trainer.checkpoint.format.results import FORMAT

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """What a command with these arguments is told."""

    def told(*arguments: object) -> str:
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments)])
        captured = capsys.readouterr()
        assert end.value.code == 2 and captured.out == "", captured
        (line,) = captured.err.splitlines()
        return line

    return told


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One with results of a checkpoint, and nothing else."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    write(tmp_path / "run", results_at(30).model_dump(mode="json"))
    return tmp_path / "run"


def write(run: Path, evaluation: dict[str, Any]) -> None:
    tree = {"format": FORMAT, "identity": "i", "step": 30, "scores": {}, "evaluation": evaluation}
    (run / "checkpoints" / "step-00000030.results.json").write_bytes(orjson.dumps(tree))


@pytest.mark.parametrize(
    ("changes", "is_whole"),
    [({"format_version": 2}, True), ({"other": 1}, True), ({"loss": 2.5}, False), ({"step": "a"}, True)],
)
def test_results_of_another_version(changes: dict[str, Any], is_whole: bool, run: Path, refused: Refused) -> None:
    write(run, (results_at(30).model_dump(mode="json") if is_whole else {}) | changes)
    told = refused("results", run)
    assert "step-00000030.results.json holds no results of this version; remove it and evaluate again" in told


def test_pictures_that_cannot_be_drawn(run: Path, tmp_path: Path, refused: Refused) -> None:
    assert "names no kind of picture that can be drawn; use .png, .svg, .pdf" in refused(
        "results", run, "--plot", tmp_path / "scores.doc"
    )
    assert "names no kind of picture" in refused("results", run, "--plot", tmp_path / "scores")
    told = refused("results", run, "--plot", tmp_path / "none" / "scores.png")
    assert f"there is no folder {tmp_path / 'none'}; make it, or name another" in told
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_looked_for(
    tmp_path: Path, refused: Refused
) -> None:
    assert "is a folder; name a file in it" in refused("eval", tmp_path / "none", "--out", tmp_path)
    told = refused("eval", tmp_path / "none", "--out", tmp_path / "none" / "found.json")
    assert f"there is no folder {tmp_path / 'none'}; make it, or name another" in told


def test_an_export_has_no_place_for_results(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "is no checkpoint, so nothing is kept beside it; write a file with --out" in refused(
        "eval", tmp_path, "--save"
    )
