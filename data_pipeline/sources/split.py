"""A piece of the sources that one worker reads in one go, named by what it holds."""

import os
from dataclasses import dataclass
from typing import Literal

import xxhash

Format = Literal["jsonl", "text", "parquet", "warc", "hugging_face", "python_stdlib"]
Compression = Literal["", "gzip", "zstd"]

_COMPRESSION: dict[str, Compression] = {"gz": "gzip", "zst": "zstd"}
_FORMAT: dict[str, Format] = {
    "jsonl": "jsonl",
    "json": "jsonl",  # one record a line, as everybody's large .json files are
    "ndjson": "jsonl",
    "txt": "text",
    "parquet": "parquet",
    "warc": "warc",
    "wet": "warc",
}
KINDS = ".jsonl, .json, .ndjson, .txt, .warc or .wet (plain, .gz, .zst), nor .parquet"


class UnreadableSplit(Exception):
    """The split, or what is left of it, cannot be read; says which file, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Everything that a worker needs to read its piece, wherever it runs."""

    dataset: str
    source: str
    """The entry of the config."""
    name: str
    """The file, relative to its source; of a batch of small files, the first."""
    place: str
    """What document ids begin with: the file as the user would name it; of a batch, the first."""
    path: str
    """What to open: an absolute path (of a batch, the first), a URL, or the name of a Hugging Face data set."""
    format: Format
    compression: Compression = ""
    start: int
    end: int
    """What of the file: bytes of plain .jsonl, row groups of .parquet, one shard of a Hugging Face data set; the number
    of files of a batch."""
    members: tuple[str, ...] = ()
    """Files of a batch, relative to the folder that they share."""
    size_bytes: int
    """Of input; what reading reports to `on_bytes`, in all. 0 where nobody can say."""
    file_bytes: int | None
    """Size of the whole file when it was planned."""
    seekable: bool = True
    text_field: str
    fingerprint: str
    """Hash of what the whole file holds."""
    copy: int = 0
    """How many earlier splits of the data set are equal to this one in all that the id is made of."""
    modified_ns: int | None = None
    """When the file, or the newest of a batch, was last changed (ns since 1970); empty for what is not a local file."""
    problem: str = ""
    """Why it could not be read already when it was planned."""

    @property
    def id(self) -> str:
        """Hash (xxh3-128, hex) of what the split holds and how it is read; not of where it lies, when or by whom."""
        parts = (self.dataset, self.name, self.fingerprint, self.start, self.end, self.format, self.compression)
        return hash_of(*parts, self.text_field, self.copy)

    @property
    def files(self) -> list[tuple[str, str]]:
        """Path and place of every file of the split."""
        if not self.members:
            return [(self.path, self.place)]
        folder, name = self.path.removesuffix(self.members[0]), self.place.removesuffix(printable(self.members[0]))
        return [(folder + member, name + printable(member)) for member in self.members]


def printable(name: str) -> str:
    """A file's name as valid Unicode: Linux allows any bytes."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def hash_of(*parts: str | int) -> str:
    """xxh3-128, in hex, of values that hold no NUL."""
    return xxhash.xxh3_128_hexdigest("\0".join(map(str, parts)).encode("utf-8", errors="surrogateescape"))


def format_of(path: str) -> tuple[Format, Compression] | None:
    """What the end of a path or URL says: `a.jsonl.gz` is ("jsonl", "gzip"); None for other kinds of file."""
    if "://" in path:
        path = path.partition("?")[0]
    base, _, suffix = path.rpartition("/")[2].lower().rpartition(".")
    compression = _COMPRESSION.get(suffix, "")
    if compression:
        base, _, suffix = base.rpartition(".")
    format = _FORMAT.get(suffix)
    if format is None or not base or (format == "parquet" and compression):
        return None
    return format, compression
