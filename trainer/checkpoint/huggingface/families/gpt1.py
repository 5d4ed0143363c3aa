"""OpenAIGPTLMHeadModel: GPT-1, which has its norms after the residual additions, and always f = 4h."""

from typing import Any

from trainer.checkpoint.huggingface.families.family import (
    KEYS_FOR_EVERY_HEAD,
    Family,
    Requirement,
    Row,
    field_is,
    head_row,
    weight_and_bias,
)
from trainer.checkpoint.huggingface.families.views import qkv_blocks, qkv_blocks_transposed, transposed, vocabulary
from trainer.config import NORM_EPS, ModelConfig

_OURS, _THEIRS = "decoder.layers", "transformer.h.{layer}"

CONV1D_MATRICES = (
    Row(f"{_OURS}.self_attention.linear_qkv.weight", f"{_THEIRS}.attn.c_attn.weight", qkv_blocks_transposed),
    Row(f"{_OURS}.self_attention.linear_qkv.bias", f"{_THEIRS}.attn.c_attn.bias", qkv_blocks),
    *weight_and_bias(f"{_OURS}.self_attention.linear_proj", f"{_THEIRS}.attn.c_proj", transposed),
    *weight_and_bias(f"{_OURS}.mlp.linear_fc1", f"{_THEIRS}.mlp.c_fc", transposed),
    *weight_and_bias(f"{_OURS}.mlp.linear_fc2", f"{_THEIRS}.mlp.c_proj", transposed),
)
"""The linear layers of GPT-1 and GPT-2, whose classes hold them alike."""


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_positions": model.seq_length,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "afn": "gelu",  # which is the tanh approximation in this class
        "layer_norm_epsilon": NORM_EPS,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
    }


def _model(config: Any) -> dict[str, Any]:
    return {
        "num_layers": config.n_layer,
        "hidden_size": config.n_embd,
        "num_heads": config.n_head,
        "seq_length": config.n_positions,
        "norm_placement": "post",
        "dropout": config.resid_pdrop,
    }


GPT1 = Family(
    architecture="OpenAIGPTLMHeadModel",
    requirements=(
        field_is("positions", "learned"),
        field_is("norm", "layer"),
        field_is("norm_placement", "post"),
        field_is("activation", "gelu"),
        field_is("biases", "all"),
        field_is("attention_window", None),
        KEYS_FOR_EVERY_HEAD,
        Requirement("ffn_hidden_size", "null", lambda model: model.ffn_size == 4 * model.hidden_size),
    ),
    rows=(
        Row("embedding.word_embeddings.weight", "transformer.tokens_embed.weight", vocabulary),
        Row("embedding.position_embeddings.weight", "transformer.positions_embed.weight"),
        *CONV1D_MATRICES,
        *weight_and_bias(f"{_OURS}.self_attn_bda.norm", f"{_THEIRS}.ln_1"),
        *weight_and_bias(f"{_OURS}.mlp_bda.norm", f"{_THEIRS}.ln_2"),
        head_row("lm_head.weight"),
    ),
    config=_config,
    model=_model,
    immaterial=frozenset({"embd_pdrop", "attn_pdrop", "n_ctx", "n_special", "predict_special_tokens"}),
)
