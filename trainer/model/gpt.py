"""GPT from megatron-core's layer specs: the chunks of the model that this rank owns.

Shapes: s sequence, b batch, v this tensor-parallel rank's rows of the padded vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from trainer import parallel
from trainer.config import NORM_EPS, ModelConfig, RunConfig
from trainer.model import transformer_engine
from trainer.model.attention import CausalAttention
from trainer.model.cross_entropy import OutputLayer
from trainer.model.norm import NormAfterResidual, norm_class

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as the GPT papers' released code has it."""
    return F.gelu(x, approximate="tanh")


def transformer_config(config: RunConfig) -> TransformerConfig:
    """megatron-core's config of this run."""
    model, layout = config.model, config.parallel
    bf16 = config.train.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.kv_heads,
        ffn_hidden_size=model.ffn_size,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        activation_func=F.silu if model.activation == "swiglu" else gelu_tanh,
        gated_linear_unit=model.activation == "swiglu",
        add_bias_linear=model.biases != "none",
        normalization="RMSNorm" if model.norm == "rms" else "LayerNorm",
        layernorm_epsilon=NORM_EPS,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        sequence_parallel=layout.sequence,
        context_parallel_size=layout.context,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,  # trainer.model.init draws every weight, the same in every layout
        use_cpu_initialization=True,
        batch_p2p_comm=False,  # gloo has no batched point-to-point
        deallocate_pipeline_outputs=True,
        **_banded_layers(model),
        **_RECOMPUTE[config.train.recompute],
    )


def _banded_layers(model: ModelConfig) -> dict[str, Any]:
    """Layers alternate between dense and banded; the first is dense (as in GPT-Neo: the GPT-3 paper does not say)."""
    if model.attention_window is None:
        return {}
    banded = [layer % 2 for layer in range(model.num_layers)]
    return {"window_size": (model.attention_window - 1, 0), "window_attn_skip_freq": banded}


class GPT(GPTModel):
    """megatron-core's GPT with an output layer that computes the loss itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer.__class__ = OutputLayer  # megatron-core takes no spec for this layer

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **_: Any) -> Tensor:
        """Hidden states [s, b, h] on to the next stage, or token losses [b, s], or logits where there are no labels."""
        if not self.post_process:
            return hidden_states
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, labels, tied)


def build_chunks(config: RunConfig) -> list[GPT]:
    """This rank's virtual pipeline chunks, uninitialised (weights are whatever memory held)."""
    mcore_config = transformer_config(config)
    virtual = config.parallel.virtual_pipeline
    stages = range(virtual) if virtual > 1 else (None,)
    return [_build_chunk(config, mcore_config, stage) for stage in stages]


def _build_chunk(config: RunConfig, mcore_config: TransformerConfig, virtual_stage: int | None) -> GPT:
    model = config.model
    chunk = GPT(
        mcore_config,
        _block_spec(config, mcore_config, virtual_stage),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.seq_length,
        pre_process=parallel.is_first_stage(virtual_stage),
        post_process=parallel.is_last_stage(virtual_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="none" if model.positions == "rotary" else "learned_absolute",
        vp_stage=virtual_stage,
    )
    if chunk.post_process:
        chunk.output_layer.vocab_size = model.vocab_size
    return chunk.to(mcore_config.params_dtype)


def _block_spec(
    config: RunConfig, mcore_config: TransformerConfig, virtual_stage: int | None
) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(normalization=mcore_config.normalization)
    model, parts, norm = config.model, layer.submodules, norm_class(mcore_config)
    if config.train.transformer_engine:
        norm = transformer_engine.norm_class()
        transformer_engine.use_linear_layers(layer)
    parts.sharded_state_dict_keys_map = {}  # tensors are stored under the names that modules have here
    attention = parts.self_attention.submodules
    rotary_base = model.rotary_base if model.positions == "rotary" else None
    attention.core_attention = ModuleSpec(CausalAttention, params={"rotary_base": rotary_base})
    if model.biases == "all_but_qkv":
        attention.linear_qkv = _without_bias(attention.linear_qkv)
    if model.norm_placement == "pre":
        parts.input_layernorm = parts.pre_mlp_layernorm = norm
    else:
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        add_then_norm = ModuleSpec(NormAfterResidual, params={"config": mcore_config, "norm": norm})
        parts.self_attn_bda = parts.mlp_bda = add_then_norm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(mcore_config, virtual_stage),
        layer_norm=norm if model.norm_placement == "pre" else None,
    )


def _without_bias(linear: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    return lambda *args, **kwargs: linear(*args, **kwargs | {"bias": False})
