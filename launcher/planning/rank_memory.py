"""What the fullest rank holds, by part, and whether a device has room for it."""

from dataclasses import dataclass, fields

from launcher.planning.cluster import Cluster
from trainer import plan
from trainer.config import RunConfig

_CONTEXT_BYTES = {"cuda": 0.9e9, "cpu": 0.4e9}
"""Of a process that has computed once: driver, kernels and workspaces of libraries, on CPUs PyTorch itself."""
_COMMUNICATOR_BYTES = 0.2e9
"""Of NCCL for each kind of group that a rank is in; gloo has next to none."""
_FRAGMENTATION_SHARE = {"cuda": 0.05, "cpu": 0.35}
"""Of what is allocated and freed in every step: what the allocator cannot use again. A heap has larger holes."""
_GATHERED_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: weights that ZeRO 3 leaves gathered from one use to the next."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device of a rank; the sum of all parts is its peak."""

    weights: float
    gradients: float
    optimizer: float
    """fp32 master weights and two moments, unless they are offloaded."""
    activations: float
    """Kept from the forward to the backward pass, of all micro-batches in flight, and what recomputation makes anew."""
    logits: float
    """The output layer and the loss, on the last stage."""
    communication: float
    """Of gradients on their way, of gathered weights, of the communication library: what they add at the peak."""
    context: float
    """The process itself."""
    fragmentation: float
    """A margin."""

    @property
    def total(self) -> float:
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True)
class StageMemory:
    """Of a rank of one pipeline stage."""

    stage: int
    memory: RankMemory


def fullest(config: RunConfig, cluster: Cluster) -> StageMemory:
    """Of the stages the one whose ranks hold most."""
    stages = [StageMemory(stage, rank_memory(config, cluster, stage)) for stage in range(config.parallel.pipeline)]
    return max(stages, key=lambda stage: stage.memory.total)


def rank_memory(config: RunConfig, cluster: Cluster, stage: int) -> RankMemory:
    """On a CPU what is offloaded counts too: it is the same memory."""
    state = plan.state_bytes_per_rank(config, stage)
    on_gpu = cluster.kind == "cuda"
    is_offloaded = on_gpu and config.parallel.offload == "optimizer"
    optimizer = 0 if is_offloaded else state.optimizer
    gradients = 0 if is_offloaded and config.parallel.zero > 1 else state.gradients
    on_device = state.total - (state.host if on_gpu else 0)
    offload_buffers = on_device - state.weights - gradients - optimizer
    activations, logits = _activation_bytes(config, stage)
    buffers = offload_buffers + _communication_bytes(config, stage, activations, logits, on_gpu)
    passing = activations + logits + buffers
    return RankMemory(
        weights=state.weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        communication=buffers,
        context=_CONTEXT_BYTES[cluster.kind],
        fragmentation=_FRAGMENTATION_SHARE[cluster.kind] * passing,
    )


def with_recompute(config: RunConfig, recompute: str) -> RunConfig:
    """The same run with another amount of recomputation."""
    return config.model_copy(update={"train": config.train.model_copy(update={"recompute": recompute})})


def _activation_bytes(config: RunConfig, stage: int) -> tuple[float, float]:
    """Of layers and embedding, and of the output, of which there is one: the last stage turns round at once.

    While a layer is computed anew, all that it would have kept is there once, under selective recomputation its
    attention's part.
    """
    output = plan.activation_bytes_of_output(config) if stage == config.parallel.pipeline - 1 else 0
    in_flight = plan.microbatches_in_flight(config.parallel, config.num_microbatches, stage)
    kept = plan.activation_bytes_per_microbatch(config, stage) - output
    anew = 0
    if config.train.recompute != "none":
        keeping = with_recompute(config, "none")
        layers = range(min(2, config.model.num_layers))
        anew = max(
            plan.activation_bytes_per_layer(keeping, layer) - plan.activation_bytes_per_layer(config, layer)
            for layer in layers
        )
    return kept * in_flight + max(0, anew), output


def _communication_bytes(config: RunConfig, stage: int, activations: float, logits: float, on_gpu: bool) -> float:
    """What buffers add to activations and logits at the fullest moment of a step.

    Activations are there in full when the backward pass begins. As it goes on they make room for gradients of b
    weights, until those are so many that they are reduced. In the update they are gone.
    """
    parallel = config.parallel
    sizes = (parallel.tensor, parallel.context, parallel.pipeline, parallel.data)
    libraries = _COMMUNICATOR_BYTES * sum(size > 1 for size in sizes) if on_gpu else 0.0
    weights, bucket = plan.parameters_per_rank(config, stage), plan.bucket_elements(config)
    bucket = min(bucket, weights)
    of_one = plan.activation_bytes_per_microbatch(config, stage) - logits
    remaining = activations - of_one * bucket / weights
    moments = (
        activations + logits + _begin_bytes(config, stage, on_gpu),
        max(0.0, remaining) + _reducing_bytes(config, bucket),
        _update_bytes(config, weights, bucket, on_gpu),
    )
    return libraries + max(moments) - activations - logits


def _begin_bytes(config: RunConfig, stage: int, on_gpu: bool) -> float:
    """When the backward pass begins.

    ZeRO 3 has weights gathered, and traces no order of a pipeline's modules: they are freed after use. DeepSpeed's
    bucket is there, under ZeRO 3 always in fp32, but a CPU gives it memory only as it is written to; under ZeRO 1 in
    bf16 there is none, as gradients are flat already (`trainer.engine.zero`).
    """
    parallel, e = config.parallel, _element_bytes(config)
    is_flat = parallel.zero == 1 and config.train.precision == "bf16"
    bucket = 0.0 if is_flat or not on_gpu else (4 if parallel.zero == 3 else e) * plan.bucket_elements(config)
    if parallel.zero < 3 or parallel.data * parallel.context == 1:
        return bucket
    if parallel.pipeline == 1:
        return bucket + e * min(plan.parameters_per_rank(config, stage), _GATHERED_ELEMENTS)
    layer = sum(rows * columns for rows, columns in plan.matrices(config.model)) / parallel.tensor
    return bucket + 2 * e * layer


def _reducing_bytes(config: RunConfig, bucket: int) -> float:
    """When so many gradients have come that they are reduced.

    ZeRO 2 has them twice, as they came and in the bucket, and copied to fp32 on their way; ZeRO 3 in fp32, and once
    more in the order of ranks.
    """
    e = _element_bytes(config)
    match config.parallel.zero:
        case 1:
            return 0.0
        case 2:
            return bucket * (2 * e + (4 if e == 2 else 0))
    return bucket * 8


def _update_bytes(config: RunConfig, weights: int, bucket: int, on_gpu: bool) -> float:
    """ZeRO 1 reduces gradients in fp32 through the bucket; gloo gathers new weights in a copy."""
    e = _element_bytes(config)
    reduced = e * bucket if config.parallel.zero == 1 and e == 4 else 0.0
    is_copied = not on_gpu and config.parallel.zero < 3 and config.parallel.data * config.parallel.context > 1
    return max(reduced, e * weights if is_copied else 0.0)


def _element_bytes(config: RunConfig) -> int:
    return 2 if config.train.precision == "bf16" else 4
