"""Results as plain data."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from launcher.evaluation.results import EvaluationResults, check_comparable
from made_tasks import results_at
from trainer.config import UserError


def test_the_tree_is_all_there_is() -> None:
    results = results_at(30)
    assert EvaluationResults.of(orjson.loads(orjson.dumps(results.as_tree())), Path("r.json")) == results
    assert results.scores == {
        "larger/0-shot/accuracy": 0.6,
        "larger/0-shot/answer_logprob": -1.5,
        "larger/8-shot/accuracy": 0.7,
    }


@pytest.mark.parametrize("tree", [{}, {"format_version": 2}, {"format_version": 1, "other": 3}])
def test_other_trees_are_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"r\.json holds no results of this version"):
        EvaluationResults.of(tree, Path("r.json"))


def test_what_was_asked_otherwise_cannot_be_compared() -> None:
    check_comparable([results_at(1), results_at(2)])
    with pytest.raises(UserError, match="were asked different things"):
        check_comparable([results_at(1), results_at(2).model_copy(update={"battery_fingerprint": "other"})])
    with pytest.raises(UserError, match="was judged in bf16"):
        check_comparable([results_at(1), results_at(2).model_copy(update={"precision": "bf16"})])
