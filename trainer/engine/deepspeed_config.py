"""What DeepSpeed is told, derived from the config."""

from typing import Any

from trainer.config import RunConfig

REDUCE_BUCKET_ELEMENTS = 40_000_000  # gradients that travel together; DeepSpeed's default holds 2 GB for them


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's JSON for this run. Accumulation is left to megatron-core's schedule."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": config.parallel.zero, "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "steps_per_print": 10**9,
    }
    if config.parallel.offload == "optimizer":
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if config.train.precision == "bf16":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings
