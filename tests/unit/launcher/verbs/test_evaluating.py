"""What is told of a checkpoint, and read of what was told before."""

from pathlib import Path

import orjson
import pytest

from launcher.verbs.evaluating import Evaluation, Subject, results_of, save
from made_tasks import results_at
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.format.results import score_of, write_results
from trainer.config import UserError
from trainer.config_file import from_tree
from trainer.events import EventLog
from trainer.run_dir import RunDir


@pytest.mark.parametrize(("loss", "perplexity"), [(0.0, 1.0), (None, None), (1e4, None)])
def test_a_model_that_has_diverged_is_told_of(loss: float | None, perplexity: float | None) -> None:
    """Ranks write a loss that is no number as null."""
    subject = Subject(Path("step-00000001"), from_tree({}), Path())
    heldout = {"loss": loss, "tokens": 9, "datasets": {}}
    tree = Evaluation(subject, results_at(1).model_copy(update={"heldout": heldout})).as_tree()
    assert tree["perplexity"] == perplexity


def test_results_of_another_version_are_named(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.results.json"
    path.write_bytes(orjson.dumps({"format": 1, "evaluation": {"made": "by another"}}))
    with pytest.raises(UserError, match=r"step-00000001.results.json holds no results of this version"):
        results_of(tmp_path)


def test_what_is_saved_by_hand_leaves_the_scores_by_which_a_checkpoint_is_the_best(tmp_path: Path) -> None:
    checkpoint, manifest, found = tmp_path / "step-00000001", Manifest(1, 16, {}), results_at(1)
    best_by = "others/0-shot/accuracy"
    write_results(checkpoint, manifest, {best_by: 0.9, "larger/0-shot/accuracy": 0.1})
    save(Evaluation(Subject(checkpoint, from_tree({}), Path(), manifest), found))
    assert score_of(checkpoint, manifest, best_by) == 0.9
    assert score_of(checkpoint, manifest, "larger/0-shot/accuracy") == found.scores["larger/0-shot/accuracy"] != 0.1


def test_results_of_steps_that_are_void_and_of_another_precision_are_left_out(tmp_path: Path) -> None:
    """Step 40 was saved before the run went back to 20, and not again; step 30 was."""
    run_dir = RunDir(tmp_path)
    run_dir.checkpoints.mkdir()
    for step in (10, 20, 30, 40):
        found = results_at(step).model_copy(update={"precision": "fp32" if step == 10 else "bf16"})
        checkpoint = run_dir.checkpoints / store.folder_name(step)
        write_results(checkpoint, Manifest(step, step, {}), found.scores, found.model_dump(mode="json"))
    log = EventLog(run_dir.events_path)
    for step in (10, 20, 30, 40):
        log.write("checkpoint_saved", step=step)
    log.write("rolled_back", from_step=42, to_step=20, reason="loss spike")
    log.write("checkpoint_saved", step=30)
    log.close()
    listed, left_out = results_of(tmp_path)
    assert [each.step for each in listed] == [20, 30]
    assert [reason.partition(" is left out: ")[2] for reason in left_out] == [
        "the run went back before it",
        "it was judged in fp32, not in bf16",
    ]
