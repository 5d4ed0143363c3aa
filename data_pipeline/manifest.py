"""manifest.json: what a folder of prepared data holds and where it came from. Written last, it makes the data real."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import orjson
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.corpus import Split
from data_pipeline.durable import write_atomically
from data_pipeline.settings import Settings
from data_pipeline.tally import Count
from trainer.config import UserError

MANIFEST_FILE = "manifest.json"
_CHUNK_BYTES = 1 << 20


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SplitRecord(_Record):
    documents: int
    tokens: int
    """Token ids in the .bin, one end-of-text token per document included."""
    text_bytes: int


class SourceRecord(_Record):
    source: str
    """As in `data.sources`."""
    origin: str
    """What that was when it was read."""
    documents: int
    text_bytes: int


class FileRecord(_Record):
    size_bytes: int
    xxh3_128: str

    @classmethod
    def of(cls, path: Path) -> Self:
        digest = xxhash.xxh3_128()
        with open(path, "rb") as handle:
            while chunk := handle.read(_CHUNK_BYTES):
                digest.update(chunk)
            return cls(size_bytes=handle.tell(), xxh3_128=digest.hexdigest())


class Manifest(_Record):
    """The content of manifest.json."""

    format_version: Literal[1] = 1
    settings: Settings
    settings_fingerprint: str
    tokenizer_fingerprint: str
    """xxh3-128 of tokenizer.json."""
    vocab_size: int
    """Of the tokenizer: the largest token id plus one."""
    end_of_text_id: int
    splits: dict[Split, SplitRecord]
    sources: list[SourceRecord]
    dropped: dict[str, Count]
    """By reason, see `data_pipeline.tally`."""
    repaired: dict[str, Count]
    notes: list[str]
    """What the user should know about the sources."""
    files: dict[str, FileRecord]
    """By path in the folder; everything in it but this manifest."""
    made_with: str

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the manifest of a folder.

        Raises:
            UserError: there is none, or it is not one.
        """
        path = folder / MANIFEST_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"{folder} holds no prepared data ({MANIFEST_FILE}: {error.strerror}); run `broadgauge prepare`"
            ) from error
        except ValidationError as error:
            raise UserError(
                f"{path} is not a manifest of prepared data; remove {folder} and prepare it again"
            ) from error

    def write(self, folder: Path) -> None:
        content = orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
        write_atomically(folder / MANIFEST_FILE, content + b"\n")

    def damage(self, folder: Path) -> list[str]:
        """Files of the manifest that are missing or changed, one line each; empty when all is well."""
        problems = []
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != expected.size_bytes:
                problems.append(f"{name} has {path.stat().st_size} bytes, not {expected.size_bytes}")
            elif FileRecord.of(path) != expected:
                problems.append(f"{name} has other content (xxh3-128)")
        return problems

    def verify(self, folder: Path) -> None:
        """Check size and hash of every file.

        Raises:
            UserError: the folder is not what the manifest says.
        """
        problems = self.damage(folder)
        if problems:
            raise UserError(f"{folder} is damaged: {'; '.join(problems)}; remove it and prepare it again")


def check_enough(splits: Mapping[Split, SplitRecord], seq_length: int, min_train_tokens: int) -> None:
    """Refuse a corpus too small for one batch, or for one sequence of evaluation.

    Raises:
        UserError: it is.
    """
    train, heldout = splits["train"], splits["heldout"]
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
