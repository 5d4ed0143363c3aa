"""A checkpoint written as a folder that `transformers` opens without our code.

Which of their classes it becomes, and what goes where, is `families`' to say. The weights are streamed: memory holds
one layer of one tensor, no model is built, and there is no process group. An export is written beside its destination,
checked against the trained model (`verification`), and only then moved into place:

    temporary = export_model(checkpoint, config, tokenizer_folder, out, facts)
    verification.record(temporary, verification.check_logits(temporary, logits, tokens))
    commit(temporary, out)
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers

from trainer.checkpoint.format.manifest import read_manifest
from trainer.checkpoint.huggingface.checkpoint_weights import CheckpointWeights
from trainer.checkpoint.huggingface.configs import write_configs
from trainer.checkpoint.huggingface.families.choice import family_of
from trainer.checkpoint.huggingface.families.family import Slab
from trainer.checkpoint.huggingface.model_card import CARD, is_ours, model_card, trained_with
from trainer.checkpoint.huggingface.safetensors_files import MAX_SHARD_BYTES, Entry, FileWriter, WeightsWriter
from trainer.config import ModelConfig, RunConfig, UserError
from trainer.progress import Advance, unheard

EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDING_FILE = "rounding.safetensors"
"""What an import needs beside the weights to get back the very numbers of a checkpoint; see `rounding`."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # what `data_pipeline` writes
MORE_TOKENIZER_FILES = ("tokenizer.model", "special_tokens_map.json", "chat_template.jinja")


def check_exportable(config: RunConfig) -> None:
    """Refuse a model that no class of Hugging Face computes; needs no weights, so ask before training.

    Raises:
        UserError: names the nearest settings of a model that can be exported.
    """
    family_of(config.model)


def check_export(config: RunConfig, tokenizer_folder: Path, out: Path) -> int | None:
    """All that `export_model` needs but the weights; returns the id of the tokenizer's end-of-text token.

    Raises:
        UserError: the model cannot be exported, the tokenizer does not fit it, or `out` holds something else.
    """
    check_exportable(config)
    _check_replaceable(out)
    return _end_of_text_id(tokenizer_folder, config.model)


def export_model(
    checkpoint: Path,
    config: RunConfig,
    tokenizer_folder: Path,
    out: Path,
    facts: Mapping[str, object],
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Advance = unheard,
) -> Path:
    """Write the model and its tokenizer into a temporary folder beside `out`, and return that folder.

    Args:
        checkpoint: of any layout; rows past the vocabulary are left out.
        facts: what the model card tells of the training, in this order.
        dtype: of the weights, one of `EXPORT_DTYPES`.
        advance: hears how many of the tensors are written.

    Raises:
        UserError: the model cannot be exported, the tokenizer does not fit it, or `out` holds something else.
    """
    end_of_text = check_export(config, tokenizer_folder, out)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in (*TOKENIZER_FILES, *MORE_TOKENIZER_FILES):
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, temporary / name)
    family = family_of(config.model)
    slabs = family.slabs(config.model, write_configs(temporary, family, config.model, end_of_text, dtype))
    write_weights(temporary, CheckpointWeights(checkpoint), config.model, slabs, dtype, max_shard_bytes, advance)
    card = model_card(config, family.architecture, dtype, facts, trained_with(read_manifest(checkpoint)))
    (temporary / CARD).write_text(card, encoding="utf-8")
    return temporary


def write_weights(
    folder: Path,
    weights: CheckpointWeights,
    model: ModelConfig,
    slabs: list[Slab],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Advance = unheard,
) -> None:
    """Stream the slabs into model.safetensors or its shards, and what rounding loses into a file of its own."""
    parts = [part for slab in slabs for part in slab.parts]
    rounded = [part for part in parts if dtype == torch.float32 and part.is_rounded(model)]
    with ExitStack() as files:
        entries = [Entry(part.name, part.shape, dtype) for part in parts]
        writer = files.enter_context(WeightsWriter(folder, entries, max_shard_bytes))
        misses: FileWriter | None = None
        if rounded:
            entries = [Entry(part.name, part.shape, torch.int8) for part in rounded]
            misses = files.enter_context(FileWriter(folder / ROUNDING_FILE, entries))
        num_written = 0
        for slab in slabs:
            held = weights.read(slab)
            for part in slab.parts:
                ours, scaling = part.read(held, model), part.scaling(model)
                theirs = scaling.to_theirs(ours, weights.misses(slab)) if scaling else ours
                writer.write(part.name, theirs.to(dtype))
                if misses is not None and scaling and not scaling.is_exact:
                    misses.write(part.name, scaling.missed_ours(ours, theirs))
            advance(num_written := num_written + len(slab.parts), len(parts))


def commit(temporary: Path, out: Path) -> None:
    """Move a verified export into place; an older export at `out` goes."""
    _check_replaceable(out)
    for path in temporary.iterdir():
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(temporary, out)
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())) and not is_ours(out):
        raise UserError(f"{out} exists and is not an export of Broadgauge; name another folder, or remove it")


def _end_of_text_id(tokenizer_folder: Path, model: ModelConfig) -> int | None:
    """Check that the tokenizer fits the model, and return the id of its end-of-text token, if it has one."""
    for name in TOKENIZER_FILES:
        if not (tokenizer_folder / name).is_file():
            raise UserError(
                f"{tokenizer_folder} is not a prepared tokenizer: {name} is missing; give the run's data/tokenizer"
            )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    if len(tokenizer) > model.vocab_size:
        raise UserError(
            f"the tokenizer in {tokenizer_folder} has {len(tokenizer)} tokens and model.vocab_size is "
            f"{model.vocab_size}; use the tokenizer that the model was trained with"
        )
    return tokenizer.eos_token_id
