"""Pictures of plans: in every format, cut where much is alike, with a row for each stage."""

from pathlib import Path

import pytest
from matplotlib import image

from launcher.cli.main import main
from launcher.planning.cluster import load
from launcher.planning.planner import Plan, make_plan
from launcher.planning.step_time import StepModel
from launcher.planning.timeline import timeline
from launcher.report import plan_picture
from trainer.config import UserError
from trainer.config_file import from_tree

QUICKSTART = Path(__file__).parents[4] / "configs" / "quickstart.yaml"


def plan_of(pipeline: int, chunks: int, num: int) -> Plan:
    config = from_tree(
        {
            "name": "pictured",
            "preset": "gpt3_6_7b",
            "launch": {"device": "cuda"},
            "train": {"global_batch_size": num, "ramp_start_batch_size": None, "ramp_tokens": 0, "recompute": "full"},
            "parallel": {"pipeline": pipeline, "virtual_pipeline": chunks},
        }
    )
    return make_plan(config, load("h100"))


@pytest.mark.parametrize(("pipeline", "chunks", "num"), [(1, 1, 1), (1, 1, 300), (4, 1, 8), (4, 2, 8), (16, 2, 192)])
def test_what_is_shown_begins_and_ends_with_the_step(pipeline: int, chunks: int, num: int) -> None:
    """Long steps in two pieces: until the first stage has gradients back, and from the last stage's last input."""
    plan = plan_of(pipeline, chunks, num)
    times = timeline(StepModel(plan.config, plan.cluster))
    shown = plan_picture.spans(times, times.seconds)
    assert shown[0][0] == 0 and shown[-1][1] == times.seconds
    assert len(shown) == (2 if num > 100 else 1)
    if len(shown) == 2:
        (_, head), (tail, _) = shown
        assert head < tail and head + times.seconds - tail < 0.7 * times.seconds
        assert any(not each.turn.is_forward and each.end_seconds < head for each in times.rows[0])
        assert any(each.turn.is_forward and each.end_seconds > tail for each in times.rows[-1])


def test_a_picture_has_a_row_for_every_stage(tmp_path: Path) -> None:
    for pipeline, chunks, num in ((4, 1, 8), (8, 2, 96)):
        plan_picture.draw(plan_of(pipeline, chunks, num), tmp_path / "plan.png")
        plan_picture.draw(plan_of(pipeline, chunks, num), tmp_path / "plan.svg")
        height, width, _ = image.imread(tmp_path / "plan.png").shape
        drawn = (tmp_path / "plan.svg").read_text(encoding="utf-8")
        assert width > 1500 and height > 100 + 40 * pipeline
        words = ["pictured", "forward again", "waiting", "optimizer", "fragmentation", f"stage {pipeline - 1} -->"]
        assert all(word in drawn for word in words)
        assert ("cut out" in drawn) == (num == 96)
        assert ("chunk 1" in drawn) == (chunks == 2)


def test_the_command_draws_beside_its_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", str(QUICKSTART), "--plot", str(tmp_path / "plan.pdf")])
    assert end.value.code == 0 and "time of a step" in capsys.readouterr().out
    assert (tmp_path / "plan.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("name", "message"),
    [("plan.doc", "names no kind of picture"), ("none/plan.png", "make "), ("folder.png", "is a folder")],
)
def test_where_no_picture_can_be_is_told_first(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=message):
        plan_picture.check_path(tmp_path / name)
