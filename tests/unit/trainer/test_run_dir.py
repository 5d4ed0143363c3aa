"""The folder of a run is used, or refused in one line that says what to do."""

import re
from pathlib import Path

import pytest

from trainer.config import UserError
from trainer.config_file import from_tree
from trainer.events import EventLog
from trainer.run_dir import RunDir

CONFIG = from_tree({"name": "lion"})


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(CONFIG)
    return run_dir


def test_the_config_of_a_run_is_what_it_was_made_with(run_dir: RunDir) -> None:
    assert run_dir.config() == CONFIG


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"services: {web: {}}\n", "unknown key services"),
        (b"{", "is not valid YAML"),
        (b"\xff\xfe", "cannot read the config"),
        (b"- a list\n", "must hold a mapping"),
    ],
)
def test_a_config_that_somebody_has_been_at_is_refused_by_its_path(run_dir: RunDir, content: bytes, said: str) -> None:
    run_dir.config_path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        run_dir.config()
    assert str(run_dir.config_path) in str(refused.value) and "checkpoints have it too" in str(refused.value)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_what_cannot_be_a_folder_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("a file")
    run_dir = RunDir(tmp_path / place)
    with (
        pytest.raises(UserError, match=r"cannot be the folder of a run \(.*\); use another --run-dir"),
        run_dir.locked(),
    ):
        pass


def test_who_watches_judges_and_plans_may_change_while_a_run_goes_on_and_nothing_else(run_dir: RunDir) -> None:
    EventLog(run_dir.events_path).write("training_started", step=0)
    for cluster in ("h100", {"device": "X", "bf16_flops": 1e12}, None):
        tree = {"name": "lion", "monitoring": {"listen": "network"}, "launch": {"cluster": cluster}}
        run_dir.create(from_tree(tree))
        assert run_dir.config() == from_tree(tree)
    judged = from_tree({"name": "lion", "evaluation": {"tasks": ["copying"]}})
    run_dir.create(judged)
    assert run_dir.config() == judged
    with pytest.raises(UserError, match="seed: 1234 -> 7"):
        run_dir.create(from_tree({"name": "lion", "seed": 7}))


def test_names_that_no_environment_has_are_refused() -> None:
    assert from_tree({"launch": {"env": {"NCCL_DEBUG": "INFO"}}}).launch.env == {"NCCL_DEBUG": "INFO"}
    with pytest.raises(UserError, match=r"launch\.env\.A=B"):
        from_tree({"launch": {"env": {"A=B": "c"}}})
