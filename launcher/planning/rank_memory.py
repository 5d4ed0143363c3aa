"""What the fullest rank holds, by part, and whether a device has room for it."""

from dataclasses import dataclass, fields

from launcher.planning.cluster import Cluster
from trainer import plan
from trainer.config import RunConfig

_CONTEXT_BYTES = {"cuda": 0.9e9, "cpu": 0.5e9}
"""Of a process that has computed once: driver, kernels and workspaces of libraries, on CPUs PyTorch itself."""
_BUCKET_BYTES = 4 * 40_000_000
"""Of gradients that travel together: 40 million in fp32, `trainer.engine.deepspeed_config`."""
_COMMUNICATOR_BYTES = 0.2e9
"""Of NCCL for each kind of group that a rank is in; gloo has next to none."""
_FRAGMENTATION_SHARE = 0.05
"""Of what is allocated and freed in every step: what the allocator cannot use again."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on the device of a rank; the sum of all parts is its peak."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    """fp32 master weights and two moments, unless they are offloaded."""
    activations: float = 0.0
    """Kept from the forward to the backward pass, of all micro-batches in flight, and what recomputation makes anew."""
    logits: float = 0.0
    """The output layer and the loss, on the last stage."""
    communication: float = 0.0
    """Buffers: of gradients on their way, of gathered weights under ZeRO 3, of the communication library."""
    context: float = 0.0
    """The process itself."""
    fragmentation: float = 0.0
    """A margin."""

    @property
    def total(self) -> float:
        return sum(getattr(self, each.name) for each in fields(self))

    def __add__(self, other: "RankMemory") -> "RankMemory":
        return RankMemory(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})


@dataclass(frozen=True)
class StageMemory:
    """Of a rank of one pipeline stage."""

    stage: int
    memory: RankMemory


def fullest(config: RunConfig, cluster: Cluster) -> StageMemory:
    """Of the stages the one whose ranks hold most."""
    stages = [StageMemory(stage, rank_memory(config, cluster, stage)) for stage in candidates(config.parallel.pipeline)]
    return max(stages, key=lambda stage: stage.memory.total)


def candidates(num_stages: int) -> list[int]:
    """Stages of which one is the fullest: the first, the second, the last.

    Any other has as many layers of each kind as the one two before it, and never more micro-batches in flight.
    """
    return sorted({*range(num_stages)[:2], num_stages - 1})


def rank_memory(config: RunConfig, cluster: Cluster, stage: int) -> RankMemory:
    """On a CPU what is offloaded counts too: it is the same memory."""
    return standing(config, cluster, stage) + passing(config, stage)


def standing(config: RunConfig, cluster: Cluster, stage: int) -> RankMemory:
    """What neither the micro-batch nor chunks, sequence parallelism and recomputation change."""
    state = plan.state_bytes_per_rank(config, stage)
    on_gpu = cluster.kind == "cuda"
    is_offloaded = on_gpu and config.parallel.offload == "optimizer"
    optimizer = 0 if is_offloaded else state.optimizer
    gradients = 0 if is_offloaded and config.parallel.zero > 1 else state.gradients
    on_device = state.total - (state.host if on_gpu else 0)
    offload_buffers = on_device - state.weights - gradients - optimizer
    buffers = offload_buffers + _communication_bytes(config, stage, on_gpu)
    return RankMemory(
        weights=state.weights,
        gradients=gradients,
        optimizer=optimizer,
        communication=buffers,
        context=_CONTEXT_BYTES[cluster.kind],
        fragmentation=_FRAGMENTATION_SHARE * buffers,
    )


def passing(config: RunConfig, stage: int) -> RankMemory:
    """What neither ZeRO nor offload changes: activations and logits."""
    activations, logits = _activation_bytes(config, stage)
    return RankMemory(
        activations=activations, logits=logits, fragmentation=_FRAGMENTATION_SHARE * (activations + logits)
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


def _communication_bytes(config: RunConfig, stage: int, on_gpu: bool) -> float:
    parallel = config.parallel
    sizes = (parallel.tensor, parallel.context, parallel.pipeline, parallel.data)
    libraries = _COMMUNICATOR_BYTES * sum(size > 1 for size in sizes) if on_gpu else 0.0
    if parallel.data * parallel.context == 1:
        return libraries
    gathered = 0.0
    if parallel.zero == 3:  # the layer at work and the one that comes
        layer = sum(rows * columns for rows, columns in plan.matrices(config.model)) / parallel.tensor
        gathered = 2 * layer * (2 if config.train.precision == "bf16" else 4)
    weights = plan.parameters_per_rank(config, stage)
    return libraries + min(_BUCKET_BYTES, 4 * weights) + gathered
