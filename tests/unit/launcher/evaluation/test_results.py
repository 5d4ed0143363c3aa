"""Results as a file."""

from pathlib import Path

import pytest

from launcher.evaluation.results import EvaluationResults, check_comparable
from made_tasks import results_at
from trainer.config import UserError


def test_the_file_is_what_was_written(tmp_path: Path) -> None:
    results = results_at(30)
    results.write(tmp_path / "r.json")
    assert EvaluationResults.read(tmp_path / "r.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert results.scores == {
        "larger/0-shot/accuracy": 0.6,
        "larger/0-shot/answer_logprob": -1.5,
        "larger/8-shot/accuracy": 0.7,
    }


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format_version": 2}', b'{"format_version": 1, "other": 3}'])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(UserError, match="holds no results of this version"):
        EvaluationResults.read(tmp_path / "r.json")
    with pytest.raises(UserError, match="cannot read the results"):
        EvaluationResults.read(tmp_path / "none.json")


def test_what_was_asked_otherwise_cannot_be_compared() -> None:
    check_comparable([results_at(1), results_at(2)])
    with pytest.raises(UserError, match="were asked different things"):
        check_comparable([results_at(1), results_at(2).model_copy(update={"battery_fingerprint": "other"})])
