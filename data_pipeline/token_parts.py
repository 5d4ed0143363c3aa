"""Token ids of one part, in files of their own for what is trained on and for what is held out."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.manifest import PORTIONS, Portion, PortionRecord
from data_pipeline.parts import PartRecord
from data_pipeline.tokenization import SplitEncoder, Tokenizer, encode_split


class TokenWriter:
    """Streams documents into PORTION.bin, an end-of-text token behind each, and their lengths into PORTION.lengths."""

    def __init__(self, folder: Path, encoder: SplitEncoder) -> None:
        self.num_tokens = 0
        self._encoder = encoder
        self._files = ExitStack()
        self._tokens, self._lengths = (
            {portion: self._files.enter_context(path(folder, portion).open("wb")) for portion in PORTIONS}
            for path in (bin_path, lengths_path)
        )
        self._counts = {portion: np.zeros(3, np.int64) for portion in PORTIONS}

    def add(self, texts: list[str], text_bytes: NDArray[np.int64], heldout: NDArray[np.bool_]) -> None:
        """Append documents [d] with the bytes of their UTF-8 [d]; `heldout` [d] says which are held out."""
        encoded = self._encoder.encode_batch(texts).ended_by(self._encoder.end_of_text_id)
        is_heldout = np.repeat(heldout, encoded.lengths)
        for portion in PORTIONS:
            mine, my_ids = (heldout, is_heldout) if portion == "heldout" else (~heldout, ~is_heldout)
            ids = encoded.ids[my_ids]
            self._tokens[portion].write(ids.data)
            self._lengths[portion].write(encoded.lengths[mine].astype("<i4", copy=False).data)
            self._counts[portion] += np.array([np.count_nonzero(mine), len(ids), text_bytes[mine].sum()])
        self.num_tokens += len(encoded.ids)

    def finish(self) -> dict[Portion, PortionRecord]:
        """Close the files; returns what is in them."""
        self._files.close()
        return {
            portion: PortionRecord(documents=documents, tokens=tokens, text_bytes=text_bytes)
            for portion, (documents, tokens, text_bytes) in ((p, c.tolist()) for p, c in self._counts.items())
        }


def bin_path(folder: Path, portion: Portion) -> Path:
    """Token ids of the part's documents, one after another."""
    return folder / f"{portion}.bin"


def lengths_path(folder: Path, portion: Portion) -> Path:
    """Tokens of each document, its end-of-text token included: [d] little-endian int32."""
    return folder / f"{portion}.lengths"


def read_lengths(folder: Path, portion: Portion) -> NDArray[np.int32]:
    """[d] See `lengths_path`."""
    return np.fromfile(lengths_path(folder, portion), "<i4")


def encoded_part(tokenizer: Tokenizer, seed: str, fill: Callable[[SplitEncoder], PartRecord]) -> PartRecord:
    """What `fill` makes of a part with the encoder it is given; twice, where the first one has been found wrong.

    The record notes why there is no fast encoder, where one was wanted. `seed` is of the sample that it is watched by.
    """
    record, engine = encode_split(tokenizer, xxhash.xxh3_64_intdigest(seed.encode()), fill)
    return record.model_copy(update={"notes": (str(engine.fallback),)}) if engine.fallback else record
