"""GPT2LMHeadModel: dense attention, norms before the blocks, biases everywhere."""

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
from trainer.checkpoint.huggingface.families.gpt1 import CONV1D_MATRICES
from trainer.checkpoint.huggingface.families.views import vocabulary
from trainer.config import NORM_EPS, ModelConfig


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_positions": model.seq_length,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.ffn_size,
        "activation_function": "gelu_new",
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
        "ffn_hidden_size": config.n_inner,
        "seq_length": config.n_positions,
        "dropout": config.resid_pdrop,
    }


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    requirements=(
        field_is("positions", "learned"),
        field_is("norm", "layer"),
        field_is("norm_placement", "pre"),
        field_is("activation", "gelu"),
        field_is("biases", "all"),
        field_is("attention_window", None),
        KEYS_FOR_EVERY_HEAD,
    ),
    rows=(
        Row("embedding.word_embeddings.weight", "transformer.wte.weight", vocabulary),
        Row("embedding.position_embeddings.weight", "transformer.wpe.weight"),
        *weight_and_bias("decoder.layers.input_layernorm", "transformer.h.{layer}.ln_1"),
        *CONV1D_MATRICES,
        *weight_and_bias("decoder.layers.pre_mlp_layernorm", "transformer.h.{layer}.ln_2"),
        *weight_and_bias("decoder.final_layernorm", "transformer.ln_f"),
        head_row("lm_head.weight"),
    ),
    config=_config,
    model=_model,
    immaterial=frozenset({"embd_pdrop", "attn_pdrop", "n_ctx"}),
    synonyms={"activation_function": GELU_TANH},
)
