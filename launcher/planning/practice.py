"""What a training system does that its layout does not say: ours, and those whose measurements are published."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.section import Section


class Practice(Section):
    """Defaults are this trainer's on CUDA."""

    attention: Literal["flash", "unfused"] = "flash"
    """A flash kernel, or products with softmax and dropout between them, whose matrices go through memory."""
    attention_share: float | None = Field(None, gt=0.0, le=1.0)
    """Of the best matrix product's rate: what the flash kernel reaches; empty: as in `constants.py`."""
    hides_tensor: Literal["nothing", "backward", "all"] = "backward"
    """Tensor-parallel communication that runs beside matrix products."""
    hides_pipeline: bool = False
    """Whether stages send while they compute."""
    hides_data: bool = False
    """Whether gradients and weights of data-parallel replicas travel while ranks compute."""
    shards_optimizer: bool = True
    """Whether data-parallel replicas share the optimizer's work (ZeRO)."""
    scatters_gradients: bool = False
    """Whether replicas get the sums of the gradients alone that they own. DeepSpeed's ZeRO 1 and 2, and what
    `trainer.engine.zero` has in their place, sum all of them everywhere; ZeRO 3 always scatters."""
    splits_messages: bool = False
    """Whether tensor-parallel ranks send a part each of what pipeline stages exchange, and gather it behind."""
    reduced_bytes: Literal[2, 4] = 4
    """Of a gradient as replicas add it up."""
    fuses_gradients: bool = False
    """Whether weights' gradients are added up by the matrix product that makes them."""
    fuses_pointwise: bool = False
    """Whether a bias, dropout and a residual, and a bias and an activation, are added in one kernel."""
    loss_bytes: float = 66.0
    """Moved for a logit by the loss. `trainer.model.cross_entropy`, forward: bf16 to fp32 (6), maximum (4), difference
    (8), exponential (8), sum (4); backward: to fp32 (6), difference (8), exponential (8), gradient (8), to bf16 (6)."""
    uses_storage: bool = True
    """Whether steps wait for data and for saves; published times have neither."""
    layers_of_stages: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """Layers of each pipeline stage; empty: equally many."""


OURS = Practice()
