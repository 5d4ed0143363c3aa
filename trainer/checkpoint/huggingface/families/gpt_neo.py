"""GPTNeoForCausalLM: dense and banded layers in turn (or dense ones alone), and no biases of queries, keys and values.

It does not divide the scores by the root of the head size d, so the exported queries are divided by it: exactly where
d is a power of 4, as 64 is, and else rounded; `trainer.checkpoint.huggingface.rounding` keeps what that loses.
"""

import math
from typing import Any

from trainer.checkpoint.huggingface.families.family import (
    GELU_TANH,
    KEYS_FOR_EVERY_HEAD,
    Family,
    Row,
    field_is,
    head_row,
    weight_and_bias,
)
from trainer.checkpoint.huggingface.families.views import key, query, value, vocabulary
from trainer.config import NORM_EPS, ModelConfig

_OURS, _THEIRS = "decoder.layers", "transformer.h.{layer}"
_QKV, _ATTENTION = f"{_OURS}.self_attention.linear_qkv.weight", f"{_THEIRS}.attn.attention"


def _config(model: ModelConfig) -> dict[str, Any]:
    window = {} if model.attention_window is None else {"window_size": model.attention_window}  # both count oneself
    return {
        "max_position_embeddings": model.seq_length,
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "intermediate_size": model.ffn_size,
        "attention_types": _attention_types(model),
        **window,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": NORM_EPS,
        "embed_dropout": model.dropout,
        "resid_dropout": model.dropout,
        "attention_dropout": model.dropout,
    }


def _attention_types(model: ModelConfig) -> list[list[Any]]:
    """Their list of [pattern, repetitions]: the first layer is dense, and the last of an odd number is too."""
    if model.attention_window is None:
        return [[["global"], model.num_layers]]
    pairs, rest = divmod(model.num_layers, 2)
    return [[["global", "local"], pairs]] * bool(pairs) + [[["global"], rest]] * rest


def _model(config: Any) -> dict[str, Any]:
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "ffn_hidden_size": config.intermediate_size,
        "seq_length": config.max_position_embeddings,
        "attention_window": config.window_size if "local" in config.attention_layers else None,
        "biases": "all_but_qkv",
        "dropout": config.resid_dropout,
    }


GPT_NEO = Family(
    architecture="GPTNeoForCausalLM",
    requirements=(
        field_is("positions", "learned"),
        field_is("norm", "layer"),
        field_is("norm_placement", "pre"),
        field_is("activation", "gelu"),
        field_is("biases", "all_but_qkv"),
        KEYS_FOR_EVERY_HEAD,
    ),
    rows=(
        Row("embedding.word_embeddings.weight", "transformer.wte.weight", vocabulary),
        Row("embedding.position_embeddings.weight", "transformer.wpe.weight"),
        *weight_and_bias(f"{_OURS}.input_layernorm", f"{_THEIRS}.ln_1"),
        Row(_QKV, f"{_ATTENTION}.q_proj.weight", query, divisor=lambda model: math.sqrt(model.head_size)),
        Row(_QKV, f"{_ATTENTION}.k_proj.weight", key),
        Row(_QKV, f"{_ATTENTION}.v_proj.weight", value),
        *weight_and_bias(f"{_OURS}.self_attention.linear_proj", f"{_ATTENTION}.out_proj"),
        *weight_and_bias(f"{_OURS}.pre_mlp_layernorm", f"{_THEIRS}.ln_2"),
        *weight_and_bias(f"{_OURS}.mlp.linear_fc1", f"{_THEIRS}.mlp.c_fc"),
        *weight_and_bias(f"{_OURS}.mlp.linear_fc2", f"{_THEIRS}.mlp.c_proj"),
        *weight_and_bias("decoder.final_layernorm", "transformer.ln_f"),
        head_row("lm_head.weight"),
    ),
    config=_config,
    model=_model,
    # attention_layers is attention_types written out, and window_size counts in local layers alone
    immaterial=frozenset({"embed_dropout", "attention_dropout", "attention_types", "window_size"}),
    synonyms={"activation_function": GELU_TANH},
)
