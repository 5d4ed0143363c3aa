"""Looking into prepared data: documents of a shard, and the sample kept of those that were dropped."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson

from data_pipeline.manifest import Manifest, Portion
from data_pipeline.publishing import DROPPED_FILE, TOKENIZER_FOLDER
from data_pipeline.shards import read_index
from data_pipeline.tally import DROP_REASONS
from data_pipeline.tokenization import Tokenizer
from trainer.section import UserError


def documents(out: Path, dataset: str | None, portion: Portion, first: int, count: int) -> Iterator[tuple[str, str]]:
    """(title, text) of so many documents of a shard, in its order.

    Raises:
        UserError: there is no such data set, or no prepared data.
    """
    folder = _dataset_folder(out, dataset)
    tokenizer = Tokenizer.load(out / TOKENIZER_FOLDER, "reference")
    try:
        lengths, offsets = read_index(folder / f"{portion}.idx")
        for number in range(first, min(first + count, len(lengths))):
            length = int(lengths[number]) - 1  # without its end-of-text token
            ids = np.fromfile(folder / f"{portion}.bin", tokenizer.dtype, length, offset=int(offsets[number]))
            yield f"{folder.name}, {portion}, document {number} ({length} tokens)", tokenizer.decode(ids)
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"{folder} is damaged ({error}); prepare it again") from error


def dropped(out: Path, dataset: str | None, reason: str) -> Iterator[tuple[str, str]]:
    """(title, beginning of the text) of the sampled documents that were dropped for a reason.

    Raises:
        UserError: there is no such reason, data set or prepared data.
    """
    if reason not in DROP_REASONS:
        raise UserError(f"--dropped: no document is dropped for {reason!r}; reasons are {', '.join(DROP_REASONS)}")
    for line in (_dataset_folder(out, dataset) / DROPPED_FILE).read_bytes().splitlines():
        record = orjson.loads(line)
        if record["reason"] == reason:
            yield f"{record['id']}: {reason}", record["text"]


def _dataset_folder(out: Path, dataset: str | None) -> Path:
    names = list(Manifest.load(out).datasets)
    if dataset is not None and dataset not in names:
        raise UserError(f"--dataset: {out} holds no data set {dataset}; it has {', '.join(names)}")
    return out / (dataset or names[0])
