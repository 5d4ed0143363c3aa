"""The manifest of a checkpoint: what it holds, with the size and hash of every file. Without one, none exists."""

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import xxhash

from trainer.config import UserError
from trainer.training_state import STATE_KINDS

FORMAT = 3
MANIFEST = "manifest.json"
_DIGEST = "manifest_xxh3_128"  # of everything else in the manifest, which no other file vouches for
_PIECE_BYTES = 1 << 22
_HASH = re.compile(r"[0-9a-f]{32}")
ABSENT = (FileNotFoundError, NotADirectoryError)
"""What opening a file raises that is not there."""


class OtherFormat(UserError):
    """A checkpoint of another version of this software: of no use to this one, and not for it to remove."""


class Unreadable(UserError):
    """The system does not hand out what is there, as when a file system is away: that says nothing about damage."""

    def __init__(self, place: Path | str, name: str, error: OSError) -> None:
        super().__init__(f"{place} cannot be read just now: {name}: {error.strerror or error}")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    There is no state of random generators in it, because dropout streams are functions of seed and step, as learning
    rate and batch size are of the step; nor a loss scale, because bf16 needs none.
    """

    step: int
    """Steps done."""
    consumed_samples: int
    """Position in the data order: sequences consumed by all replicas together."""
    config: dict[str, Any]
    """The resolved config of the run that wrote it."""
    files: dict[str, list[Any]] = field(default_factory=dict)
    """Name -> [bytes, xxh3-128 in hex]."""
    num_files: int | None = None
    """Files of the whole checkpoint, where `files` may be the part of one machine; None means that they are all."""
    data: dict[str, str] = field(default_factory=dict)
    """`trainer.data.prepared.fingerprints` of what the run trained on."""
    data_digest: str | None = None
    """Sum mod 2^64 of the digests of all samples consumed and computed on, in hex; see `trainer.data.digest`."""
    num_updates: int = 0
    """Updates of the weights; steps that were skipped made none."""
    stability: dict[str, Any] = field(default_factory=dict)
    """`trainer.stability.StabilityState` as a tree."""
    kinds: list[str] = field(default_factory=lambda: list(STATE_KINDS))
    """Kinds of state, of `trainer.training_state`; weights that were imported are `master` alone."""
    heldout_loss: float | None = None
    """Nats per token, where this step was evaluated before it was saved."""
    written_at: float | None = None
    """Unix seconds."""
    origin: str | None = None
    """Where imported weights are from."""
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    @property
    def is_whole(self) -> bool:
        return bool(self.files) and self.num_files in (None, len(self.files))

    @property
    def identity(self) -> str:
        """Tells it from another of the same step, to which the run came again after it went back."""
        return f"{self.step} {self.written_at}"

    def is_of(self, facts: "Manifest") -> bool:
        """Whether it is of the very checkpoint that `facts` describes; the files do not count."""
        return replace(self, files={}) == replace(facts, files={})


def fingerprint(path: Path, *, durable: bool = False) -> list[Any]:
    """[bytes, xxh3-128 in hex] of a file; `durable` also waits until the disk has it."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as handle:
        while piece := handle.read(_PIECE_BYTES):
            digest.update(piece)
        if durable:
            os.fsync(handle.fileno())
        return [handle.tell(), digest.hexdigest()]


def write_manifest(folder: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Write it whole or not at all, and durably."""
    temporary = folder / f"{name}.tmp"
    with open(temporary, "wb") as handle:
        handle.write(manifest_bytes(manifest))
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, folder / name)
    sync_folder(folder)


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Raises:
    OtherFormat: another version wrote it.
    Unreadable: nobody knows what it says.
    UserError: there is none, it cannot be understood, or it is not as it was written.
    """
    try:
        content = (folder / name).read_bytes()
    except ABSENT as error:
        raise UserError(f"{folder} is not a checkpoint: no readable {name}") from error
    except OSError as error:
        raise Unreadable(folder, name, error) from error
    return parse_manifest(content, folder, name)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of its file; the same for equal manifests."""
    tree = asdict(manifest)
    return orjson.dumps({**tree, _DIGEST: _digest(tree)}, option=orjson.OPT_INDENT_2)


def parse_manifest(content: bytes, checkpoint: Path | str, name: str = MANIFEST) -> Manifest:
    """The manifest that a file of these bytes is; `checkpoint` is the folder or URL that errors name.

    The hash is no signature, so what it vouches for is not trusted either: no name leads out of the folder.

    Raises:
        OtherFormat: another version wrote it.
        UserError: it cannot be understood, or it is not as it was written.
    """
    try:
        tree = orjson.loads(content)
        digest = tree.pop(_DIGEST, None)
        found_format = tree.get("format")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint: no readable {name}") from error
    if found_format != FORMAT:
        raise OtherFormat(f"{checkpoint} has format {found_format}, this version reads {FORMAT}")
    if digest != _digest(tree):
        raise UserError(f"{checkpoint} is damaged: {name} does not have the hash that it states")
    try:
        manifest = Manifest(**tree)
    except TypeError as error:
        raise UserError(f"{checkpoint} is not a checkpoint: {name} has other fields than this version's") from error
    for field_name, is_sound in _FIELDS.items():
        if not is_sound(getattr(manifest, field_name)):
            raise UserError(f"{checkpoint} is not a checkpoint: {name} has another kind of value for {field_name}")
    for file, entry in manifest.files.items():
        if not _is_file_name(file):
            raise UserError(f"{checkpoint} is not a checkpoint: {name} lists {file!r}, which is no file name")
        if not _is_fingerprint(entry):
            raise UserError(f"{checkpoint} is not a checkpoint: {name} does not state the size and hash of {file}")
    return manifest


def _is_file_name(name: str) -> bool:
    """Of a file that lies beside the manifest and is not it."""
    return name == Path(name).name and name not in ("", "..", MANIFEST) and "\0" not in name


def _is_fingerprint(entry: Any) -> bool:
    match entry:
        case [int(num_bytes), str(digest)]:
            return _is_count(num_bytes) and _HASH.fullmatch(digest) is not None
        case _:
            return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_none_or(is_sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_sound(value)


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "consumed_samples": _is_count,
    "config": _is_a(dict),
    "files": _is_a(dict),
    "num_files": _is_none_or(_is_count),
    "data": lambda value: isinstance(value, dict) and all(isinstance(each, str) for each in value.values()),
    "data_digest": _is_none_or(_is_a(str)),
    "num_updates": _is_count,
    "stability": _is_a(dict),
    "kinds": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    "heldout_loss": _is_none_or(_is_number),
    "written_at": _is_none_or(_is_number),
    "origin": _is_none_or(_is_a(str)),
}
"""Field of a manifest -> whether a value is one that it may have."""


def _digest(tree: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(orjson.dumps(tree))


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder; or, given a file, its bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
