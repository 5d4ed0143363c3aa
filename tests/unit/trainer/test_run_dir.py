"""A run folder belongs to one config and to one process at a time."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree, load
from trainer.events import EventLog
from trainer.run_dir import RunDir


def config_of(**sections: object) -> RunConfig:
    return from_tree({"name": "mine", **sections})


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "mine")


# -------------------------------------------------------------------------------------------------------- ownership


def test_nothing_exists_before_create(run_dir: RunDir) -> None:
    run_dir.check(config_of())
    assert not run_dir.path.parent.exists()


def test_a_run_is_told_from_an_earlier_one_of_the_same_folder(run_dir: RunDir) -> None:
    run_dir.create(RunConfig())
    first = run_dir.id
    run_dir.create(RunConfig())
    assert run_dir.id == first and len(first) == 16
    shutil.rmtree(run_dir.path)
    run_dir.create(RunConfig())
    assert run_dir.id != first


def test_create_writes_the_resolved_config(run_dir: RunDir) -> None:
    config = config_of(preset="gpt1", data={"sources": ["x"]})
    run_dir.create(config)
    assert load(run_dir.config_path) == config
    assert run_dir.checkpoints.is_dir() and run_dir.logs.is_dir()
    assert sorted(item.name for item in run_dir.path.iterdir()) == ["checkpoints", "config.yaml", "logs", "run-id"]


def test_create_again_with_the_same_config_leaves_everything(run_dir: RunDir) -> None:
    run_dir.create(config_of())
    (run_dir.checkpoints / "x").write_text("kept")
    written = run_dir.config_path.stat().st_mtime_ns
    run_dir.create(config_of())
    assert run_dir.config_path.stat().st_mtime_ns == written and (run_dir.checkpoints / "x").exists()


def begin_training(run_dir: RunDir, config: RunConfig) -> None:
    run_dir.create(config)
    EventLog(run_dir.events_path).write("training_started", step=0, checkpoint=None)


def test_a_run_that_has_not_trained_may_change_its_config(run_dir: RunDir) -> None:
    run_dir.create(config_of())
    EventLog(run_dir.events_path).write("failed", error="the prompt is too long")
    run_dir.create(config_of(seed=7))
    assert load(run_dir.config_path) == config_of(seed=7)


def test_leftovers_of_a_run_killed_at_once_are_no_obstacle(run_dir: RunDir) -> None:
    run_dir.path.mkdir(parents=True)
    for name in (".lock", "config.yaml.tmp"):
        (run_dir.path / name).write_text("torn")
    run_dir.create(config_of())
    assert load(run_dir.config_path) == config_of()


def test_another_config_is_refused_and_the_fields_are_named(run_dir: RunDir) -> None:
    begin_training(run_dir, config_of())
    for refuse in (run_dir.check, run_dir.create):
        with pytest.raises(UserError) as caught:
            refuse(config_of(seed=7, optimizer={"lr": 0.5}))
        message = str(caught.value)
        assert str(run_dir.path) in message and "seed: 1234 -> 7; optimizer.lr: 0.0006 -> 0.5)" in message
        assert "another --run-dir" in message and "\n" not in message
    assert load(run_dir.config_path) == config_of()


def test_four_differences_are_enough_to_name(run_dir: RunDir) -> None:
    begin_training(run_dir, config_of())
    changes = {"num_layers": 2, "hidden_size": 48, "num_heads": 2, "vocab_size": 100, "seq_length": 30}
    with pytest.raises(UserError, match=r"model\.vocab_size: 50257 -> 100; \.\.\.\)"):
        run_dir.check(config_of(model=changes))
    del changes["seq_length"]
    with pytest.raises(UserError, match=r"model\.vocab_size: 50257 -> 100\)"):
        run_dir.check(config_of(model=changes))


def test_a_preset_or_its_values_written_out_are_the_same_settings_under_another_name(run_dir: RunDir) -> None:
    begin_training(run_dir, config_of(preset="gpt1"))
    tree = from_tree({"preset": "gpt1"}).model_dump(mode="json") | {"preset": None, "name": "mine"}
    with pytest.raises(UserError, match=r"\(preset: gpt1 -> None\)"):
        run_dir.check(from_tree(tree))


def test_a_folder_that_is_no_run_is_refused_untouched(run_dir: RunDir) -> None:
    run_dir.path.mkdir(parents=True)
    (run_dir.path / "thesis.tex").write_text("years of work")
    for refuse in (run_dir.check, run_dir.create):
        with pytest.raises(UserError, match=r"is not empty and holds no config\.yaml of a run; use another --run-dir"):
            refuse(config_of())
    assert [item.name for item in run_dir.path.iterdir()] == ["thesis.tex"]


def test_an_empty_or_just_locked_folder_can_become_a_run(run_dir: RunDir) -> None:
    with run_dir.locked():
        run_dir.check(config_of())
        run_dir.create(config_of())
    assert load(run_dir.config_path) == config_of()


def test_a_damaged_config_is_a_clear_error(run_dir: RunDir) -> None:
    run_dir.create(config_of())
    run_dir.config_path.write_text("name: [")
    with pytest.raises(UserError, match=r"config\.yaml is not valid YAML"):
        run_dir.check(config_of())


def test_prepared_data_takes_the_place_of_the_runs_own(run_dir: RunDir) -> None:
    assert run_dir.data_for(config_of()) == run_dir.path / "data"
    assert run_dir.data_for(config_of(data={"prepared": "/elsewhere"})) == Path("/elsewhere")


# ------------------------------------------------------------------------------------------------------------- the lock


def hold_in_another_process(run_dir: RunDir) -> int:
    """Fork a process that holds the lock until it is killed; returns once it does."""
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with run_dir.locked():
                os.write(ready_write, b"x")
                while True:
                    signal.pause()
        finally:
            os._exit(1)
    os.close(ready_write)
    assert os.read(ready_read, 1) == b"x"
    os.close(ready_read)
    return pid


def test_lock_keeps_other_processes_out_and_dies_with_its_holder(run_dir: RunDir) -> None:
    pid = hold_in_another_process(run_dir)
    try:
        with pytest.raises(UserError, match="is in use by another process; wait for it or stop it"), run_dir.locked():
            pytest.fail("two processes hold one run")
    finally:
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    with run_dir.locked():
        pass


def test_lock_is_released_at_the_end_and_on_errors(run_dir: RunDir) -> None:
    with run_dir.locked(), pytest.raises(UserError), run_dir.locked():
        pytest.fail("one run is held twice")
    with pytest.raises(RuntimeError, match="inside"), run_dir.locked():
        raise RuntimeError("inside")
    pid = hold_in_another_process(run_dir)  # would hang if it could not
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_locks_of_different_runs_are_independent(run_dir: RunDir) -> None:
    with run_dir.locked(), RunDir(run_dir.path.with_name("other")).locked():
        pass
