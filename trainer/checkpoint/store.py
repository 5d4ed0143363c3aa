"""Checkpoints as folders: how one comes to exist, how it is found, checked and removed.

A checkpoint is a folder `step-<n>` whose manifest.json lists every other file with its size and xxh3-128 hash. It is
written under a temporary name, made durable, and renamed: a folder with a valid manifest is whole, anything else is
not a checkpoint.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
import xxhash

from trainer.config import RunConfig, UserError
from trainer.config_file import differences, from_tree
from trainer.schedule import Schedule

FORMAT = 2
_MANIFEST = "manifest.json"
_DIGEST = "manifest_xxh3_128"  # of everything else in the manifest, which no other file vouches for
_NAME = re.compile(r"step-(\d{8})")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    """Steps done."""
    consumed_samples: int
    """Position in the data order: sequences consumed by all replicas together."""
    config: dict[str, Any]
    """The resolved config of the run that wrote it."""
    files: dict[str, list[Any]] = field(default_factory=dict)
    """Name -> [bytes, xxh3-128 in hex]."""
    data: dict[str, str] = field(default_factory=dict)
    """`trainer.data.prepared.fingerprints` of what the run trained on."""
    num_updates: int = 0
    """Updates of the weights; steps that were skipped made none."""
    stability: dict[str, Any] = field(default_factory=dict)
    """`trainer.stability.StabilityState` as a tree."""
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def begin(checkpoints: Path, step: int) -> Path:
    """An empty temporary folder to write the checkpoint of `step` into; leftovers of a crash are removed."""
    temporary = checkpoints / f"{folder_name(step)}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def fingerprint(path: Path, *, durable: bool = False) -> list[Any]:
    """[bytes, xxh3-128 in hex] of a file; `durable` also waits until the disk has it."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
        if durable:
            os.fsync(handle.fileno())
        return [handle.tell(), digest.hexdigest()]


def commit(temporary: Path, manifest: Manifest) -> Path:
    """Write the manifest and give the folder its name. From here on the checkpoint exists."""
    path = temporary / _MANIFEST
    tree = asdict(manifest)
    with open(path, "wb") as handle:
        handle.write(orjson.dumps({**tree, _DIGEST: _digest(tree)}, option=orjson.OPT_INDENT_2))
        handle.flush()
        os.fsync(handle.fileno())
    _sync_folder(temporary)
    final = temporary.with_suffix("")
    if final.exists():  # an earlier life of this run got here too; its copy was found invalid, or we would not be here
        shutil.rmtree(final)
    os.rename(temporary, final)
    _sync_folder(final.parent)
    return final


def steps(checkpoints: Path) -> list[int]:
    """Steps of the folders that look like checkpoints, oldest first."""
    names = (_NAME.fullmatch(item.name) for item in checkpoints.iterdir()) if checkpoints.is_dir() else ()
    return sorted(int(match[1]) for match in names if match)


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises:
    UserError: there is none, it cannot be understood, or it is not as it was written.
    """
    try:
        tree = orjson.loads((checkpoint / _MANIFEST).read_bytes())
        digest = tree.pop(_DIGEST, None)
        manifest = Manifest(**tree)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint: no readable {_MANIFEST}") from error
    if manifest.format != FORMAT:
        raise UserError(f"{checkpoint} has format {manifest.format}, this version reads {FORMAT}")
    if digest != _digest(tree):
        raise UserError(f"{checkpoint} is damaged: {_MANIFEST} does not have the hash that it states")
    return manifest


def verify(checkpoint: Path) -> Manifest:
    """Check every file against the manifest.

    Raises:
        UserError: names the first file that is missing or differs.
    """
    manifest = read_manifest(checkpoint)
    if not manifest.files:
        raise UserError(f"{checkpoint} is damaged: its manifest lists no files")
    for name, expected in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{checkpoint} is damaged: {name} is missing")
        if fingerprint(path) != expected:
            raise UserError(f"{checkpoint} is damaged: {name} does not have the size and hash that its manifest states")
    return manifest


def newest_valid(checkpoints: Path, rejected: Callable[[str], None] = _log.warning) -> Path | None:
    """The newest checkpoint that verifies; `rejected` hears why a newer one was passed over."""
    for step in reversed(steps(checkpoints)):
        checkpoint = checkpoints / folder_name(step)
        try:
            verify(checkpoint)
        except UserError as error:
            rejected(f"{error}; trying the one before")
            continue
        return checkpoint
    return None


def prune(checkpoints: Path, newest: int, keep_last: int) -> None:
    """Remove all but the last `keep_last` checkpoints up to step `newest`, which was just written.

    Those after it are damaged, or it would not have been written again: they must not take the place of sound ones.
    """
    for leftover in checkpoints.glob("step-*.removed"):
        shutil.rmtree(leftover, ignore_errors=True)
    for step in [step for step in steps(checkpoints) if step <= newest][:-keep_last]:
        doomed = checkpoints / folder_name(step)
        # out of sight first: a folder that is half removed must not look like a checkpoint
        hidden = doomed.with_name(f"{doomed.name}.removed")
        os.rename(doomed, hidden)
        shutil.rmtree(hidden)


def find(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run or of a checkpoints folder.

    Raises:
        UserError: there is none.
    """
    if (path / _MANIFEST).is_file() and _NAME.fullmatch(path.resolve().name):
        return path
    for folder in (path / "checkpoints", path):
        newest = newest_valid(folder)
        if newest is not None:
            return newest
    raise UserError(f"{path} is no checkpoint and holds none; give a folder like runs/NAME/checkpoints/step-00000100")


def check_architecture(manifest: Manifest, config: RunConfig, checkpoint: Path) -> None:
    """Raises:
    UserError: names the model fields in which the checkpoint differs from the config.
    """
    theirs = from_tree(manifest.config | {"preset": None})
    changed = [
        f"{each.key} is {each.old} in the checkpoint and {each.new} in the config"
        for each in differences(config.model_copy(update={"model": theirs.model}), config)
        if each.key not in ("model.dropout", "model.init_std")  # these shape the training, not what the weights mean
    ]
    if changed:
        raise UserError(f"{checkpoint} is of another architecture ({'; '.join(changed)}); use its own config")


def check_continues(manifest: Manifest, config: RunConfig, checkpoint: Path) -> None:
    """Whether a run can go on from a checkpoint and mean the same by its steps.

    Raises:
        UserError: says what differs.
    """
    check_architecture(manifest, config, checkpoint)
    schedule, train = Schedule(config), config.train
    expected = schedule.consumed_samples(manifest.step)
    if manifest.consumed_samples != expected:
        start = train.ramp_start_batch_size
        ramp = f" after a ramp from {start} over {train.ramp_tokens} tokens" if start else ""
        raise UserError(
            f"{checkpoint} has consumed {manifest.consumed_samples} sequences in {manifest.step} steps, and with "
            f"train.global_batch_size {train.global_batch_size}{ramp} they would be {expected}; use its own batch "
            "size and ramp"
        )
    if manifest.step >= schedule.num_steps:
        raise UserError(
            f"{checkpoint} is of step {manifest.step} and the run ends at step {schedule.num_steps}; raise "
            f"train.total_tokens above {schedule.consumed_tokens(manifest.step)}"
        )


def check_tokenizer(manifest: Manifest, data: Mapping[str, str], checkpoint: Path) -> None:
    """Raises:
    UserError: the data was tokenized otherwise than what the checkpoint was trained on.
    """
    theirs, ours = manifest.data.get("tokenizer"), data.get("tokenizer")
    if theirs != ours:
        raise UserError(
            f"{checkpoint} was trained with another tokenizer (xxh3-128 {theirs}, the data's is {ours}); use data that "
            "was prepared with the same one"
        )


def _digest(tree: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(orjson.dumps(tree))


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
