"""The layout in which a checkpoint answers requests, from that in which it was trained. Needs no torch."""

from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.rules import changed


def inference_config(config: RunConfig, replicas: int | None = None) -> RunConfig:
    """The config for as many ranks, each with the same part of the model, and nothing that only training needs.

    Tensor and pipeline ranks stay. What split sequences holds more replicas instead, and every stage is one chunk.

    Args:
        replicas: another number of them.

    Raises:
        UserError: another setting forbids it.
    """
    parallel = config.parallel
    is_as_many = replicas is None
    replicas = replicas or parallel.data * parallel.context
    settings = {
        **({} if is_as_many else {"launch.ranks_per_node": None}),
        "parallel.data": replicas,
        "parallel.context": 1,
        "parallel.sequence": False,
        "parallel.virtual_pipeline": 1,
        "parallel.zero": 1,
        "parallel.offload": "none",
        "train.recompute": "none",
        "train.transformer_engine": False,
        "train.global_batch_size": replicas,  # of no consequence but to the rules
        "train.micro_batch_size": 1,
        "train.ramp_start_batch_size": None,
        "train.ramp_tokens": 0,
    }
    return from_tree(changed(config, settings).model_dump(mode="json") | {"preset": None})


def is_for_inference(config: RunConfig) -> bool:
    parallel = config.parallel
    return parallel.context == parallel.virtual_pipeline == 1 and not parallel.sequence
