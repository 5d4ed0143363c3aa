"""A model of Hugging Face made a checkpoint of weights alone, which any layout loads.

    folder = source.local_folder("openai-community/gpt2")
    family, model = configs.read_config(folder)
    checkpoint = import_weights(folder, family, config, out, origin)

Streamed, as the export is: memory holds one layer of one tensor. Rows that pad the vocabulary become zero: no token
looks them up, and the loss leaves them out (`trainer.model.cross_entropy`), so that they get no gradient.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.huggingface.checkpoint_weights import CheckpointWriter
from trainer.checkpoint.huggingface.configs import base_prefix, shapes_of
from trainer.checkpoint.huggingface.export import ROUNDING_FILE
from trainer.checkpoint.huggingface.families.family import Family, Part, Slab
from trainer.checkpoint.huggingface.safetensors_files import MAX_SHARD_BYTES, StoredTensors, file_tensors
from trainer.config import ModelConfig, RunConfig, UserError
from trainer.progress import Update, counting, unheard

_BUFFERS = re.compile(r"(.*\.)?(attn\.bias|attn\.masked_bias|attention\.(masked_)?bias|rotary_emb\.inv_freq)")
"""Masks and wavelengths that older versions stored with the weights."""
_HEAD = "lm_head.weight"


def import_weights(
    folder: Path,
    family: Family,
    config: RunConfig,
    out: Path,
    origin: str,
    data: Mapping[str, str],
    *,
    max_file_bytes: int = MAX_SHARD_BYTES,
    update: Update = unheard,
) -> Path:
    """Write the checkpoint `out`/step-00000000 of a folder's weights, and return it.

    Args:
        config: of which the model is `configs.read_config`'s.
        origin: where the weights are from, for the manifest.
        data: for the manifest: the hash of the tokenizer as `tokenizer`, where it has one of ours.

    Raises:
        UserError: the weights are not those that config.json describes, or are no safetensors.
    """
    model = config.model
    slabs = family.slabs(model, shapes_of(family, model))
    source = _Source(folder, family, slabs)
    writer = CheckpointWriter(store.begin(out, 0), model, slabs, max_file_bytes)
    done, total = 0, sum(len(slab.parts) for slab in slabs)
    for slab in slabs:
        writer.write(slab, *_slab_of(slab, model, source))
        update("import: reading", done := done + len(slab.parts), total, "tensors")
    facts = Manifest(0, 0, config.model_dump(mode="json"), data=dict(data), origin=origin)
    return writer.commit(facts, counting(update, "import: committing", "files"))


def _slab_of(slab: Slab, model: ModelConfig, source: "_Source") -> tuple[Tensor, Tensor | None]:
    """Ours of theirs, and by how much they miss theirs."""
    ours, misses = torch.zeros(slab.shape(model)), None
    for part in slab.parts:
        theirs, scaling = source.tensor(part), part.scaling(model)
        if scaling is None:
            part.fill(ours, model, theirs)
            continue
        values = scaling.to_ours(theirs, source.misses.get(part.name))
        part.fill(ours, model, values)
        misses = None if scaling.is_exact else scaling.missed_theirs(theirs, values)
    return ours, misses


class _Source:
    """The tensors of a folder under the names that the class has for them."""

    def __init__(self, folder: Path, family: Family, slabs: list[Slab]) -> None:
        """Raises:
        UserError: one is missing, has another shape, or is not the class's.
        """
        self._stored = StoredTensors(folder)
        self._prefix = base_prefix(family)
        for slab in slabs:
            for part in slab.parts:
                self._check(part, folder)
        surplus = self._stored.keys() - {self._name(part) for slab in slabs for part in slab.parts}
        for name in sorted(surplus):
            if name == _HEAD:
                self._check_tied(slabs[0].parts[0], folder)
            elif not _BUFFERS.fullmatch(name):
                raise UserError(f"{folder} holds {name}, which a {family.architecture} of its config.json has not")
        self.misses = file_tensors(folder / ROUNDING_FILE) if (folder / ROUNDING_FILE).is_file() else {}

    def tensor(self, part: Part) -> Tensor:
        """fp32."""
        return self._stored[self._name(part)].float()

    def _name(self, part: Part) -> str:
        """As the file has it: the class without the output layer writes names without its prefix."""
        return part.name if part.name in self._stored else part.name.removeprefix(self._prefix)

    def _check(self, part: Part, folder: Path) -> None:
        name = self._name(part)
        if name not in self._stored:
            raise UserError(f"{folder} lacks {part.name}, which its config.json asks for")
        if self._stored.shape(name) != part.shape:
            raise UserError(
                f"{folder} holds {name} of shape {self._stored.shape(name)}, and its config.json asks for {part.shape}"
            )
        if not self._stored.dtype(name).is_floating_point:
            raise UserError(f"{folder} holds {name} as {self._stored.dtype(name)}; quantized weights are not imported")

    def _check_tied(self, embedding: Part, folder: Path) -> None:
        """An output layer in the file of a model whose output layer is its embedding must be the same."""
        if not torch.equal(self._stored[_HEAD], self._stored[self._name(embedding)]):
            raise UserError(
                f"{folder}: config.json says that the output layer is the embedding (tie_word_embeddings), and "
                f"{_HEAD} is another matrix; set it to false there if the model has two"
            )
