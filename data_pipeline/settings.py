"""What decides the bytes of the prepared data, the text itself aside."""

from typing import Self

import orjson
import xxhash
from pydantic import BaseModel, ConfigDict

from trainer.config import DataConfig

SPLIT_SEED = 0
"""Seed of the hash that picks held-out documents. Left alone, all runs hold out the same documents of a corpus."""


class Settings(BaseModel):
    """The settings of one preparation; data is made anew only for other ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[str, ...]
    text_field: str
    heldout_fraction: float
    tokenizer: str | None
    vocab_size: int
    seq_length: int
    seed: int
    """Of the hash that picks held-out documents."""

    @classmethod
    def of(cls, data: DataConfig, vocab_size: int, seq_length: int, seed: int = SPLIT_SEED) -> Self:
        return cls(
            sources=data.sources,
            text_field=data.text_field,
            heldout_fraction=data.heldout_fraction,
            tokenizer=data.tokenizer,
            vocab_size=vocab_size,
            seq_length=seq_length,
            seed=seed,
        )

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS))

    def differences(self, other: "Settings") -> list[str]:
        """One entry for each setting that differs, with both values."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [
            f"{name} {mine[name]!r} here, {theirs[name]!r} asked for" for name in mine if mine[name] != theirs[name]
        ]
