"""Small models of several families: the reference's, and the same weights as checkpoints in no layout at all."""

from pathlib import Path
from typing import Any

import torch

from made_checkpoints import write_checkpoint
from reference_gpt import ReferenceGPT
from trainer.config import RunConfig
from trainer.config_file import from_tree

SEQ, VOCAB = 32, 90  # 90 tokens pad to 128 rows: of two tensor ranks the second holds padding too
_SIZES = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "vocab_size": VOCAB, "seq_length": SEQ}
_LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "biases": "none", "tied_embeddings": False}

MODELS: dict[str, dict[str, Any]] = {
    "GPT-2": _SIZES,
    "Llama": _SIZES | _LLAMA | {"num_kv_heads": 2, "ffn_hidden_size": 96},
    "GPT-1": _SIZES | {"norm_placement": "post"},
    "GPT-Neo": _SIZES | {"attention_window": 5, "biases": "all_but_qkv"},
}


def reference_of(family: str) -> ReferenceGPT:
    """Random values everywhere, in the rows that only pad the vocabulary too."""
    sizes = {"ffn_hidden_size": 128, "padded_vocab_size": 128} | MODELS[family]
    model = ReferenceGPT(**sizes)
    model.randomize(seed=5)
    with torch.no_grad():
        rows = [model.embedding.word_embeddings] + ([model.output_layer] if model.output_layer else [])
        for matrix in rows:
            matrix.weight[:VOCAB] *= 3  # a clear choice among the tokens
            matrix.weight[VOCAB:] *= 30  # would rule every sum that took them in
    return model.eval()


def config_of(family: str, layout: dict[str, Any] | None = None, precision: str = "fp32") -> RunConfig:
    return from_tree(
        {
            "model": MODELS[family],
            "train": {"global_batch_size": 8, "micro_batch_size": 1, "precision": precision},
            "parallel": layout or {},
            "launch": {"device": "cpu"},
        }
    )


def checkpoint_of(family: str, folder: Path) -> Path:
    tensors = {f"master/{name}": value.numpy() for name, value in reference_of(family).global_tensors().items()}
    return write_checkpoint(folder / family, 1, tensors, 2, config=config_of(family).model_dump(mode="json"))
