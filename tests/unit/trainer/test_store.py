"""What is a checkpoint and what is not, after crashes, damage and mistakes."""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from made_checkpoints import fail_to_read
from trainer.checkpoint.format import compatibility, store
from trainer.checkpoint.format.manifest import FORMAT, Manifest, Unreadable, fingerprint, read_manifest, write_manifest
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree

FILES = {"__0_0.distcp": bytes(range(256)) * 40, "__1_0.distcp": b"short", ".metadata": b"\x00" * 33, "empty": b""}


def write_into(folder: Path, step: int, config: RunConfig | None = None) -> Manifest:
    """The files of a checkpoint, and the manifest to commit them with."""
    for name, content in FILES.items():
        (folder / name).write_bytes(content + str(step).encode() * bool(content))
    files = {name: fingerprint(folder / name, durable=True) for name in FILES}
    tree = (config or RunConfig()).model_dump(mode="json")
    stability = {"losses": [0.1, 1 / 3], "streak": [step]}
    return Manifest(step, step * 16, tree, files=files, num_updates=step - 1, stability=stability)


def make(checkpoints: Path, *steps: int, config: RunConfig | None = None) -> Path:
    """Commit a checkpoint of each step; returns the last."""
    for step in steps:
        temporary = store.begin(checkpoints, step)
        last = store.commit(temporary, write_into(temporary, step, config))
    return last


def edited(content: bytes, position: int, value: int) -> bytes:
    return content[:position] + bytes([value]) + content[position + 1 :]


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def refusal(check: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        check(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- commit


def test_a_checkpoint_exists_from_commit_on_and_not_before(tmp_path: Path) -> None:
    temporary = store.begin(tmp_path / "checkpoints", 7)
    manifest = write_into(temporary, 7)
    assert store.steps(temporary.parent) == [] and store.newest_valid(temporary.parent) is None
    final = store.commit(temporary, manifest)
    assert names(tmp_path / "checkpoints") == ["step-00000007"] and final.name == store.folder_name(7)
    assert store.steps(tmp_path / "checkpoints") == [7]
    assert store.verify(final) == read_manifest(final) == manifest
    assert manifest.num_bytes == sum((final / name).stat().st_size for name in FILES)
    assert from_tree(read_manifest(final).config) == RunConfig()


def test_begin_clears_what_a_crash_left(tmp_path: Path) -> None:
    (store.begin(tmp_path, 7) / "leftover").write_text("half a tensor")
    assert names(store.begin(tmp_path, 7)) == []


def test_commit_replaces_a_folder_that_was_found_damaged(tmp_path: Path) -> None:
    old = make(tmp_path, 7)
    (old / "__0_0.distcp").write_bytes(b"rot")
    (old / "stray").write_bytes(b"")
    assert store.verify(make(tmp_path, 7)).step == 7
    assert names(tmp_path) == ["step-00000007"] and "stray" not in names(old)


@pytest.mark.parametrize("syscall", ["fsync", "rename"])
def test_death_at_any_point_of_a_commit_leaves_a_whole_checkpoint_or_none(tmp_path: Path, syscall: str) -> None:
    """A process is killed at its n-th fsync or rename, for every n, and another looks at what it left."""
    make(tmp_path, 3)
    outcomes = []
    for fatal in range(20):
        pid = os.fork()
        if pid == 0:
            _commit_and_die(tmp_path, syscall, fatal)
        status = os.waitpid(pid, 0)[1]
        found = store.steps(tmp_path)
        for step in found:
            store.verify(tmp_path / store.folder_name(step))
        outcomes.append((os.waitstatus_to_exitcode(status), found))
        shutil.rmtree(tmp_path / store.folder_name(7), ignore_errors=True)
        if status == 0:
            break
    deaths = [found for status, found in outcomes if status == 9]
    assert deaths[0] == [3] and outcomes[-1] == (0, [3, 7])
    assert len(deaths) >= (len(FILES) + 3 if syscall == "fsync" else 1)  # data, manifest, its folder and the parent


def _commit_and_die(checkpoints: Path, syscall: str, fatal: int) -> None:
    """Commit step 7; die just before the `fatal`-th call of `syscall`."""
    real, calls = getattr(os, syscall), 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        if calls == fatal:
            os._exit(9)
        calls += 1
        return real(*args)

    try:
        setattr(os, syscall, counted)
        make(checkpoints, 7)
        os._exit(0)
    finally:
        os._exit(1)


# -------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("bit", [0, 7])
def test_verify_finds_one_flipped_bit(tmp_path: Path, name: str, place: float, bit: int) -> None:
    checkpoint = make(tmp_path, 7)
    content = (checkpoint / name).read_bytes()
    position = int(place * len(content))
    (checkpoint / name).write_bytes(edited(content, position, content[position] ^ (1 << bit)))
    assert f"is damaged: {name} does not have the size and hash" in refusal(store.verify, checkpoint)


def test_verify_finds_a_flipped_bit_anywhere_in_the_manifest(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7)
    path = checkpoint / "manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(edited(content, position, content[position] ^ (1 << position % 8)))
        refusal(store.verify, checkpoint)
    path.write_bytes(content.replace(b'"step": 7', b'"step": 8'))
    assert "manifest.json does not have the hash that it states" in refusal(store.verify, checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_a_missing_a_truncated_and_a_longer_file(tmp_path: Path, name: str) -> None:
    checkpoint = make(tmp_path, 7)
    path = checkpoint / name
    content = path.read_bytes()
    path.unlink()
    assert f"is damaged: {name} is missing" in refusal(store.verify, checkpoint)
    path.mkdir()
    assert f"is damaged: {name} is missing" in refusal(store.verify, checkpoint)
    path.rmdir()
    for damaged in ([content[:-1]] if content else []) + [content + b"\0"]:
        path.write_bytes(damaged)
        assert f"is damaged: {name} does not have the size" in refusal(store.verify, checkpoint)
    path.write_bytes(content)
    store.verify(checkpoint)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(each, "no readable manifest.json") for each in (b"", b"[]", b"null", b"3", b"{", b"\xff", b'"step"')]
    + [(each, "has format None, this version reads") for each in (b"{}", b'{"step": 7}', b'{"unknown": 1}')],
)
def test_a_manifest_that_says_nothing_useful_makes_no_checkpoint(tmp_path: Path, content: bytes, reason: str) -> None:
    checkpoint = make(tmp_path, 7)
    (checkpoint / "manifest.json").write_bytes(content)
    for check in (store.verify, read_manifest):
        assert reason in refusal(check, checkpoint)
    assert store.newest_valid(tmp_path) is None


def test_what_cannot_be_read_just_now_is_no_damage(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7)
    aside = fail_to_read(checkpoint / "manifest.json")
    for check in (store.verify, store.read, read_manifest):
        with pytest.raises(Unreadable, match=r"manifest\.json: Input/output error"):
            check(checkpoint)
    aside.replace(checkpoint / "manifest.json")
    for missing in (tmp_path / "absent", checkpoint / "__1_0.distcp"):
        with pytest.raises(UserError, match="is not a checkpoint: no readable manifest") as caught:
            store.verify(missing)
        assert not isinstance(caught.value, Unreadable)


def test_a_manifest_without_files_vouches_for_nothing(tmp_path: Path) -> None:
    temporary = store.begin(tmp_path, 7)
    checkpoint = store.commit(temporary, Manifest(7, 112, RunConfig().model_dump(mode="json")))
    assert "is damaged: its manifest lists no files" in refusal(store.verify, checkpoint)
    assert store.newest_valid(tmp_path) is None


def crafted(folder: Path, **changes: Any) -> Path:
    """A checkpoint whose manifest says something else, and has the hash that goes with it."""
    checkpoint = make(folder, 7)
    write_manifest(checkpoint, replace(read_manifest(checkpoint), **changes))
    return checkpoint


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "manifest.json", "..", ".", "", "a/", "nul\0"])
def test_no_name_in_a_manifest_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    checkpoint = crafted(tmp_path, files={name: fingerprint(tmp_path / "secret")})
    for check in (store.verify, store.read, read_manifest):
        assert f"lists {name!r}, which is no file name" in refusal(check, checkpoint)


@pytest.mark.parametrize(
    "entry", [None, 3, [], [5], [5, "0" * 32, 1], ["5", "0" * 32], [-1, "0" * 32], [True, "0" * 32]]
)
def test_a_file_without_size_and_hash_is_refused(tmp_path: Path, entry: Any) -> None:
    assert "does not state the size and hash of short" in refusal(
        read_manifest, crafted(tmp_path, files={"short": entry})
    )


WRONG: dict[str, tuple[Any, ...]] = {
    "step": (-1, 7.0, "7", None, True),
    "consumed_samples": (-1, None),
    "config": (None, []),
    "files": (None, ["short"]),
    "num_files": (-1, "4"),
    "data": (None, {"tokenizer": 3}),
    "data_digest": (3,),
    "num_updates": (None, 1.5),
    "stability": (None, []),
    "kinds": (None, "master", [3]),
    "heldout_loss": ("low", True),
    "written_at": ("now",),
    "origin": (3,),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_field_with_another_kind_of_value_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    message = refusal(read_manifest, crafted(tmp_path, **{field: value}))
    assert f"manifest.json has another kind of value for {field}" in message


def test_every_field_of_a_manifest_is_looked_at() -> None:
    assert {*WRONG, "format"} == {field.name for field in fields(Manifest)}


def test_a_file_that_the_system_does_not_hand_out_is_no_damage(tmp_path: Path) -> None:
    """A name that no file system takes stands for all that it may answer."""
    checkpoint = crafted(tmp_path, files={"x" * 300: [5, "0" * 32]})
    with pytest.raises(Unreadable, match=r"cannot be read just now: x+: File name too long"):
        store.verify(checkpoint)


def test_a_checkpoint_holds_its_files_itself(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7)
    (checkpoint / "__1_0.distcp").rename(tmp_path / "elsewhere")
    (checkpoint / "__1_0.distcp").symlink_to(tmp_path / "elsewhere")
    assert "is damaged: __1_0.distcp is a symbolic link" in refusal(store.verify, checkpoint)


def test_another_format_is_refused_by_number(tmp_path: Path) -> None:
    temporary = store.begin(tmp_path, 7)
    config = RunConfig().model_dump(mode="json")
    checkpoint = store.commit(temporary, Manifest(7, 112, config, format=FORMAT + 1))
    message = refusal(read_manifest, checkpoint)
    assert f"has format {FORMAT + 1}, this version reads {FORMAT}" in message


def test_the_manifest_is_plain_json_for_other_readers(tmp_path: Path) -> None:
    tree = orjson.loads((make(tmp_path, 7) / "manifest.json").read_bytes())
    assert (tree["step"], tree["consumed_samples"], tree["format"]) == (7, 112, FORMAT)
    assert tree["config"]["model"]["num_layers"] == 12 and set(tree["files"]) == set(FILES)


# --------------------------------------------------------------------------------------------------------- newest_valid


def test_newest_valid_falls_back_past_damage_with_a_warning_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, 2, 10, 9, 100)
    assert store.newest_valid(tmp_path) == tmp_path / "step-00000100" and not caplog.records
    (tmp_path / "step-00000100" / "__1_0.distcp").unlink()
    (tmp_path / "step-00000010" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert store.newest_valid(tmp_path) == tmp_path / "step-00000009"
    first, second = (record.getMessage() for record in caplog.records)
    assert "step-00000100 is damaged: __1_0.distcp is missing; trying the one before" in first
    assert "step-00000010 is not a checkpoint" in second
    for step in (2, 9):
        (tmp_path / store.folder_name(step) / ".metadata").write_bytes(b"")
    assert store.newest_valid(tmp_path) is None


def test_other_things_in_the_folder_are_no_checkpoints(tmp_path: Path) -> None:
    make(tmp_path, 5)
    for name in ("step-00000006.tmp", "step-00000007.removed", "step-8", "step-000000009", "xstep-00000010", "best"):
        shutil.copytree(tmp_path / "step-00000005", tmp_path / name)
    (tmp_path / "step-00000011").write_text("a file")
    assert store.steps(tmp_path) == [5, 11]
    assert store.newest_valid(tmp_path) == tmp_path / "step-00000005"
    assert store.newest_valid(tmp_path / "absent") is None and store.steps(tmp_path / "absent") == []


# --------------------------------------------------------------------------------------------------------------- find


def test_find_takes_a_checkpoint_a_run_or_a_checkpoints_folder(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    make(checkpoints, 3, 7)
    assert store.find(checkpoints / "step-00000003") == checkpoints / "step-00000003"
    assert store.find(checkpoints) == store.find(tmp_path / "run") == checkpoints / "step-00000007"
    (tmp_path / "latest").symlink_to(checkpoints / "step-00000003")
    assert store.find(tmp_path / "latest") == tmp_path / "latest"
    (checkpoints / "step-00000007" / ".metadata").unlink()
    assert store.find(tmp_path / "run") == checkpoints / "step-00000003"


def test_find_says_what_to_give_when_there_is_nothing(tmp_path: Path) -> None:
    make(tmp_path / "a", 3).rename(tmp_path / "a" / "step-00000003.tmp")
    (tmp_path / "file").write_text("")
    for path in (
        tmp_path,
        tmp_path / "a",
        tmp_path / "a" / "step-00000003.tmp",
        tmp_path / "absent",
        tmp_path / "file",
    ):
        message = refusal(store.find, path)
        assert message.startswith(f"{path} is no checkpoint and holds none; give a folder like runs/NAME/checkpoints/")


# ------------------------------------------------------------------------------------------------------- architecture


def test_another_architecture_is_refused_naming_the_fields(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7, config=from_tree({"preset": "gpt2_small"}))
    manifest = read_manifest(checkpoint)
    mine = from_tree({"preset": "gpt2_small", "model": {"num_layers": 6, "tied_embeddings": False}})
    with pytest.raises(UserError) as caught:
        compatibility.check_architecture(manifest, mine, checkpoint)
    message = str(caught.value)
    assert "model.num_layers is 12 in the checkpoint and 6 in the config" in message
    assert "model.tied_embeddings is True in the checkpoint and False in the config" in message
    assert message.startswith(f"{checkpoint} is of another architecture") and "hidden_size" not in message


def test_what_does_not_change_the_weights_is_no_other_architecture(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7, config=from_tree({"preset": "gpt2_small"}))
    changes: dict[str, Any] = {
        "model": {"dropout": 0.3, "init_std": 0.1},
        "parallel": {"tensor": 4, "pipeline": 3, "sequence": True},
        "train": {"precision": "fp32", "global_batch_size": 8},
        "seed": 9,
    }
    for preset in ("gpt2_small", None):
        model = from_tree({"preset": "gpt2_small"}).model.model_dump() | changes["model"]
        config = from_tree({**changes, "preset": preset, "model": model})
        compatibility.check_architecture(read_manifest(checkpoint), config, checkpoint)


# ----------------------------------------------------------------------------------------------------------- continuing

OTHER_RUN: dict[str, Any] = {"train": {"total_tokens": 10 * 16 * 2048, "global_batch_size": 16}}


def test_a_run_with_steps_left_and_the_same_batch_continues(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7)
    manifest = read_manifest(checkpoint)
    for changes in ({}, {"parallel": {"tensor": 2}}, {"train": {**OTHER_RUN["train"], "micro_batch_size": 4}}):
        compatibility.check_continues(manifest, from_tree(OTHER_RUN | changes), checkpoint)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"model": {"num_layers": 6}}, ["another architecture", "model.num_layers is 12 in the checkpoint and 6"]),
        (
            {"train": {"total_tokens": 10**9, "global_batch_size": 32}},
            ["consumed 112 sequences in 7 steps", "train.global_batch_size 32 they would be 224", "own batch size"],
        ),
        (
            {"train": {"total_tokens": 7 * 16 * 2048, "global_batch_size": 16}},
            ["is of step 7 and the run ends at step 7", f"raise train.total_tokens above {7 * 16 * 2048}"],
        ),
        (
            {"train": {"total_tokens": 1, "global_batch_size": 16}},
            ["is of step 7 and the run ends at step 1", f"raise train.total_tokens above {7 * 16 * 2048}"],
        ),
    ],
)
def test_a_run_that_could_not_go_on_is_refused(tmp_path: Path, changes: dict[str, Any], fragments: list[str]) -> None:
    checkpoint = make(tmp_path, 7)
    manifest = read_manifest(checkpoint)
    message = refusal(
        lambda path: compatibility.check_continues(manifest, from_tree(OTHER_RUN | changes), path), checkpoint
    )
    for fragment in [str(checkpoint), *fragments]:
        assert fragment in message


RAMP: dict[str, Any] = {"train": OTHER_RUN["train"] | {"ramp_start_batch_size": 8, "ramp_tokens": 24 * 2048}}
"""Batches of 8 until 24 sequences are consumed, then of 16."""


def test_a_ramp_decides_how_many_sequences_steps_consume(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7)
    manifest = read_manifest(checkpoint)
    config = from_tree(RAMP)
    compatibility.check_continues(replace(manifest, consumed_samples=3 * 8 + 4 * 16), config, checkpoint)
    message = refusal(lambda path: compatibility.check_continues(manifest, config, path), checkpoint)
    assert "consumed 112 sequences in 7 steps" in message
    assert "global_batch_size 16 after a ramp from 8 over 49152 tokens they would be 88; use its own batch" in message


def test_the_fix_for_a_finished_run_works(tmp_path: Path) -> None:
    config = from_tree({"train": {"total_tokens": 7 * 16 * 2048 + 1, "global_batch_size": 16}})
    checkpoint = make(tmp_path, 7)
    compatibility.check_continues(read_manifest(checkpoint), config, checkpoint)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    temporary = store.begin(tmp_path, 7)
    written = write_into(temporary, 7)
    checkpoint = store.commit(temporary, replace(written, data={"tokenizer": "aa", "train": "bb"}))
    manifest = store.verify(checkpoint)
    compatibility.check_tokenizer(manifest, {"tokenizer": "aa", "train": "other text"}, checkpoint)
    for data in ({"tokenizer": "cc", "train": "bb"}, {}):
        message = refusal(lambda path, data=data: compatibility.check_tokenizer(manifest, data, path), checkpoint)
        assert "trained with another tokenizer (xxh3-128 aa, the data's is" in message
