"""Data sets of the Hugging Face hub, or in its layouts on this machine, through the real `datasets` library.

`hf:NAME`, `hf:NAME@CONFIG`, `hf:NAME#SPLIT` or `hf:NAME@CONFIG#SPLIT`; NAME may be a local folder or file. The split
is `train` if none is named.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from data_pipeline.document import Document
from data_pipeline.sources.split import Split, UnreadableSplit, hash_of
from data_pipeline.sources.storage import hash_local_file, is_url, one_line
from data_pipeline.sources.streams import OnBytes
from data_pipeline.tally import Tally
from trainer.section import UserError

if TYPE_CHECKING:
    import datasets

PREFIX = "hf:"

_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}


@dataclass(frozen=True, slots=True)
class HubName:
    path: str
    config: str | None
    split: str


def parse_name(source: str) -> HubName:
    """The parts of `hf:NAME@CONFIG#SPLIT`; a local path of that very name wins."""
    path, config, split = source.removeprefix(PREFIX), "", ""
    if not _is_local(path):
        path, split = _cut(path, "#")
    if not _is_local(path):
        path, config = _cut(path, "@")
    path = os.path.abspath(os.path.expanduser(path)) if _is_local(path) else path
    return HubName(path, config or None, split or "train")


def _is_local(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _cut(text: str, sign: str) -> tuple[str, str]:
    head, found, tail = text.rpartition(sign)
    return (head, tail) if found else (text, "")


def plan_hugging_face(dataset: str, source: str, text_field: str, where: str) -> list[Split]:
    """One split for each of the data set's own shards.

    Raises:
        UserError: the data set cannot be loaded, or has no such split or field.
    """
    name = parse_name(source)
    try:
        builder = _builder(name)
        stream = builder.as_streaming_dataset(split=name.split)
        num_shards = stream.num_shards
    except Exception as error:  # the library raises many kinds of its own
        raise UserError(f"{where}: {source} cannot be loaded ({one_line(error)}); check its name and split") from error
    if stream.features is not None and text_field not in stream.features:
        raise UserError(
            f"{where}: {source} has no field {text_field}; set text_field to one of {', '.join(stream.features)}"
        )
    files = [str(file) for file in (builder.config.data_files or {}).get(name.split, ())]
    try:
        fingerprint = hash_of(num_shards, name.config or "", name.split, *(_identify(file, name) for file in files))
    except OSError as error:
        raise UserError(f"{where}: {source} cannot be read ({one_line(error)}); make it readable") from error
    sizes = [os.path.getsize(file) for file in files if not is_url(file)]
    return [
        Split(
            dataset=dataset,
            source=source,
            name=f"{os.path.basename(name.path) if os.path.isabs(name.path) else name.path}#{name.split}",
            place=source,
            path=name.path,
            format="hugging_face",
            start=shard,
            end=shard + 1,
            size_bytes=sizes[shard] if len(sizes) == num_shards else 0,
            file_bytes=None,
            text_field=text_field,
            fingerprint=fingerprint,
        )
        for shard in range(num_shards)
    ]


def read_hugging_face(split: Split, max_document_bytes: int, tally: Tally, on_bytes: OnBytes) -> Iterator[Document]:
    """The text of every record of a shard, named by shard and row.

    Raises:
        UnreadableSplit: the library fails, which it does for good at the first bad record of a file.
    """
    records = _records(split)
    row = -1
    while True:
        try:
            record = next(records, None)
        except Exception as error:  # the library raises many kinds of its own
            cause = error.__cause__ or error
            raise UnreadableSplit(
                f"{split.place}: shard {split.start} fails behind row {row} ({one_line(cause)}); "
                f"naming its files as sources, without hf:, reads around bad records"
            ) from error
        if record is None:
            return
        row += 1
        place = f"{split.place}:{split.start}:{row}"
        text = record.get(split.text_field)
        if isinstance(text, str):
            yield Document(place, text)
        else:
            tally.drop("field_not_text" if split.text_field in record else "missing_field", place)


def hash_shard(split: Split) -> str:
    """xxh3-128 of the records' fields of text: nothing rawer can be had of every data set."""
    digest = xxhash.xxh3_128()
    for record in _records(split):
        digest.update(repr(record.get(split.text_field)).encode("utf-8", errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def _records(split: Split) -> Iterator[dict[str, object]]:
    name = parse_name(split.source)
    name = HubName(split.path, name.config, name.split)  # the worker may run in another folder
    stream = _builder(name).as_streaming_dataset(split=name.split)
    yield from stream.shard(num_shards=stream.num_shards, index=split.start)


def _builder(name: HubName) -> "datasets.DatasetBuilder":
    import datasets  # takes a second or more, so only where it is needed

    if not os.path.isfile(name.path):
        return datasets.load_dataset_builder(name.path, name=name.config)
    suffixes = [suffix for suffix in Path(name.path).suffixes if suffix in _LOADERS]
    if not suffixes:
        raise ValueError(f"a file of its kind is not among {', '.join(_LOADERS)}")
    return datasets.load_dataset_builder(_LOADERS[suffixes[-1]], data_files={name.split: name.path})


def _identify(file: str, name: HubName) -> str:
    """A local file by its content and its name in the folder; one of the hub by its address, which has its revision."""
    if is_url(file):
        return file
    relative = os.path.relpath(file, name.path) if os.path.isdir(name.path) else os.path.basename(file)
    return f"{relative} {hash_local_file(file, os.path.getsize(file))}"
