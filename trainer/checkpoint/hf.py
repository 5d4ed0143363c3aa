"""The bridge to Hugging Face: a trained model written as a folder that `transformers` opens without our code.

Which of their classes it becomes, and what goes where, is `trainer.checkpoint.families`' to say; this is the only file
that imports `transformers`. An export is written beside its destination, checked against the
trained model, and only then moved into place:

    temporary = export_model(weights, config, tokenizer_folder, out, facts)
    difference = verify_export(temporary, reference_logits, tokens)
    record_verification(temporary, difference, tokens.numel())
    commit(temporary, out)

Shapes: V vocabulary.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from trainer.checkpoint.families.choice import family_of
from trainer.checkpoint.families.family import Family
from trainer.checkpoint.safetensors_stream import MAX_SHARD_BYTES, write_weights
from trainer.config import ModelConfig, RunConfig, UserError
from trainer.plan import num_parameters

TOLERANCE = 1e-4
"""Largest absolute difference of a logit, in fp32, between the trained and the exported model."""

_CARD_TAG = "- broadgauge\n"  # in the README of every folder we write: only such a folder may be replaced
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # what `data_pipeline` writes


class ExportMismatch(RuntimeError):
    """The exported model is not the trained one."""


# ---------------------------------------------------------------------------------------------------------- exporting


def check_exportable(config: RunConfig) -> None:
    """Refuse a model that no class of Hugging Face computes; needs no weights, so ask before training.

    Raises:
        UserError: names the nearest settings of a model that can be exported.
    """
    family_of(config.model)


def check_export(config: RunConfig, tokenizer_folder: Path, out: Path) -> int:
    """All that `export_model` needs but the weights; returns the id of the tokenizer's end-of-text token.

    Raises:
        UserError: the model cannot be exported, the tokenizer does not fit it, or `out` holds something else.
    """
    check_exportable(config)
    _check_replaceable(out)
    return _end_of_text_id(tokenizer_folder, config.model)


def export_model(
    weights: Mapping[str, Tensor],
    config: RunConfig,
    tokenizer_folder: Path,
    out: Path,
    facts: Mapping[str, object],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the model and its tokenizer into a temporary folder beside `out`, and return that folder.

    Args:
        weights: megatron-core's global tensors, each read once; rows past the vocabulary are left out.
        facts: what the model card tells of the training, in this order.

    Raises:
        UserError: the model cannot be exported, the tokenizer does not fit it, or `out` holds something else.
    """
    end_of_text = check_export(config, tokenizer_folder, out)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(tokenizer_folder / name, temporary / name)
    family = family_of(config.model)
    tensors = family.tensors(config.model, _write_configs(temporary, family, config.model, end_of_text))
    write_weights(temporary, weights, tensors, max_shard_bytes)
    (temporary / "README.md").write_text(_model_card(config, family, facts), encoding="utf-8")
    return temporary


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
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    card = out / "README.md"
    if not card.is_file() or _CARD_TAG not in card.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{out} exists and is not an export of Broadgauge; name another folder, or remove it")


def _end_of_text_id(tokenizer_folder: Path, model: ModelConfig) -> int:
    """Check that the tokenizer fits the model, and return the id of its end-of-text token."""
    for name in _TOKENIZER_FILES:
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
    assert tokenizer.eos_token_id is not None, f"{tokenizer_folder} names no end-of-text token"
    return int(tokenizer.eos_token_id)


def _write_configs(folder: Path, family: Family, model: ModelConfig, end_of_text: int) -> dict[str, tuple[int, ...]]:
    """Write config.json and generation_config.json; returns the shapes of the parameters that they ask for, by name."""
    architecture: Any = getattr(transformers, family.architecture)
    config = architecture.config_class(
        architectures=[family.architecture],
        dtype="float32",
        vocab_size=model.vocab_size,
        initializer_range=model.init_std,
        tie_word_embeddings=model.tied_embeddings,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        **family.config(model),
    )
    config.save_pretrained(folder)
    transformers.GenerationConfig(
        do_sample=True,
        top_k=50,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    ).save_pretrained(folder)
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in architecture(config).named_parameters()}


def _model_card(config: RunConfig, family: Family, facts: Mapping[str, object]) -> str:
    model = config.model
    rows: dict[str, object] = {"Parameters": num_parameters(model), "Layers": model.num_layers}
    rows |= {"Hidden size": model.hidden_size, "Attention heads": model.num_heads}
    if model.kv_heads != model.num_heads:
        rows["Key-value heads"] = model.kv_heads
    if model.attention_window is not None:
        rows["Attention window of every second layer, tokens"] = model.attention_window
    rows |= {"Context, tokens": model.seq_length, "Vocabulary, tokens": model.vocab_size, **facts}
    table = "".join(f"| {name} | {_formatted(value)} |\n" for name, value in rows.items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n{_CARD_TAG}---\n\n"
        f"# {config.name}\n\n"
        f"A GPT trained with Broadgauge, as a `{family.architecture}`. Open it with `transformers`:\n\n"
        "```python\n"
        "from transformers import pipeline\n\n"
        'generate = pipeline("text-generation", model="this folder")\n'
        f"print(generate({config.generate.prompt!r}, max_new_tokens={config.generate.max_new_tokens}))\n"
        "```\n\n"
        f"## Model and training\n\n| | |\n|---|---|\n{table}"
    )


def _formatted(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


# ---------------------------------------------------------------------------------------------------------- verifying


def verify_export(folder: Path, reference_logits: Tensor, tokens: Tensor) -> float:
    """Open the folder with transformers and compare its logits with the trained model's.

    Args:
        reference_logits: [batch, seq, V] fp32, of the trained model.
        tokens: [batch, seq].

    Returns:
        The largest absolute difference of a logit.

    Raises:
        ExportMismatch: it is above TOLERANCE, or the folder cannot be opened.
    """
    with _quiet():
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ExportMismatch(f"transformers cannot open the export in {folder}: {error}") from error
    model, report = loaded
    unfitting = sorted({str(name) for names in report.values() for name in names})
    if unfitting:
        raise ExportMismatch(f"the export in {folder} does not fit its config.json: {', '.join(unfitting[:4])}")
    with torch.inference_mode():
        differences = [
            (model(sequence[None]).logits[0] - reference).abs().max()
            for sequence, reference in zip(tokens.cpu(), reference_logits.cpu(), strict=True)
        ]
    largest = torch.stack(differences).max().item()
    if not largest <= TOLERANCE:  # also when it is not a number
        raise ExportMismatch(
            f"the exported model's logits differ from the trained model's by up to {largest:.3g} over {tokens.numel()} "
            f"tokens, and {TOLERANCE:g} is allowed; the export in {folder} must not be used"
        )
    return largest


def record_verification(folder: Path, largest_difference: float, num_tokens: int) -> None:
    """Add the outcome of `verify_export` over `num_tokens` of held-out text to the model card."""
    with open(folder / "README.md", "a", encoding="utf-8") as card:
        card.write(
            "\n## Verification\n\n"
            "Opened with `transformers` and compared with the trained model in fp32, over "
            f"{num_tokens:,} tokens of held-out text: the largest absolute difference of a logit is "
            f"{largest_difference:.3g} ({TOLERANCE:g} is allowed).\n"
        )


# --------------------------------------------------------------------------------------------------------- generating


def generate(folder: Path, prompt: str, max_new_tokens: int, seed: int) -> str:
    """Sample a continuation of the prompt, with transformers and the exported folder alone; the prompt is not repeated.

    Args:
        max_new_tokens: fewer are generated where the context ends, or where the model ends the text.

    Raises:
        UserError: the folder holds no model, or the prompt is empty or leaves no room for a new token.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no exported model (config.json is missing); export one first")
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        context = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).max_position_embeddings
        room = context - _prompt_length(tokenizer(prompt)["input_ids"], context)
        pipeline = transformers.pipeline("text-generation", model=str(folder), tokenizer=tokenizer, device="cpu")
        (result,) = pipeline(prompt, max_new_tokens=min(max_new_tokens, room), return_full_text=False)
    return str(result["generated_text"])


def _prompt_length(prompt_tokens: list[int], context: int) -> int:
    length = len(prompt_tokens)
    if length == 0:
        raise UserError("the prompt is empty; give at least one token to continue")
    if length + 1 > context:
        raise UserError(
            f"the prompt has {length} tokens, and the model reads at most {context} with at least 1 new token among "
            f"them; shorten it to {context - 1} tokens"
        )
    return length


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' warnings and progress bars off the terminal, and leave its settings as they were."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
