"""What is likely to be wrong with a layout on a cluster, each with its fix.

What cannot work at all (heads that do not divide, layers that do not share out) the config refuses by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from launcher.planning.cluster import Cluster
from launcher.planning.rank_memory import fullest, with_recompute
from launcher.planning.step_time import StepModel, StepTime
from launcher.planning.wall_time import WallTime
from trainer.config import RunConfig

_GIB = 2**30
_MICROBATCHES_PER_STAGE = 4  # below, the bubble is a fifth of the step and more
_THIN_ELEMENTS = 512  # the side of a matrix under which products lose a sixth and more of their rate
_FEW_TOKENS = 1024  # likewise, of a micro-batch on a rank
_IMBALANCE = 1.5  # of the slowest stage over the one in the middle
_PADDING_SHARE = 0.02
_DATA_SHARE = 0.15
_SAVING_SHARE = 0.02
_ROOM_SHARE = 0.9  # of memory, up to which one may plan
_TIGHT_SHARE = 0.05  # of memory, what estimates may be off by
_TILE = 64  # elements: kernels of matrix products work in multiples of it


@dataclass(frozen=True)
class Advice:
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.fix}"


def advice(config: RunConfig, cluster: Cluster, model: StepModel) -> list[Advice]:
    """The weightiest first."""
    step = model.step()
    return [
        *_memory(config, cluster),
        *_links(config, cluster),
        *_time(config, cluster, step),
        *_balance(config, model),
        *_shapes(config, cluster),
    ]


def advice_on_saving(wall: WallTime) -> Iterator[Advice]:
    """Where checkpoints at other times would save a fiftieth of the run and more."""
    if not wall.knows_failures or wall.goodput >= (1 - _SAVING_SHARE) * wall.best_goodput:
        return
    steps = wall.best_interval_steps
    yield Advice(
        f"a checkpoint every {wall.interval_steps:,} steps leaves {wall.goodput:.1%} of the time to training, where "
        f"{wall.best_goodput:.1%} is possible",
        f"set checkpoint.every_steps to {steps}",
    )


def roomier(config: RunConfig) -> list[str]:
    """Settings with which a rank takes less memory, on as many devices."""
    parallel, train = config.parallel, config.train
    ways = []
    if train.recompute != "full":
        ways.append(f"train.recompute={'selective' if train.recompute == 'none' else 'full'}")
    if train.micro_batch_size > 1:
        ways.append(f"train.micro_batch_size={train.micro_batch_size // 2}")
    if parallel.tensor > 1 and not parallel.sequence:
        ways.append("parallel.sequence=true")
    if parallel.data > 1 and parallel.zero < 3:
        ways.append(f"parallel.zero={parallel.zero + 1}")
    return ways


def _memory(config: RunConfig, cluster: Cluster) -> Iterator[Advice]:
    parallel, train = config.parallel, config.train
    free = cluster.memory_bytes - fullest(config, cluster).memory.total
    if free < 0:
        ways = [*roomier(config), "more parallel.tensor or parallel.pipeline"]
        yield Advice("the fullest rank has no room", f"try {', '.join(ways)}")
        return
    if free < _TIGHT_SHARE * cluster.memory_bytes:
        ways = [*roomier(config), "more parallel.tensor or parallel.pipeline"]
        yield Advice(
            f"the fullest rank leaves {free / _GIB:.1f} of {cluster.memory_bytes / _GIB:.1f} GiB free, less than this "
            "plan may be off by",
            f"try {', '.join(ways)}",
        )
    if parallel.offload == "optimizer" and cluster.kind == "cuda":
        need = fullest(_with_parallel(config, offload="none"), cluster).memory.total
        if need <= _ROOM_SHARE * cluster.memory_bytes:
            yield Advice(
                f"parallel.offload sends the optimizer to slower memory without need: beside it a rank takes "
                f"{need / _GIB:.1f} of {cluster.memory_bytes / _GIB:.1f} GiB",
                "set it to none",
            )
    cheaper = ("none", "selective") if train.recompute == "full" else ("none",)
    for recompute in cheaper if train.recompute != "none" else ():
        need = fullest(with_recompute(config, recompute), cluster).memory.total
        if need <= _ROOM_SHARE * cluster.memory_bytes:
            yield Advice(
                f"train.recompute {train.recompute} repeats work without need: with {recompute} the fullest rank takes "
                f"{need / _GIB:.1f} of {cluster.memory_bytes / _GIB:.1f} GiB",
                f"set it to {recompute}",
            )
            break
    if parallel.tensor > 1 and not parallel.sequence and config.model.seq_length % parallel.tensor == 0:
        yield Advice(
            f"parallel.tensor {parallel.tensor} without parallel.sequence: every rank keeps norms and residuals whole",
            "set parallel.sequence to true",
        )


def _with_parallel(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})


def _links(config: RunConfig, cluster: Cluster) -> Iterator[Advice]:
    parallel, here = config.parallel, cluster.devices_per_node
    if parallel.tensor > here:
        yield Advice(
            f"parallel.tensor {parallel.tensor} reaches over machines of {here} devices, and every layer waits for the "
            "network four times",
            f"use at most {here}, and more parallel.pipeline",
        )
    elif parallel.tensor * parallel.context > here and parallel.context > 1:
        yield Advice(
            f"parallel.tensor {parallel.tensor} x context {parallel.context} reaches over machines of {here} devices, "
            "and attention trades heads through the network",
            f"keep their product to {here}",
        )
    if config.launch.nodes > 1 and config.ranks_per_node > here:
        yield Advice(
            f"{config.ranks_per_node} ranks per machine, and the cluster's have {here} devices",
            f"set launch.nodes to {cluster.num_nodes(parallel.num_ranks)}",
        )
    elif config.launch.nodes > (full := -(-parallel.num_ranks // here)):
        yield Advice(
            f"launch.nodes {config.launch.nodes} leaves machines of {here} devices with {config.ranks_per_node} ranks, "
            f"and this plan is for {full} full",
            f"set launch.nodes to {full}",
        )
    if parallel.num_ranks > here and parallel.num_ranks % here:
        yield Advice(
            f"{parallel.num_ranks} ranks leave {-parallel.num_ranks % here} devices of a machine of {here} idle",
            "change parallel.data",
        )


def _time(config: RunConfig, cluster: Cluster, step: StepTime) -> Iterator[Advice]:
    parallel, num = config.parallel, config.num_microbatches
    waits = (parallel.pipeline - 1) / parallel.virtual_pipeline
    if parallel.pipeline > 1 and num < _MICROBATCHES_PER_STAGE * waits:
        wanted = _MICROBATCHES_PER_STAGE * (parallel.pipeline - 1)
        smaller = " a smaller train.micro_batch_size," if config.train.micro_batch_size > 1 else ""
        yield Advice(
            f"{num} micro-batches for {parallel.pipeline} pipeline stages: the bubble is "
            f"{step.bubble / step.seconds:.0%} of the step",
            f"use{smaller} less parallel.data, more parallel.virtual_pipeline, or {wanted} micro-batches",
        )
    if parallel.zero > 1 and parallel.pipeline > 1 and num > 1 and parallel.data * parallel.context > 1:
        yield Advice(
            f"parallel.zero {parallel.zero} with parallel.pipeline {parallel.pipeline} sends gradients "
            f"{'and weights ' if parallel.zero == 3 else ''}between replicas {num} times a step, once for each "
            "micro-batch, where ZeRO 1 does so once",
            "set parallel.zero to 1, with more parallel.tensor or pipeline if memory then is short",
        )
    elif step.data > _DATA_SHARE * step.seconds:
        every = " in every micro-batch" if parallel.zero > 1 and num > 1 else ""
        fix = "parallel.zero=1, or a larger batch" if every else "a larger batch, or fewer replicas of more ranks"
        yield Advice(
            f"gradients and weights travel{every} for {step.data / step.seconds:.0%} of the step", f"use {fix}"
        )
    if cluster.kind == "cuda" and config.train.precision == "fp32":
        yield Advice("train.precision fp32 leaves the devices' matrix units idle", "use bf16")


def _balance(config: RunConfig, model: StepModel) -> Iterator[Advice]:
    slowest, typical = (choose(stage.seconds for stage in model.stages) for choose in (max, median))
    if config.parallel.pipeline > 1 and slowest > _IMBALANCE * typical:
        yield Advice(
            f"the slowest pipeline stage takes {slowest / typical:.1f} times as long as others, for the output layer "
            f"of model.vocab_size {config.model.vocab_size}",
            "use less parallel.pipeline, and more parallel.tensor or data",
        )


def _shapes(config: RunConfig, cluster: Cluster) -> Iterator[Advice]:
    model, parallel = config.model, config.parallel
    waste = model.padded_vocab_size / model.vocab_size - 1
    if waste > _PADDING_SHARE:
        yield Advice(
            f"model.vocab_size {model.vocab_size} is padded to {model.padded_vocab_size}, {waste:.0%} for nothing",
            f"train a tokenizer of {model.padded_vocab_size} tokens",
        )
    if cluster.kind == "cpu":
        return
    tokens = config.train.micro_batch_size * model.seq_length // parallel.context
    if tokens < _FEW_TOKENS:
        yield Advice(
            f"a rank has {tokens} tokens of a micro-batch, too few to fill a device",
            f"use {'less parallel.context, or ' if parallel.context > 1 else ''}a larger train.micro_batch_size",
        )
    window = model.attention_window
    if parallel.context > 1 and window and model.seq_length // parallel.context < window:
        yield Advice(
            f"pieces of {model.seq_length // parallel.context} tokens are shorter than model.attention_window {window}",
            "use less parallel.context",
        )
    if parallel.tensor > 1 and model.hidden_size // parallel.tensor < _THIN_ELEMENTS:
        yield Advice(
            f"parallel.tensor {parallel.tensor} cuts matrices of model.hidden_size {model.hidden_size} to "
            f"{model.hidden_size // parallel.tensor} elements, too thin to be fast",
            "use less parallel.tensor, and more parallel.data or pipeline",
        )
    split = {
        "model.hidden_size": (model.hidden_size, model.hidden_size),
        "model.ffn_hidden_size": (model.ffn_size, model.ffn_size // parallel.tensor),
    }
    for name, (whole, side) in split.items():
        if side % _TILE:
            over = f" over {parallel.tensor} tensor-parallel ranks" if side != whole else ""
            multiple = _TILE * whole // side
            yield Advice(
                f"{name} {whole}{over} makes matrices with sides of {side}, not a multiple of {_TILE}, for which "
                "kernels fill up tiles",
                f"use {max(1, round(whole / multiple)) * multiple} if you may",
            )
    if model.head_size % 64:
        yield Advice(
            f"heads of {model.head_size} elements are slower than multiples of 64", "change model.num_heads if you may"
        )
