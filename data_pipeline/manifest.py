"""The manifests of prepared data: what a folder holds and where it came from.

`manifest.json` is about the whole folder and is written last: it makes the data real. Every data set has one of its own
beside its shards, with its sources and the count of every drop.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Self, TypeVar

import orjson
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.durable import write_atomically, write_synced
from data_pipeline.settings import Settings
from data_pipeline.tally import Count
from trainer.progress import Advance, unheard
from trainer.section import UserError

MANIFEST_FILE = "manifest.json"
Portion = Literal["train", "heldout"]
PORTIONS: tuple[Portion, ...] = ("train", "heldout")
_CHUNK_BYTES = 1 << 20

_R = TypeVar("_R", bound="Record")


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Record):
    size_bytes: int
    xxh3_128: str

    @classmethod
    def of(cls, path: Path, heard: Callable[[int], None] = lambda num_bytes: None) -> Self:
        """`heard` is told of bytes as they are read."""
        digest = xxhash.xxh3_128()
        with open(path, "rb") as handle:
            while chunk := handle.read(_CHUNK_BYTES):
                digest.update(chunk)
                heard(len(chunk))
            return cls(size_bytes=handle.tell(), xxh3_128=digest.hexdigest())

    def matches(self, path: Path) -> bool:
        return path.is_file() and path.stat().st_size == self.size_bytes and FileRecord.of(path) == self


class PortionRecord(Record):
    """What a data set has for training, or held out."""

    documents: int
    tokens: int
    """Token ids in the .bin, one end-of-text token per document included."""
    text_bytes: int


class SourceRecord(Record):
    """One split of the sources."""

    split: str
    """Its id, see `data_pipeline.sources`."""
    place: str
    content_hash: str
    """xxh3-128 of its raw bytes."""
    documents: int
    """Clean ones, before copies were dropped."""


class DatasetManifest(Record):
    """NAME/manifest.json."""

    name: str
    settings_fingerprint: str
    tokenizer_fingerprint: str
    portions: dict[Portion, PortionRecord]
    sources: list[SourceRecord]
    dropped: dict[str, Count]
    """By reason, see `data_pipeline.tally`."""
    repaired: dict[str, Count]
    files: dict[str, FileRecord]
    """By name, beside the manifest."""

    def write(self, folder: Path) -> None:
        write_synced(folder / MANIFEST_FILE, _to_json(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises:
        UserError: there is none, or it is not one.
        """
        return _load(cls, folder)


class BadSplit(Record):
    """A split that failed every time, and was allowed to."""

    split: str
    place: str
    reason: str


class Manifest(Record):
    """manifest.json."""

    format_version: Literal[2] = 2
    settings: Settings
    settings_fingerprint: str
    tokenizer_fingerprint: str
    """xxh3-128 of the tokenizer's model file."""
    vocab_size: int
    """Of the tokenizer: the largest token id plus one."""
    end_of_text_id: int
    blend: dict[str, float] | None
    """Weights of the data sets as configured; a run may say otherwise."""
    datasets: dict[str, dict[Portion, PortionRecord]]
    """In the order of the config."""
    dropped: dict[str, int]
    """Over all data sets."""
    repaired: dict[str, int]
    bad_splits: list[BadSplit]
    notes: list[str]
    """What the user should know about the sources."""
    files: dict[str, FileRecord]
    """By path in the folder; everything in it but this manifest."""
    made_with: list[str]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the manifest of a folder.

        Raises:
            UserError: there is none, or it is not one.
        """
        return _load(cls, folder)

    def write(self, folder: Path) -> None:
        write_atomically(folder / MANIFEST_FILE, _to_json(self))

    @property
    def portions(self) -> dict[Portion, PortionRecord]:
        """Sums over the data sets."""
        return {
            portion: PortionRecord(
                documents=sum(portions[portion].documents for portions in self.datasets.values()),
                tokens=sum(portions[portion].tokens for portions in self.datasets.values()),
                text_bytes=sum(portions[portion].text_bytes for portions in self.datasets.values()),
            )
            for portion in PORTIONS
        }

    def damage(self, folder: Path, advance: Advance = unheard) -> list[str]:
        """Files of the manifest that are missing or changed, one line each; empty when all is well.

        `advance` hears how many bytes have been read, of how many.
        """
        problems, done, total = [], 0, sum(file.size_bytes for file in self.files.values())

        def heard(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            advance(done, total)

        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != expected.size_bytes:
                problems.append(f"{name} has {path.stat().st_size} bytes, not {expected.size_bytes}")
            elif _content_of(path, heard) != expected:
                problems.append(f"{name} has other content (xxh3-128)")
        return problems

    def verify(self, folder: Path, advance: Advance = unheard) -> None:
        """Check size and hash of every file; `advance` as in `damage`.

        Raises:
            UserError: the folder is not what the manifest says.
        """
        problems = self.damage(folder, advance)
        if problems:
            raise UserError(f"{folder} is damaged: {'; '.join(problems)}; remove it and prepare it again")


def check_enough(portions: Mapping[Portion, PortionRecord], seq_length: int, min_train_tokens: int) -> None:
    """Refuse a corpus too small for one batch, or for one sequence of evaluation.

    Raises:
        UserError: it is.
    """
    train, heldout = portions["train"], portions["heldout"]
    window = seq_length + 1  # inputs and the targets one token later
    if train.tokens < max(window, min_train_tokens):
        raise UserError(
            f"the training text has {train.tokens} tokens and one batch needs {max(window, min_train_tokens)}; "
            f"add text, or lower model.seq_length or train.global_batch_size"
        )
    if heldout.tokens < window:
        raise UserError(
            f"the held-out text has {heldout.tokens} tokens in {heldout.documents} of "
            f"{heldout.documents + train.documents} documents and one sequence needs model.seq_length + 1 = {window}; "
            f"raise data.heldout_fraction, add documents, or lower model.seq_length"
        )


_seen: dict[tuple[object, ...], FileRecord] = {}


def _content_of(path: Path, heard: Callable[[int], None]) -> FileRecord:
    """Terabytes take a while: a command that needs to know twice, of a file that has not changed, reads it once."""
    found = path.stat()
    key = path.resolve(), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    if key in _seen:
        heard(found.st_size)
    else:
        _seen[key] = FileRecord.of(path, heard)
    return _seen[key]


def _to_json(manifest: Record) -> bytes:
    return orjson.dumps(manifest.model_dump(mode="json"), option=orjson.OPT_INDENT_2) + b"\n"


def _load(kind: type[_R], folder: Path) -> _R:
    path = folder / MANIFEST_FILE
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{folder} holds no prepared data ({MANIFEST_FILE}: {error.strerror}); run `broadgauge prepare`"
        ) from error
    except ValidationError as error:
        raise UserError(f"{path} is not a manifest of prepared data; remove {folder} and prepare it again") from error
