"""What decides the bytes of the prepared data, the text itself aside."""

from typing import Any, Self

import orjson
import xxhash
from pydantic import BaseModel, ConfigDict

from trainer.data_config import DataConfig

SPLIT_SEED = 0
"""Seed of the hash that picks held-out documents. Left alone, all runs hold out the same documents of a corpus."""
_WITHOUT_EFFECT: dict[str, Any] = {"prepared": True, "blend": True, "max_bad_splits": True, "tokenizer": {"engine"}}


class Settings(BaseModel):
    """The settings of one preparation; data is made anew only for other ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: DataConfig
    """With the fields that have no effect on the bytes at their defaults."""
    vocab_size: int
    seq_length: int
    seed: int
    """Of the hash that picks held-out documents."""

    @classmethod
    def of(cls, data: DataConfig, vocab_size: int, seq_length: int, seed: int = SPLIT_SEED) -> Self:
        tree = data.model_dump(exclude=_WITHOUT_EFFECT)
        tree |= {"sources": None, "datasets": {k: v.model_dump() for k, v in data.named_datasets.items()}}
        tree["text_field"] = DataConfig.model_fields["text_field"].default
        return cls(data=DataConfig(**tree), vocab_size=vocab_size, seq_length=seq_length, seed=seed)

    @property
    def fingerprint(self) -> str:
        return _hash([list(self.data.datasets), self.model_dump(mode="json")])

    @property
    def fingerprint_of_parts(self) -> str:
        """Of what a split becomes, whatever other splits there are and wherever it lies: its id holds the rest."""
        tree = self.model_dump(mode="json")
        del tree["data"]["datasets"]
        return _hash(tree)

    @property
    def needs_text(self) -> bool:
        """Whether something must know the whole corpus before the text of a document is final or can be tokenized."""
        data = self.data
        return data.tokenizer.path is None or data.dedup.paragraphs or data.decontaminate.against is not None

    def differences(self, other: "Settings") -> list[str]:
        """One entry for each setting that differs, with both values."""
        mine, theirs = _flatten(self.model_dump(mode="json")), _flatten(other.model_dump(mode="json"))
        order = "the order of data.datasets"  # of texts in several the copy in the one named first is kept
        mine[order], theirs[order] = ", ".join(self.data.datasets), ", ".join(other.data.datasets)
        return [
            f"{name} {mine.get(name)!r} here, {theirs.get(name)!r} asked for"
            for name in mine | theirs
            if mine.get(name) != theirs.get(name)
        ]


def _hash(tree: object) -> str:
    return xxhash.xxh3_128_hexdigest(orjson.dumps(tree, option=orjson.OPT_SORT_KEYS))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
