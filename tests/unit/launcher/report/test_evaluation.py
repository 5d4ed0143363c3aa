"""Tables and curves of what tasks have found."""

import io
from pathlib import Path

import pytest
from matplotlib import image
from rich.console import Console

from launcher.report.evaluation import comparison_table, plot_results, results_table
from made_tasks import results_at
from trainer.config import UserError


def printed(table: object) -> list[str]:
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(table)
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_a_row_has_the_value_and_what_must_be_known_of_it() -> None:
    lines = "\n".join(printed(results_table(results_at(30))))
    assert "larger │ 0 │ accuracy │ 0.600 (0.50 to 0.69) │ 97 │" in lines
    assert "larger, 0 shots, accuracy: chance 0.500; " in lines
    assert "3 skipped: answer has no tokens; 2 prompts cut at the left" in lines
    assert "25% dirty (9 words): 0.500 on 60 clean, 0.900 on 20 dirty; 17 too short to be found" in lines
    assert "5.5 demonstrations fit, 2 at least" in lines
    assert "exact_match │ - │" in lines


def test_checkpoints_beside_each_other() -> None:
    lines = "\n".join(printed(comparison_table([results_at(30), results_at(60)])))
    assert "step 30 ┃ step 60" in lines
    assert "larger/8-shot/accuracy │ 0.700 │ 0.800 (+0.100)" in lines


def test_curves_over_steps(tmp_path: Path) -> None:
    plot_results([results_at(60), results_at(30)], tmp_path / "tasks.png")
    assert image.imread(tmp_path / "tasks.png").std() > 0.05
    with pytest.raises(UserError, match="none of these results is of a training step"):
        plot_results([results_at(30).model_copy(update={"step": None})], tmp_path / "no.png")
