"""Text from an exported model, by transformers alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from trainer.checkpoint.huggingface.configs import CONFIG
from trainer.config import UserError


def generate(folder: Path, prompt: str, max_new_tokens: int, seed: int, **options: Any) -> str:
    """Sample a continuation of the prompt, with transformers and the exported folder alone; the prompt is not repeated.

    Args:
        max_new_tokens: fewer are generated where the context ends, or where the model ends the text.
        options: of `transformers.GenerationConfig`, instead of those of the folder; to sample is one of them.

    Raises:
        UserError: the folder holds no model that transformers can open, or the prompt is empty or leaves no room for a
            new token.
    """
    if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("the prompt is not UTF-8; give it as text")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no exported model (config.json is missing); export one first")
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"transformers cannot open {folder}: {' '.join(str(error).split())}") from error
        prompt_tokens = tokenizer(prompt)["input_ids"]
        if prompt and not prompt_tokens:
            raise UserError(
                f"the tokenizer of {folder} knows no token of the prompt; see whether its files are all there"
            )
        context = model.config.max_position_embeddings
        room = context - _prompt_length(prompt_tokens, context)
        pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        (result,) = pipeline(prompt, max_new_tokens=min(max_new_tokens, room), return_full_text=False, **options)
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
def quiet() -> Iterator[None]:
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
