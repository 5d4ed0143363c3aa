"""What the verbs of `broadgauge checkpoint` find out and do; how it looks is for `launcher.report.checkpoints`."""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.history.saves import Saves
from launcher.node import ownership
from trainer import config_file
from trainer.checkpoint.format import retention, store
from trainer.checkpoint.format.chunk_file import Shape, incomplete, read_layout
from trainer.checkpoint.format.manifest import MANIFEST, Manifest, read_manifest
from trainer.checkpoint.format.retention import Fate, Present
from trainer.config import CheckpointConfig, RunConfig, UserError
from trainer.config_file import Difference
from trainer.events import read_events
from trainer.progress import Update, counting, unheard
from trainer.run_dir import RunDir
from trainer.training_state import MASTER

if TYPE_CHECKING:
    from trainer.checkpoint.format.comparison import TensorDifference

_LOOKS_LIKE_ONE = re.compile(r"step-\d+")


def folder_of(path: Path) -> Path | None:
    """The folder of checkpoints that a path means: that of a run, or itself; None if it holds none."""
    return next((each for each in (path / "checkpoints", path) if store.steps(each)), None)


def is_one(path: Path) -> bool:
    """Whether a path means a single checkpoint, a damaged one too."""
    return (path / MANIFEST).is_file() or (path.is_dir() and bool(_LOOKS_LIKE_ONE.fullmatch(path.resolve().name)))


def find_one(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run or folder whose manifest is sound.

    Raises:
        UserError: there is none.
    """
    if is_one(path):
        return path
    for entry in reversed(survey(path).entries):
        if entry.manifest:
            return entry.path
    raise UserError(f"{path} holds no checkpoint whose manifest is sound; `broadgauge checkpoint verify` says more")


def config_of(manifest: Manifest) -> RunConfig:
    return config_file.from_tree(manifest.config | {"preset": None})


def tokens_of(manifest: Manifest) -> int:
    """Consumed up to the checkpoint."""
    return manifest.consumed_samples * int(manifest.config["model"]["seq_length"])


# ---------------------------------------------------------------------------------------------------------------- list


@dataclass(frozen=True)
class Entry:
    """A checkpoint in the list of a run."""

    path: Path
    step: int
    manifest: Manifest | None
    problem: str | None
    """What can be seen to be wrong with it without reading its files."""
    kept_for: tuple[str, ...] = ()
    """The rules of the run's policy that keep it."""


@dataclass(frozen=True)
class Survey:
    folder: Path
    entries: tuple[Entry, ...]
    """Oldest first."""
    newest: int | None
    """Step of the one that a run would go on from, as far as can be seen."""
    leftovers: tuple[Path, ...]
    saves: Saves | None
    """How saving went, where the folder is a run's."""


def survey(path: Path) -> Survey:
    """The checkpoints of a run or a folder, by their manifests and the sizes of their files.

    Raises:
        UserError: it has none.
    """
    folder = folder_of(path)
    if folder is None:
        raise UserError(f"{path} holds no checkpoints; give a run like runs/NAME, or its folder of checkpoints")
    entries = [_look(folder, step) for step in store.steps(folder)]
    newest = next((each.step for each in reversed(entries) if each.problem is None), None)
    reasons: Mapping[int, tuple[str, ...]] = {}
    policy = _policy(folder, entries)
    if policy and newest is not None:
        present = [Present.of(each.manifest, each.path, policy) for each in entries if each.manifest]
        reasons = retention.reasons_to_keep(policy, present, newest)
    listed = (Entry(e.path, e.step, e.manifest, e.problem, reasons.get(e.step, ())) for e in entries)
    return Survey(folder, tuple(listed), newest, tuple(store.leftovers(folder)), _saves(folder))


def _look(folder: Path, step: int) -> Entry:
    path = folder / store.folder_name(step)
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return Entry(path, step, None, _without(path, error))
    return Entry(path, step, manifest, _wrong_size(path, manifest))


def _wrong_size(path: Path, manifest: Manifest) -> str | None:
    for name, (size, _) in manifest.files.items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != size:
            return f"{name} has {found} of {size} bytes"
    return None if manifest.is_whole else f"it has {len(manifest.files)} of {manifest.num_files or 'some'} files"


def _policy(folder: Path, entries: Iterable[Entry]) -> CheckpointConfig | None:
    """That of the run whose folder it is, or else of the newest checkpoint."""
    try:
        own = RunDir(folder.resolve().parent).config_path
        if own.is_file():
            return config_file.load(own).checkpoint
        manifests = [each.manifest for each in entries if each.manifest]
        return config_of(manifests[-1]).checkpoint if manifests else None
    except UserError:  # a config of another version; the list is worth showing all the same
        return None


def _saves(folder: Path) -> Saves | None:
    events = RunDir(folder.resolve().parent).events_path
    return Saves.of(read_events(events)) if events.is_file() else None


def _without(path: Path, error: UserError) -> str:
    """What an error says of a checkpoint whose name stands before it already."""
    return str(error).removeprefix(f"{path} ")


# -------------------------------------------------------------------------------------------------------------- verify


@dataclass(frozen=True)
class Verdict:
    """What reading a whole checkpoint has shown."""

    path: Path
    problem: str | None
    num_files: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


def verify(paths: Iterable[Path], update: Update = unheard) -> Iterator[Verdict]:
    """Read every file of the given checkpoints, and of all of a given run, against its hash; see that all are whole.

    Args:
        update: is told how many files of a checkpoint have been read.

    Raises:
        UserError: a path means no checkpoint.
    """
    for path in [checkpoint for given in paths for checkpoint in _meant(given)]:
        started = time.monotonic()
        try:
            with store.being_read(path):
                manifest = store.verify(path, advance=counting(update, f"verify: {path.name}", "files"))
                problem = _not_whole(path, manifest)
        except UserError as error:
            yield Verdict(path, _without(path, error))
            continue
        yield Verdict(path, problem, len(manifest.files), manifest.num_bytes, time.monotonic() - started)


def _meant(path: Path) -> list[Path]:
    if is_one(path):
        return [path]
    return [entry.path for entry in survey(path).entries]


def _not_whole(path: Path, manifest: Manifest) -> str | None:
    lacking = incomplete([read_layout(path / name) for name in manifest.files])
    return f"is not whole: {lacking}" if lacking else None


# ---------------------------------------------------------------------------------------------------------------- show


def tensor_shapes(checkpoint: Path, manifest: Manifest) -> dict[str, Shape]:
    """Kind of state and key of the weight -> shape of the whole tensor, by the headers of the files.

    Raises:
        UserError: a file is missing or damaged.
    """
    shapes: dict[str, Shape] = {}
    for name in manifest.files:
        try:
            shapes |= {chunk.name: chunk.global_shape for chunk in read_layout(checkpoint / name).chunks}
        except OSError as error:
            raise UserError(f"{checkpoint} is damaged: {name} cannot be read ({error.strerror})") from error
    return dict(sorted(shapes.items()))


def facts(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says, without its config and its list of files."""
    hidden = {"config", "files", "stability"}
    said = {name: value for name, value in vars(manifest).items() if name not in hidden}
    skipped = len(manifest.stability.get("skipped", ()))
    return said | {"consumed_tokens": tokens_of(manifest), "num_bytes": manifest.num_bytes, "skipped_steps": skipped}


# --------------------------------------------------------------------------------------------------------------- prune


@dataclass(frozen=True)
class Pruned:
    policy: CheckpointConfig
    newest: Path
    """The newest checkpoint that has been found whole; those beyond it are left alone."""
    fates: tuple[Fate, ...]
    freed_bytes: int
    leftovers: tuple[Path, ...]
    """What killed writers have left."""
    is_idle: bool
    """Whether no job works in the run, so that the leftovers are removed."""
    rejected: tuple[str, ...]
    """Why newer ones do not count."""


def prune(path: Path, changes: Mapping[str, int], *, dry_run: bool) -> Pruned:
    """Remove what no rule of the run's policy, or of its `changes`, keeps.

    Every hash of the newest checkpoint is checked before any other is removed.

    Raises:
        UserError: the path is no run, or no checkpoint in it is sound.
    """
    run_dir = RunDir(path)
    if not run_dir.config_path.is_file():
        raise UserError(f"{path} is no run: it holds no config.yaml; give a folder like runs/NAME")
    policy = run_dir.config().checkpoint.model_copy(update=dict(changes))
    checkpoints, rejected = run_dir.checkpoints, list[str]()
    with ExitStack() as held:
        is_idle = _hold(run_dir, held)
        newest = store.newest_valid(checkpoints, rejected.append)
        if newest is None:
            raise UserError(f"{path} holds no sound checkpoint, and none is removed; {'; '.join(rejected) or 'none'}")
        step = read_manifest(newest).step
        sizes = {each: _size(checkpoints / store.folder_name(each)) for each in store.steps(checkpoints)}
        fates = (retention.plan if dry_run else retention.prune)(checkpoints, step, policy)
        leftovers = store.leftovers(checkpoints)
        freed = sum(sizes.get(fate.step, 0) for fate in fates if fate.outcome == "removed")
        if is_idle:
            freed += sum(map(_size, leftovers))
            if not dry_run:
                store.clear_leftovers(checkpoints)
    return Pruned(policy, newest, tuple(fates), freed, tuple(leftovers), is_idle, tuple(rejected))


def _hold(run_dir: RunDir, held: ExitStack) -> bool:
    """Keep jobs out of the run; False if one is in it, or what a killed one has left still works there."""
    lock = run_dir.path / ownership.LOCK_NAME
    try:
        held.enter_context(run_dir.locked())
        if lock.exists():
            ownership.wait_until_free(lock, timeout_seconds=0)
    except (UserError, TimeoutError):
        return False
    return True


def _size(folder: Path) -> int:
    try:
        return sum(item.stat().st_size for item in folder.iterdir())
    except OSError:  # a job may be removing it
        return 0


# ---------------------------------------------------------------------------------------------------------------- diff

_STATE = ("step", "consumed_samples", "num_updates", "kinds", "data", "data_digest", "stability")
"""Facts on which depends how training goes on."""


@dataclass(frozen=True)
class Comparison:
    """In what two checkpoints differ."""

    config: tuple[Difference, ...]
    """For information: equal states may have been saved under other layouts."""
    facts: tuple[Difference, ...]
    tensors: "tuple[TensorDifference, ...]" = field(default=())
    """Those that differ, worst first."""
    num_equal: int = 0
    """Tensors that are equal to the last bit."""

    @property
    def is_equal(self) -> bool:
        return not self.facts and not self.tensors


def diff(first: Path, second: Path, *, weights_only: bool) -> Comparison:
    """Compare two checkpoints of any layouts, a bounded part of a tensor at a time.

    Raises:
        UserError: one of them is none, or damaged.
    """
    from trainer.checkpoint.format.comparison import compare

    with store.being_read(first), store.being_read(second):
        a, b = read_manifest(first), read_manifest(second)
        found = list(compare(first, second, MASTER if weights_only else None))
    tensors = sorted((each for each in found if each), key=lambda each: each.badness, reverse=True)
    said = [Difference(name, getattr(a, name), getattr(b, name)) for name in (() if weights_only else _STATE)]
    config = config_file.differences(config_of(a), config_of(b))
    changed = tuple(each for each in said if each.old != each.new)
    return Comparison(tuple(config), changed, tuple(tensors), len(found) - len(tensors))
