"""What the fullest rank holds, by part, and whether a device has room for it."""

from dataclasses import dataclass, fields

from launcher.planning.cluster import Cluster
from trainer import plan
from trainer.config import RunConfig

_CONTEXT_BYTES = {"cuda": 0.9e9, "cpu": 0.4e9}
"""Of a process that has computed once: driver, kernels and workspaces of libraries, on CPUs PyTorch itself."""
_COMMUNICATOR_BYTES = 0.2e9
"""Of NCCL for each kind of group that a rank is in; gloo has next to none."""
_BUCKET_ELEMENTS = 40_000_000
"""Gradients that travel together: `trainer.engine.deepspeed_config`."""
_FRAGMENTATION_SHARE = 0.05
"""Of what is allocated and freed in every step: what PyTorch's allocator on CUDA cannot use again."""
_HEAP_SHARE = 0.2
"""Of all that a rank holds on a CPU: holes in the C library's heap. Like the rule in `together` for what leaves more
of them, chosen to fit what was resident in the layouts of tests/planned_runs.py (benchmarks/NOTES.md)."""
_GATHERED_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: weights that ZeRO 3 leaves gathered from one use to the next."""


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
    """Of gradients on their way, of gathered weights, of the communication library: what they add at the peak."""
    context: float = 0.0
    """The process itself."""
    fragmentation: float = 0.0
    """A margin."""

    @property
    def total(self) -> float:
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True)
class Standing:
    """What neither the micro-batch nor chunks, sequence parallelism and recomputation change."""

    memory: RankMemory
    """All that is always there."""
    on_gpu: bool
    begin: float
    """Buffers beside all activations, when a backward pass begins."""
    reducing: float
    """When so many gradients have come that they are reduced."""
    updating: float
    """In the optimizer's update."""
    consumed_share: float | None
    """Of a micro-batch's activations: what is gone when gradients are reduced; None: it is done after the last."""
    in_threads: float
    """gloo's two threads keep a heap each, and either comes to copy weights, or under ZeRO 3 gradients."""


@dataclass(frozen=True)
class Passing:
    """What neither ZeRO nor offload changes."""

    activations: float
    logits: float
    of_microbatch: float
    """Activations of one micro-batch."""


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
    return together(standing(config, cluster, stage), passing(config, stage))


def together(stays: Standing, passes: Passing) -> RankMemory:
    """At the fullest of a step's moments.

    Activations are there in full when the backward pass begins. As it goes on they make room for gradients, until
    those are so many that they are reduced. In the update they are gone.
    """
    beside = passes.activations + passes.logits
    share = stays.consumed_share
    remaining = 0.0 if share is None else max(0.0, passes.activations - share * passes.of_microbatch)
    moments = (beside + stays.begin, remaining + stays.reducing, stays.updating)
    always = stays.memory
    buffers = max(moments) - beside
    if stays.on_gpu:
        margin = _FRAGMENTATION_SHARE * (always.communication + max(moments))
    else:
        again = sum(moments) - max(moments) + stays.in_threads
        margin = again + _HEAP_SHARE * (always.total - always.context + max(moments) + again)
    return RankMemory(
        weights=always.weights,
        gradients=always.gradients,
        optimizer=always.optimizer,
        activations=passes.activations,
        logits=passes.logits,
        communication=always.communication + buffers,
        context=always.context,
        fragmentation=margin,
    )


def standing(config: RunConfig, cluster: Cluster, stage: int) -> Standing:
    """On a rank of the stage."""
    parallel, on_gpu = config.parallel, cluster.kind == "cuda"
    state = plan.state_bytes_per_rank(config, stage)
    is_offloaded = on_gpu and parallel.offload == "optimizer"
    optimizer = 0 if is_offloaded else state.optimizer
    gradients = 0 if is_offloaded and parallel.zero > 1 else state.gradients
    on_device = state.total - (state.host if on_gpu else 0)
    buffers = on_device - state.weights - gradients - optimizer + (_library_bytes(config) if on_gpu else 0.0)
    weights = plan.parameters_per_rank(config, stage)
    reduced = min(_BUCKET_ELEMENTS, weights)
    bucket = _bucket_bytes(config, weights, on_gpu)
    always = bucket if parallel.zero == 3 else 0.0
    while_backward = bucket - always
    gathered = _gathered_by_gloo(config, weights) if not on_gpu else 0.0
    memory = RankMemory(
        weights=state.weights,
        gradients=gradients,
        optimizer=optimizer,
        communication=buffers + always,
        context=_CONTEXT_BYTES[cluster.kind],
    )
    return Standing(
        memory=memory,
        on_gpu=on_gpu,
        begin=while_backward + _gathered_bytes(config, weights),
        reducing=while_backward + _reduced_bytes(config, reduced, on_gpu),
        updating=_part_bytes(config, weights) + gathered,
        consumed_share=reduced / weights if parallel.zero > 1 else None,
        in_threads=gathered if on_gpu or parallel.zero < 3 else 4 * reduced,
    )


def passing(config: RunConfig, stage: int) -> Passing:
    """On a rank of the stage."""
    activations, logits = _activation_bytes(config, stage)
    return Passing(activations, logits, plan.activation_bytes_per_microbatch(config, stage) - logits)


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


def _library_bytes(config: RunConfig) -> float:
    parallel = config.parallel
    sizes = (parallel.tensor, parallel.context, parallel.pipeline, parallel.data)
    return _COMMUNICATOR_BYTES * sum(size > 1 for size in sizes)


def _bucket_bytes(config: RunConfig, weights: int, on_gpu: bool) -> float:
    """DeepSpeed's bucket, as long as it is there.

    Under ZeRO 3 always, in fp32, under the others in a backward pass. A CPU gives it memory as it is written to, which
    under ZeRO 1 and 2 is once activations go. Under ZeRO 1 in bf16 there is none, unless the optimizer is
    offloaded: gradients are flat already (`trainer.engine.zero`).
    """
    zero, e = config.parallel.zero, _element_bytes(config)
    if zero == 3:
        return 4 * (_BUCKET_ELEMENTS if on_gpu else min(_BUCKET_ELEMENTS, weights))
    is_flat = zero == 1 and e == 2 and config.parallel.offload != "optimizer"
    return e * _BUCKET_ELEMENTS if on_gpu and not is_flat else 0.0


def _gathered_bytes(config: RunConfig, weights: int) -> float:
    """By ZeRO 3: without a pipeline weights stay from one use to the next; with one they are freed after each.

    DeepSpeed knows of the next use only where it traces the order of modules, which a pipeline's stages cannot have.
    """
    parallel, e = config.parallel, _element_bytes(config)
    if parallel.zero < 3 or parallel.data * parallel.context == 1:
        return 0.0
    if parallel.pipeline == 1:
        return e * min(weights, _GATHERED_ELEMENTS)
    layer = sum(rows * columns for rows, columns in plan.matrices(config.model)) / parallel.tensor
    return 2 * e * layer


def _reduced_bytes(config: RunConfig, reduced: int, on_gpu: bool) -> float:
    """Of gradients, when so many have come that they are reduced, a bucket that is always there apart.

    ZeRO 1 adds up flat gradients in place in bf16; in fp32, when activations are gone, it has them in the bucket
    (counted here on CPUs, as for ZeRO 2). ZeRO 2 has them as they came, in the bucket, and in bf16 copied to fp32 on
    their way. ZeRO 3 has them in fp32 in the bucket, and once more in the order of ranks; gloo scatters sums from
    another copy.
    """
    zero, e = config.parallel.zero, _element_bytes(config)
    if zero == 1:
        return 0.0 if e == 2 or on_gpu else e * reduced
    if zero == 2:
        return reduced * (e + (0 if on_gpu else e) + (4 if e == 2 else 0))
    return reduced * (4 if on_gpu else 8)


def _part_bytes(config: RunConfig, weights: int) -> float:
    """In fp32 ZeRO 1 copies the gradients of a rank's part for the optimizer, when the bucket is gone."""
    parallel = config.parallel
    copies = parallel.zero == 1 and config.train.precision == "fp32"
    return 4 * weights / (parallel.data * parallel.context) if copies else 0.0


def _gathered_by_gloo(config: RunConfig, weights: int) -> float:
    """A copy of new weights, as replicas gather them."""
    parallel = config.parallel
    return _element_bytes(config) * weights if parallel.zero < 3 and parallel.data * parallel.context > 1 else 0.0


def _element_bytes(config: RunConfig) -> int:
    return 2 if config.train.precision == "bf16" else 4
