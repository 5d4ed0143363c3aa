"""Which checkpoints stay and which go, and that none is lost on the way."""

import fcntl
import os
import select
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made_checkpoints import fail_to_read
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import FORMAT, Manifest, fingerprint
from trainer.checkpoint.format.results import results_path, write_results
from trainer.checkpoint.format.retention import Fate, Present, plan, prune, reasons_to_keep
from trainer.config import CheckpointConfig

FILES = {"rank-00000.safetensors": b"weights", "rank-00001.safetensors": b"more weights"}


def make(checkpoints: Path, *steps: int, heldout_loss: float | None = None) -> Path:
    """Commit a checkpoint of each step; returns the last."""
    for step in steps:
        temporary = store.begin(checkpoints, step)
        for name, content in FILES.items():
            (temporary / name).write_bytes(content)
        files = {name: fingerprint(temporary / name, durable=True) for name in FILES}
        manifest = Manifest(step, step * 16, {}, files=files)
        last = store.commit(temporary, replace(manifest, heldout_loss=heldout_loss))
    return last


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def outcomes(fates: list[Fate]) -> dict[int, str]:
    return {fate.step: fate.outcome for fate in fates}


# -------------------------------------------------------------------------------------------------------- the decision


def test_the_rules_add_up_and_each_is_named() -> None:
    losses = {10: 3.0, 20: None, 30: 2.0, 40: 2.5, 50: 2.0, 60: None, 70: 9.0, 80: None}
    present = [Present(step, None if loss is None else -loss) for step, loss in losses.items()]
    policy = CheckpointConfig(keep_last=2, keep_every_steps=40, keep_best=2)
    assert reasons_to_keep(policy, reversed(present), newest=80) == {
        30: ("best 2",),
        40: ("every 40",),
        50: ("best 2",),
        70: ("last 2",),
        80: ("newest", "last 2", "every 40"),
    }


def test_of_equally_good_ones_the_later_is_kept_and_no_number_is_never_best() -> None:
    present = [Present(10, float("nan")), Present(20, -2.0), Present(30, -2.0), Present(40, float("inf")), Present(50)]
    policy = CheckpointConfig(keep_last=1, keep_best=1)
    assert reasons_to_keep(policy, present, newest=50) == {30: ("best 1",), 50: ("newest", "last 1")}


def test_the_newest_stays_even_where_it_is_not_among_the_sound() -> None:
    assert reasons_to_keep(CheckpointConfig(keep_last=1), [Present(10)], newest=20) == {
        10: ("last 1",),
        20: ("newest",),
    }


def test_a_life_given_up_counts_for_nothing() -> None:
    present = [Present(10, -9.0), Present(20, -8.0), Present(30, -1.0), Present(40, -1.0)]
    policy = CheckpointConfig(keep_last=1, keep_every_steps=10, keep_best=1)
    assert list(reasons_to_keep(policy, present, newest=20)) == [10, 20]


# ---------------------------------------------------------------------------------------------------------- the effect


@pytest.mark.parametrize(
    ("keep_last", "kept"), [(1, [40]), (2, [30, 40]), (4, [10, 20, 30, 40]), (9, [10, 20, 30, 40])]
)
def test_prune_keeps_the_newest(tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    make(tmp_path, 10, 20, 30, 40)
    fates = prune(tmp_path, 40, CheckpointConfig(keep_last=keep_last))
    assert names(tmp_path) == [store.folder_name(step) for step in kept]
    assert outcomes(fates) == {step: "kept" if step in kept else "removed" for step in (10, 20, 30, 40)}
    for step in kept:
        store.verify(tmp_path / store.folder_name(step))


def test_prune_keeps_the_best_and_every_kth_by_what_the_manifests_say(tmp_path: Path) -> None:
    for step, loss in ((10, 3.0), (20, 1.0), (30, None), (40, 2.0), (50, None)):
        make(tmp_path, step, heldout_loss=loss)
    prune(tmp_path, 50, CheckpointConfig(keep_last=1, keep_every_steps=30, keep_best=1))
    assert store.steps(tmp_path) == [20, 30, 50]


def test_prune_keeps_the_best_by_a_score_of_the_very_checkpoint(tmp_path: Path) -> None:
    for step, loss, accuracy in ((10, 1.0, 0.9), (20, 2.0, 0.5), (30, 3.0, 0.6), (40, 4.0, None)):
        folder = make(tmp_path, step, heldout_loss=loss)
        manifest = store.read(folder)
        if step == 10:  # of an earlier life, whose weights were others
            manifest = replace(manifest, written_at=1.0)
        if accuracy is not None:
            write_results(folder, manifest, {"arithmetic/8-shot/accuracy": accuracy})
    policy = CheckpointConfig(keep_last=1, keep_best=1, best_by="arithmetic/8-shot/accuracy")
    assert outcomes(prune(tmp_path, 40, policy)) == {10: "removed", 20: "removed", 30: "kept", 40: "kept"}
    assert results_path(tmp_path / store.folder_name(10)).exists()  # what was found outlives what it was found of


def test_results_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path, 10)
    results_path(folder).mkdir()
    with pytest.raises(OSError, match="step-00000010"):
        write_results(folder, store.read(folder), {"arithmetic/8-shot/accuracy": 0.5})
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, results_path(folder).name}


def test_a_plan_touches_nothing_and_says_what_prune_does(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    policy = CheckpointConfig(keep_last=1)
    planned = plan(tmp_path, 30, policy)
    assert store.steps(tmp_path) == [10, 20, 30]
    assert prune(tmp_path, 30, policy) == planned and store.steps(tmp_path) == [30]


def test_prune_does_not_count_damaged_checkpoints_of_a_life_given_up(tmp_path: Path) -> None:
    """10 is sound, 20 and 30 were damaged, so the run went back to 10 and has now written 20 again."""
    make(tmp_path, 10, 20, 30)
    (tmp_path / "step-00000030" / "rank-00000.safetensors").write_bytes(b"rot")
    fates = prune(tmp_path, 20, CheckpointConfig(keep_last=1))
    assert store.newest_valid(tmp_path) == tmp_path / "step-00000020"
    assert store.steps(tmp_path) == [20, 30] and outcomes(fates) == {10: "removed", 20: "kept"}


@pytest.mark.parametrize("damage", ["missing", "empty", "flipped"])
def test_a_damaged_checkpoint_takes_no_place_of_a_sound_one(tmp_path: Path, damage: str) -> None:
    make(tmp_path, 10, 20, 30, 40)
    for step in (20, 30):
        manifest = tmp_path / store.folder_name(step) / "manifest.json"
        content = manifest.read_bytes()
        manifest.write_bytes(b"" if damage == "empty" else content.replace(b'"step": ', b'"step": 1'))
        if damage == "missing":
            manifest.unlink()
    fates = prune(tmp_path, 40, CheckpointConfig(keep_last=2, keep_every_steps=10, keep_best=9))
    assert names(tmp_path) == ["step-00000010", "step-00000040"]
    assert [fate.why.startswith("damaged") for fate in fates] == [False, True, True, False]


def test_a_checkpoint_of_another_version_is_not_ours_to_remove(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    manifest = tmp_path / store.folder_name(10) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(f'"format": {FORMAT}'.encode(), b'"format": 2'))
    assert outcomes(prune(tmp_path, 30, CheckpointConfig(keep_last=1))) == {10: "kept", 20: "removed", 30: "kept"}
    assert store.steps(tmp_path) == [10, 30]


def test_what_cannot_be_read_just_now_is_not_taken_for_damaged(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 10, 20).with_name("step-00000010")
    fail_to_read(checkpoint / "manifest.json")
    fates = prune(tmp_path, 20, CheckpointConfig(keep_last=1))
    assert outcomes(fates) == {10: "stuck", 20: "kept"} and store.steps(tmp_path) == [10, 20]
    assert fates[0].why == f"{checkpoint} cannot be read just now: manifest.json: Input/output error"


def test_what_cannot_be_removed_is_said_and_stops_nothing(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    (tmp_path / "step-00000010.removed").write_text("a file, where the folder should go")
    fates = prune(tmp_path, 30, CheckpointConfig(keep_last=1))
    assert outcomes(fates) == {10: "stuck", 20: "removed", 30: "kept"}
    assert fates[0].why == "Not a directory" and store.steps(tmp_path) == [10, 30]


# ------------------------------------------------------------------------------------------------------- being read


@contextmanager
def reader_of(checkpoint: Path) -> Iterator[int]:
    """Another process that reads a checkpoint until it is told to end; its id."""
    (said, say), (told, tell) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(tell)
        with store.being_read(checkpoint):
            os.write(say, b"reading")
            os.read(told, 1)  # until the parent closes its end
        os._exit(0)
    os.close(told)
    assert select.select([said], [], [], 60)[0] and os.read(said, 7) == b"reading"
    try:
        yield pid
    finally:
        os.close(tell)
        os.waitpid(pid, 0)
        os.close(said), os.close(say)


def test_the_one_being_read_by_another_process_stays_until_it_is_done(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    policy = CheckpointConfig(keep_last=1)
    with reader_of(tmp_path / "step-00000010"):
        assert outcomes(prune(tmp_path, 30, policy)) == {10: "being read", 20: "removed", 30: "kept"}
        assert store.verify(tmp_path / "step-00000010").step == 10
    assert outcomes(prune(tmp_path, 30, policy)) == {10: "removed", 30: "kept"}
    assert store.steps(tmp_path) == [30]


def test_a_lock_for_removal_is_one_that_nfs_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux makes flock on NFS the record lock that `lockf` is: exclusive only on what is open for writing."""
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)
    make(tmp_path, 10, 20, 30)
    with reader_of(tmp_path / "step-00000010"):
        assert outcomes(prune(tmp_path, 30, CheckpointConfig(keep_last=1)))[10] == "being read"
    assert outcomes(prune(tmp_path, 30, CheckpointConfig(keep_last=1))) == {10: "removed", 30: "kept"}


def test_what_cannot_be_looked_at_is_not_removed(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 10)
    manifest = checkpoint / "manifest.json"
    manifest.unlink()
    manifest.symlink_to(manifest)
    with pytest.raises(OSError, match="symbolic links"):
        store.remove(checkpoint)
    assert store.steps(tmp_path) == [10]


def test_a_reader_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    with reader_of(tmp_path / "step-00000010") as pid:
        os.kill(pid, 9)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert outcomes(prune(tmp_path, 20, CheckpointConfig(keep_last=1))) == {10: "removed", 20: "kept"}


# -------------------------------------------------------------------------------------------------------------- death


def test_prune_interrupted_anywhere_never_leaves_half_a_checkpoint_looking_whole(tmp_path: Path) -> None:
    """Die before the n-th file is removed, for every n."""
    for fatal in range(20):
        shutil.rmtree(tmp_path)
        make(tmp_path, 10, 20, 30)
        pid = os.fork()
        if pid == 0:
            _prune_and_die(tmp_path, fatal)
        died = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        for step in store.steps(tmp_path):
            store.verify(tmp_path / store.folder_name(step))
        assert store.steps(tmp_path)[-1] == 30
        make(tmp_path, 10)  # as a run would that fell back that far and came by again
        prune(tmp_path, 30, CheckpointConfig(keep_last=1))
        store.clear_leftovers(tmp_path)
        assert names(tmp_path) == ["step-00000030"]
        if not died:
            break
    assert fatal == 2 * (len(FILES) + 1 + 1)  # each of two folders: its files, its manifest, itself


def _prune_and_die(checkpoints: Path, fatal: int) -> None:
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if calls == fatal:
                os._exit(9)
            calls += 1
            return real(*args, **kwargs)

        return call

    try:
        os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)  # type: ignore[assignment]
        prune(checkpoints, 30, CheckpointConfig(keep_last=1))
        os._exit(0)
    finally:
        os._exit(1)
