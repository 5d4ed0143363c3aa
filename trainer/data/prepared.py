"""A folder of prepared data, as training reads it. The contract with whatever wrote it is these files:

    manifest.json
    tokenizer/              with a tokenizer.json
    NAME/train.bin, NAME/train.idx, NAME/heldout.bin, NAME/heldout.idx     for every data set NAME

and, of manifest.json, these keys; others are the writer's own:

    datasets                {NAME: anything}, in the order of the blend
    tokenizer_fingerprint   a hash of the tokenizer
    end_of_text_id          the token that ends every document; may be missing
    blend                   {NAME: weight}, or null
    files                   {"NAME/train.bin": {"xxh3_128": hash of the content, ...}, ...}

A folder that other tools wrote has no manifest, and train.bin/.idx and heldout.bin/.idx lie in it directly: one data
set, called `text`. So does that of a manifest without `datasets`, whose file is then `train.bin`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import orjson
import xxhash

from trainer.config import RunConfig, UserError
from trainer.data import shards
from trainer.data.blend import Blend, blend_in_force

LONE_DATASET = "text"


@dataclass(frozen=True)
class PreparedFolder:
    path: Path
    datasets: dict[str, Path]
    """Where the shards of each data set lie, in the order of the manifest."""
    blend: dict[str, float] | None = None
    """The weights that the manifest states."""
    tokenizer: str | None = None
    """The tokenizer's fingerprint; None for a folder without a manifest, of whose content nothing is known."""
    train_hashes: tuple[str, ...] = ()
    """xxh3-128 of each data set's train.bin."""
    end_of_text_id: int | None = None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the manifest, if there is one; no shard is looked at.

        Raises:
            UserError: the manifest cannot be understood.
        """
        try:
            manifest = orjson.loads((path / "manifest.json").read_bytes())
            return cls._of(path, manifest)
        except FileNotFoundError:
            return cls(path, {LONE_DATASET: path})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path / 'manifest.json'} is not a manifest of prepared data; prepare it again") from error

    @classmethod
    def _of(cls, path: Path, manifest: dict[str, Any]) -> Self:
        places = {name: f"{name}/" for name in manifest["datasets"]} if "datasets" in manifest else {LONE_DATASET: ""}
        if not places:
            raise ValueError("no data set")
        return cls(
            path,
            {name: path / place for name, place in places.items()},
            manifest.get("blend"),
            manifest["tokenizer_fingerprint"],
            tuple(manifest["files"][f"{place}train.bin"]["xxh3_128"] for place in places.values()),
            manifest.get("end_of_text_id"),
        )

    def train_tokens(self) -> dict[str, int]:
        """Training tokens in the shards of every data set.

        Raises:
            UserError: a shard is missing or damaged.
        """
        return {name: shards.count_tokens(folder / "train") for name, folder in self.datasets.items()}

    def blend_for(self, config: RunConfig) -> Blend:
        """What a run with this config draws from.

        Raises:
            UserError: a shard is missing or damaged, or see `trainer.data.blend.blend_in_force`.
        """
        return blend_in_force(config, self.train_tokens(), self.blend)


def fingerprints(config: RunConfig, path: Path) -> dict[str, str]:
    """What decides the samples of a run on a prepared folder; {} where there is no manifest.

    `tokenizer` and `train` are xxh3-128, of a single data set that of its train.bin; `blend` is there for several. A
    checkpoint keeps them, because weights mean nothing under another tokenizer, nor a position in other data.

    Raises:
        UserError: the manifest cannot be understood, or the blend does not fit the data.
    """
    folder = PreparedFolder.open(path)
    if folder.tokenizer is None:
        return {}
    if len(folder.datasets) == 1:
        return {"tokenizer": folder.tokenizer, "train": folder.train_hashes[0]}
    content = orjson.dumps(list(zip(folder.datasets, folder.train_hashes, strict=True)))
    return {
        "tokenizer": folder.tokenizer,
        "train": xxhash.xxh3_128_hexdigest(content),
        "blend": folder.blend_for(config).describe(),
    }
