"""TransformerEngine's norms and linear layers in the place of PyTorch's; the only file that imports it.

Their parameters have the same names, so that checkpoints fit either kind. Written against megatron-core's wrappers and
not yet run: it needs CUDA and the transformer-engine package.
"""

from importlib.util import find_spec

from megatron.core.transformer.spec_utils import ModuleSpec

from trainer.config import UserError


def norm_class() -> type:
    """Builds a LayerNorm or an RMSNorm, as the megatron-core config says, and marks it for sequence parallelism.

    Raises:
        UserError: the package is not installed.
    """
    if find_spec("transformer_engine") is None:
        raise UserError(
            "train.transformer_engine is true and transformer-engine is not installed; install it, or set it to false"
        )
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def use_linear_layers(layer: ModuleSpec) -> None:
    """Put them into a layer's spec. Call `norm_class` first, which says what is missing."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    attention, feed_forward = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    attention.linear_qkv = feed_forward.linear_fc1 = TEColumnParallelLinear
    attention.linear_proj = feed_forward.linear_fc2 = TERowParallelLinear
