"""LlamaForCausalLM: rotary positions, RMSNorm, SwiGLU, no biases, key-value heads of any number."""

from typing import Any

from trainer.checkpoint.huggingface.families.family import Family, Row, field_is, head_row
from trainer.checkpoint.huggingface.families.views import gate, key, query, up, value, vocabulary
from trainer.config import NORM_EPS, ModelConfig

_OURS, _THEIRS = "decoder.layers", "model.layers.{layer}"
_QKV, _FC1 = f"{_OURS}.self_attention.linear_qkv.weight", f"{_OURS}.mlp.linear_fc1.weight"


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": model.seq_length,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.ffn_size,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "attention_dropout": model.dropout,
    }


def _model(config: Any) -> dict[str, Any]:
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "ffn_hidden_size": config.intermediate_size,
        "seq_length": config.max_position_embeddings,
        "positions": "rotary",
        "rotary_base": config.rope_parameters["rope_theta"],
        "norm": "rms",
        "activation": "swiglu",
        "biases": "none",
        "dropout": config.attention_dropout,
    }


LLAMA = Family(
    architecture="LlamaForCausalLM",
    requirements=(
        field_is("positions", "rotary"),
        field_is("norm", "rms"),
        field_is("norm_placement", "pre"),
        field_is("activation", "swiglu"),
        field_is("biases", "none"),
        field_is("attention_window", None),
    ),
    rows=(
        Row("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocabulary),
        Row(f"{_OURS}.input_layernorm.weight", f"{_THEIRS}.input_layernorm.weight"),
        Row(_QKV, f"{_THEIRS}.self_attn.q_proj.weight", query),
        Row(_QKV, f"{_THEIRS}.self_attn.k_proj.weight", key),
        Row(_QKV, f"{_THEIRS}.self_attn.v_proj.weight", value),
        Row(f"{_OURS}.self_attention.linear_proj.weight", f"{_THEIRS}.self_attn.o_proj.weight"),
        Row(f"{_OURS}.pre_mlp_layernorm.weight", f"{_THEIRS}.post_attention_layernorm.weight"),
        Row(_FC1, f"{_THEIRS}.mlp.gate_proj.weight", gate),
        Row(_FC1, f"{_THEIRS}.mlp.up_proj.weight", up),
        Row(f"{_OURS}.mlp.linear_fc2.weight", f"{_THEIRS}.mlp.down_proj.weight"),
        Row("decoder.final_layernorm.weight", "model.norm.weight"),
        head_row("lm_head.weight"),
    ),
    config=_config,
    model=_model,
    synonyms={"hidden_act": {"swish": "silu"}},
)
