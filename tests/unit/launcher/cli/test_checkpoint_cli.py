"""`broadgauge checkpoint` on real checkpoints: what it says, what it touches, and how it exits."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.cli.main import main
from launcher.node import ownership
from made_checkpoints import spread, write_checkpoint
from trainer.checkpoint.format import store
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.events import EventLog
from trainer.run_dir import RunDir

MODEL = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "vocab_size": 120, "seq_length": 16}
TREE: dict[str, Any] = {"model": MODEL, "checkpoint": {"keep_last": 2, "keep_best": 1}}
WEIGHTS = {"layers.weight": (2, 3, 4), "norm": (6,)}
TENSORS = {
    f"{kind}/{key}": np.random.default_rng(seed).standard_normal(shape).astype("<f4")
    for seed, (kind, key, shape) in enumerate(
        (kind, key, shape) for kind in ("master", "exp_avg", "exp_avg_sq") for key, shape in WEIGHTS.items()
    )
}
LOSSES = {10: 2.0, 20: 3.0, 30: None, 40: 2.5}

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """A verb with its arguments: its exit code, and all that it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["checkpoint", *map(str, arguments)])
        printed = capsys.readouterr()
        lines = [line.rstrip() for line in (printed.out + printed.err).splitlines()]
        return int(end.value.code or 0), "\n".join(lines)

    return run


def config_of(**parallel: Any) -> RunConfig:
    return from_tree({**TREE, "parallel": parallel})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with four checkpoints, of which the second was written by two ranks."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(config_of())
    for step, loss in LOSSES.items():
        ranks = 2 if step == 20 else 1
        tree = config_of(tensor=ranks).model_dump(mode="json")
        write_checkpoint(run_dir.checkpoints, step, TENSORS, ranks, config=tree, heldout_loss=loss, written_at=1.7e9)
    return run_dir


def at(run_dir: RunDir, step: int) -> Path:
    return run_dir.checkpoints / store.folder_name(step)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------- list


def test_list_says_what_each_holds_why_it_is_kept_and_what_is_wrong(run: RunDir, command: Command) -> None:
    (at(run, 20) / "rank-00001.safetensors").unlink()
    store.begin(run.checkpoints, 50)
    code, printed = command("list", run.path)
    lines = {line.split()[0]: line for line in printed.splitlines() if line.split()[0].isdigit()}
    assert code == 0 and list(lines) == ["10", "20", "30", "40"]
    assert "2,560" in lines["10"] and "2.0000" in lines["10"] and lines["10"].endswith("best 1")
    assert lines["20"].endswith("rank-00001.safetensors: No such file or directory")
    assert lines["30"].endswith("last 2") and lines["40"].endswith("newest, last 2")
    assert "unfinished or left by a crash: step-00000050.tmp" in printed
    assert "written by tensor 2 x pipeline 1 x data 1, ZeRO-1: 20" in printed


def test_list_marks_as_newest_what_can_be_loaded(run: RunDir, command: Command) -> None:
    (at(run, 40) / "manifest.json").write_bytes(b"{}")
    code, printed = command("list", run.checkpoints)
    lines = [line for line in printed.splitlines() if line.split()[0] in ("30", "40")]
    assert code == 0 and lines[0].endswith("newest, last 2") and "has format None" in lines[1]


def test_list_for_machines(run: RunDir, command: Command) -> None:
    flip(at(run, 30) / "manifest.json", 20)
    found = {each["step"]: each for each in json.loads(command("list", run.path, "--json")[1])}
    assert [step for step, each in found.items() if each["is_newest"]] == [40]
    assert found[30]["problem"] and "consumed_tokens" not in found[30]
    assert (found[20]["consumed_tokens"], found[20]["heldout_loss"]) == (5120, 3.0)
    assert found[20]["layout"]["tensor"] == 2 and found[40]["kept_for"] == ["newest", "last 2"]


def test_list_counts_how_the_saves_of_a_run_went(run: RunDir, command: Command) -> None:
    log = EventLog(run.events_path)
    for step in LOSSES:
        log.write("checkpoint_saved", step=step, path=str(at(run, step)), bytes=1, seconds=0.1)
    for step, durable in ((15, True), (16, False), (17, False)):
        log.write("checkpoint_skipped", step=step, durable=durable, reason="the one before is still being written")
    for seconds in (0.25, 0.5):
        log.write("checkpoint_waited", step=20, seconds=seconds)
    log.write("checkpoint_failed", step=25, reason="No space left on device")
    log.close()
    counted = (
        "in all lives of the run: 4 saved; 1 left out while the one before was being written; 2 snapshots for restarts "
        "left out; 2 waited for the one before, 0.8 s in all; 1 failed"
    )
    assert counted in command("list", run.path)[1]


# -------------------------------------------------------------------------------------------------------------- verify


def test_verify_reads_all_of_a_run_or_one(run: RunDir, command: Command) -> None:
    code, printed = command("verify", run.path)
    assert code == 0 and printed.count(" is sound: ") == 4 and "is sound: 2 files" in printed
    code, printed = command("verify", at(run, 10), at(run, 30))
    assert code == 0 and len(printed.splitlines()) == 2


def test_verify_names_the_damaged_file_and_goes_on(run: RunDir, command: Command) -> None:
    flip(at(run, 20) / "rank-00001.safetensors", -1)
    (at(run, 30) / "manifest.json").unlink()
    code, printed = command("verify", run.path)
    assert code == 1 and printed.count(" is sound: ") == 2
    assert f"{at(run, 20)} is damaged: rank-00001.safetensors does not have the size and hash" in printed
    assert f"{at(run, 30)} is not a checkpoint: no readable manifest.json" in printed
    code, printed = command("verify", "--json", at(run, 20))
    (verdict,) = json.loads(printed)
    assert code == 1 and "rank-00001.safetensors" in verdict["problem"]


def test_verify_finds_what_no_hash_shows(run: RunDir, command: Command) -> None:
    """Every file is as it was written, and one was never written."""
    first, _ = spread(TENSORS, 2)
    checkpoint = write_checkpoint(run.checkpoints, 60, TENSORS, [first])
    code, printed = command("verify", checkpoint)
    assert code == 1 and f"{checkpoint} is not whole: master/layers.weight has" in printed
    checkpoint = write_checkpoint(run.checkpoints, 60, TENSORS, num_files=2)
    code, printed = command("verify", checkpoint)
    assert code == 1 and f"{checkpoint} is not whole: it has 1 of 2 files" in printed


# ---------------------------------------------------------------------------------------------------------------- show


def test_show_says_what_the_newest_holds(run: RunDir, command: Command) -> None:
    code, printed = command("show", run.path)
    assert code == 0 and str(at(run, 40)) in printed and "40, of which 40 updated the weights" in printed
    assert "640 sequences, 10,240 tokens" in printed and "2.5000 nats per token" in printed
    assert "2 tensors, 30 elements, 120 bytes" in printed and "2 layers of 8, 2 heads" in printed
    code, printed = command("show", at(run, 20), "--tensors")
    assert code == 0 and "tensor 2 x pipeline 1" in printed
    assert ["exp_avg/layers.weight", "2", "x", "3", "x", "4", "24"] in [line.split() for line in printed.splitlines()]


def test_show_passes_over_a_damaged_manifest(run: RunDir, command: Command) -> None:
    (at(run, 40) / "manifest.json").unlink()
    assert str(at(run, 30)) in command("show", run.path)[1]
    code, printed = command("show", at(run, 40))
    assert code == 2 and "is not a checkpoint: no readable manifest.json" in printed


def test_show_counts_what_a_weight_holds(run: RunDir, command: Command) -> None:
    found = json.loads(command("show", run.path, "--stats", "norm", "--json")[1])
    assert found["config"]["model"]["num_layers"] == 2 and found["tensors"]["master/norm"] == [6]
    assert set(found["statistics"]) == {"master/norm", "exp_avg/norm", "exp_avg_sq/norm"}
    norm = np.linalg.norm(TENSORS["exp_avg/norm"].astype(float))
    assert found["statistics"]["exp_avg/norm"]["norm"] == pytest.approx(norm)
    code, printed = command("show", run.path, "--stats", "master/norm")
    assert code == 0 and "master/norm" in printed and "exp_avg" not in printed
    code, printed = command("show", run.path, "--stats", "nrom")
    assert code == 2 and "has no weight nrom; `broadgauge checkpoint show PATH --tensors` lists them" in printed


# --------------------------------------------------------------------------------------------------------------- prune


def test_prune_follows_the_run_and_clears_what_a_crash_left(run: RunDir, command: Command) -> None:
    (store.begin(run.checkpoints, 50) / "half").write_bytes(b"x" * 1000)
    code, printed = command("prune", run.path, "--dry-run")
    assert code == 0 and "step 20: would be removed (no rule keeps it)" in printed
    assert "step-00000050.tmp: would be removed" in printed and "would be freed" in printed
    assert store.steps(run.checkpoints) == [10, 20, 30, 40] and len(list(run.checkpoints.iterdir())) == 5
    code, printed = command("prune", run.path)
    assert code == 0 and "step 10: kept (best 1)" in printed and "step 20: removed" in printed
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [store.folder_name(n) for n in (10, 30, 40)]


def test_prune_by_other_rules(run: RunDir, command: Command) -> None:
    command("prune", run.path, "--keep-last", 1, "--keep-best", 0, "--keep-every-steps", 20)
    assert store.steps(run.checkpoints) == [20, 40]


def test_prune_never_counts_on_a_newest_that_is_damaged(run: RunDir, command: Command) -> None:
    flip(at(run, 40) / "rank-00000.safetensors", -1)
    code, printed = command("prune", run.path, "--keep-last", 1, "--keep-best", 0)
    assert code == 0 and "step-00000040 is damaged: rank-00000.safetensors" in printed and "left alone" in printed
    assert store.steps(run.checkpoints) == [30, 40]
    flip(at(run, 30) / "rank-00000.safetensors", -1)
    code, printed = command("prune", run.path)
    assert code == 2 and "holds no sound checkpoint, and none is removed" in printed
    assert store.steps(run.checkpoints) == [30, 40]


def test_prune_beside_a_job_leaves_what_the_job_is_writing(run: RunDir, command: Command) -> None:
    temporary = store.begin(run.checkpoints, 50)
    with run.locked():
        code, printed = command("prune", run.path)
    assert code == 0 and "step-00000050.tmp: left: a job works in this run" in printed
    assert temporary.is_dir() and store.steps(run.checkpoints) == [10, 30, 40]


def test_prune_after_a_killed_job_leaves_what_its_last_processes_are_writing(run: RunDir, command: Command) -> None:
    temporary = store.begin(run.checkpoints, 50)
    lock = run.path / ownership.LOCK_NAME
    ownership.claim(lock, "killed", 0)
    service = ownership.hold(lock, "killed")
    assert service is not None
    assert "step-00000050.tmp: left" in command("prune", run.path)[1] and temporary.is_dir()
    os.close(service)
    assert "step-00000050.tmp: removed" in command("prune", run.path)[1] and not temporary.exists()


# ---------------------------------------------------------------------------------------------------------------- diff


def test_equal_states_in_other_layouts_are_equal(tmp_path: Path, command: Command) -> None:
    tree = config_of().model_dump(mode="json")
    a = write_checkpoint(tmp_path / "a", 10, TENSORS, 1, config=tree)
    other = config_of(tensor=2, data=2).model_dump(mode="json")
    b = write_checkpoint(tmp_path / "b", 10, TENSORS, 4, config=other, heldout_loss=1.0)
    code, printed = command("diff", a, b)
    assert code == 0 and "config parallel.tensor: 1 -> 2" in printed
    assert printed.splitlines()[-1] == "equal: 0 tensors differ, 6 are equal to the last bit"


def test_different_states_differ_worst_first(tmp_path: Path, command: Command) -> None:
    tree = config_of().model_dump(mode="json")
    moved = {name: tensor.copy() for name, tensor in TENSORS.items()}
    moved["master/norm"][3] += 0.5
    moved["exp_avg/layers.weight"] *= 1.001
    del moved["exp_avg_sq/norm"], moved["exp_avg_sq/layers.weight"]
    a = write_checkpoint(tmp_path / "a", 10, TENSORS, 2, config=tree)
    b = write_checkpoint(tmp_path / "b", 10, moved, 3, config=tree, kinds=["master", "exp_avg"])
    code, printed = command("diff", a, b)
    assert code == 1 and "kinds: ['master', 'exp_avg', 'exp_avg_sq'] -> ['master', 'exp_avg']" in printed
    found = [line.split()[0] for line in printed.splitlines() if "/" in line.split()[0]]
    assert {*found[:2]} == {"exp_avg_sq/norm", "exp_avg_sq/layers.weight"}
    assert found[2:] == ["master/norm", "exp_avg/layers.weight"]
    assert printed.splitlines()[-1] == "different: 4 tensors differ, 2 are equal to the last bit"
    code, printed = command("diff", a, b, "--weights-only", "--json")
    differing = json.loads(printed)["tensors"]
    assert code == 1 and [each["name"] for each in differing] == ["master/norm"]
    assert (differing[0]["num_different"], differing[0]["max_abs"]) == (1, pytest.approx(0.5))


def test_the_same_tensors_at_another_step_are_no_equal_state(run: RunDir, command: Command) -> None:
    code, printed = command("diff", at(run, 10), run.path)
    assert code == 1 and "step: 10 -> 40" in printed
    assert command("diff", at(run, 10), run.path, "--weights-only")[0] == 0


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("verb", ["list", "verify", "show", "prune", "diff"])
def test_where_there_is_nothing_every_verb_says_what_to_give(tmp_path: Path, command: Command, verb: str) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        code, printed = command(verb, *[path] * (2 if verb == "diff" else 1))
        assert code == 2 and printed.startswith(f"error: {path} ") and "runs/NAME" in printed
        assert len(printed.splitlines()) == 1
    assert os.listdir(tmp_path) == []
