"""What is supported: the one table behind the config's refusals, docs/layouts.md and the parity tests.

`FEATURES` says what can be combined: any two features of different axes work together. `RULES` says which values fit
together; a config that breaks one is refused with the rule, the values, the reason, and the nearest settings that work.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from trainer.rules import NUM_TRIES, AtLeast, AtMost, Condition, Equal, Multiple, Needs, Rule, Settings

# ----------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class Feature:
    """One value of an axis, with the smallest settings that turn it on."""

    axis: str
    name: str
    settings: Settings


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature("tensor", "TP", {"parallel.tensor": 2}),
        Feature("tensor", "SP", {"parallel.tensor": 2, "parallel.sequence": True}),
        Feature("pipeline", "PP", {"parallel.pipeline": 2}),
        Feature("pipeline", "PP interleaved", {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
        Feature("context", "CP", {"parallel.context": 2}),
        Feature("data", "DP ZeRO-1", {"parallel.data": 2}),
        Feature("data", "DP ZeRO-2", {"parallel.data": 2, "parallel.zero": 2}),
        Feature("data", "DP ZeRO-3", {"parallel.data": 2, "parallel.zero": 3}),
        Feature("offload", "offload", {"parallel.offload": "optimizer"}),
        Feature("recompute", "selective", {"train.recompute": "selective"}),
        Feature("recompute", "full", {"train.recompute": "full"}),
        Feature("precision", "bf16", {"train.precision": "bf16"}),
        Feature("embeddings", "untied", {"model.tied_embeddings": False}),
        Feature("attention", "banded", {"model.attention_window": 8}),
        Feature("heads", "GQA", {"model.num_kv_heads": 4}),
        Feature("positions", "rotary", {"model.positions": "rotary"}),
        Feature("norm", "RMSNorm", {"model.norm": "rms"}),
        Feature("order", "post-norm", {"model.norm_placement": "post"}),
        Feature("activation", "SwiGLU", {"model.activation": "swiglu"}),
        Feature("biases", "no biases", {"model.biases": "none"}),
    )
}


def combined(*features: Feature) -> dict[str, Any]:
    """The settings that turn all of them on."""
    return {key: value for feature in features for key, value in feature.settings.items()}


def pairs() -> Iterator[tuple[Feature, Feature]]:
    """Any two features of different axes."""
    return ((one, other) for one, other in combinations(FEATURES.values(), 2) if one.axis != other.axis)


# -------------------------------------------------------------------------------------------------------------- rules

_RANKS = ("parallel.tensor", "parallel.pipeline", "parallel.context", "parallel.data")
_INTERLEAVED = Condition(
    " where `parallel.virtual_pipeline` is above 1", lambda config: config.parallel.virtual_pipeline > 1
)
_CONTEXT = Condition(" where `parallel.context` is above 1", lambda config: config.parallel.context > 1)
_SEQUENCE = Condition(" with `parallel.sequence`", lambda config: config.parallel.sequence)
_BOTH = Condition(
    " where `parallel.context` is above 1, with `parallel.sequence`",
    lambda config: config.parallel.context > 1 and config.parallel.sequence,
)
_ROTARY = Condition(" where `model.positions` is `rotary`", lambda config: config.model.positions == "rotary")

RULES: tuple[Rule, ...] = (
    Multiple(
        whole=("model.hidden_size",),
        of=("model.num_heads",),
        why="all heads have the same size",
        example={"model.num_heads": 5},
        change=("model.hidden_size", "model.num_heads"),
    ),
    Multiple(
        whole=("model.num_heads",),
        of=("model.num_kv_heads",),
        why="each key-value head serves equally many attention heads",
        example={"model.num_kv_heads": 5},
        change=("model.num_kv_heads",),
        instead=("model.num_kv_heads", None),
    ),
    Multiple(
        whole=("model.hidden_size",),
        of=(2, "model.num_heads"),
        when=_ROTARY,
        why="rotary positions turn pairs of a head's elements",
        example={"model.positions": "rotary", "model.hidden_size": 36},
        change=("model.hidden_size", "model.num_heads"),
    ),
    Multiple(
        whole=("model.num_heads",),
        of=("parallel.tensor",),
        why="tensor parallel ranks share out whole heads",
        example={"parallel.tensor": 8},
        change=("parallel.tensor",),
    ),
    Multiple(
        whole=("model.num_kv_heads",),
        of=("parallel.tensor",),
        why="tensor parallel ranks share out whole heads",
        example={"parallel.tensor": 4, "model.num_kv_heads": 6},
        change=("parallel.tensor",),
    ),
    Multiple(
        whole=("model.ffn_hidden_size",),
        of=("parallel.tensor",),
        why="tensor parallel ranks hold equal parts of the feed-forward layer",
        example={"parallel.tensor": 4, "model.ffn_hidden_size": 3070},
        change=("parallel.tensor", "model.ffn_hidden_size"),
    ),
    Multiple(
        whole=("model.padded_vocab_size",),
        of=("parallel.tensor",),
        why="tensor parallel ranks hold equal parts of the embedding, whose rows are model.vocab_size rounded up",
        example={"parallel.tensor": 3, "model.vocab_size": 200},
        change=("parallel.tensor",),
    ),
    Multiple(
        whole=("model.num_heads",),
        of=("parallel.tensor", "parallel.context"),
        when=_CONTEXT,
        why="context parallel ranks trade a tensor parallel rank's heads for whole sequences",
        example={"parallel.context": 8},
        change=("parallel.context", "parallel.tensor"),
    ),
    Multiple(
        whole=("model.num_kv_heads",),
        of=("parallel.tensor", "parallel.context"),
        when=_CONTEXT,
        why="context parallel ranks trade a tensor parallel rank's heads for whole sequences",
        example={"parallel.context": 4, "model.num_kv_heads": 2},
        change=("parallel.context", "parallel.tensor"),
    ),
    Multiple(
        whole=("model.seq_length",),
        of=("parallel.tensor",),
        when=_SEQUENCE,
        why="sequence parallel splits every sequence over the tensor parallel ranks",
        example={"parallel.sequence": True, "parallel.tensor": 4, "model.seq_length": 30},
        change=("model.seq_length", "parallel.tensor"),
    ),
    Multiple(
        whole=("model.seq_length",),
        of=(2, "parallel.context"),
        when=_CONTEXT,
        why="each context parallel rank has an early and a late piece of every sequence",
        example={"parallel.context": 4, "model.seq_length": 30},
        change=("model.seq_length", "parallel.context"),
    ),
    Multiple(
        whole=("model.seq_length",),
        of=(2, "parallel.context", "parallel.tensor"),
        when=_BOTH,
        why="sequence parallel splits both pieces of a context parallel rank over the tensor parallel ranks",
        example={
            "parallel.context": 2,
            "parallel.tensor": 2,
            "parallel.sequence": True,
            "model.seq_length": 28,
        },
        change=("model.seq_length",),
        instead=("parallel.sequence", False),
    ),
    Multiple(
        whole=("model.num_layers",),
        of=("parallel.pipeline", "parallel.virtual_pipeline"),
        why="all pipeline stages have the same number of layers",
        example={"parallel.pipeline": 5},
        change=("model.num_layers", "parallel.pipeline", "parallel.virtual_pipeline"),
    ),
    Needs(
        key="parallel.virtual_pipeline",
        off=1,
        other="parallel.pipeline",
        other_off=1,
        other_on=range(2, 9),
        why="the interleaved schedule runs over several pipeline ranks",
        example={"parallel.virtual_pipeline": 2},
    ),
    Needs(
        key="parallel.sequence",
        off=False,
        other="parallel.tensor",
        other_off=1,
        other_on=range(2, 9),
        why="sequence parallel splits over tensor parallel ranks",
        yields=True,
        example={"parallel.sequence": True},
    ),
    Multiple(
        whole=("parallel.pipeline", "parallel.context", "parallel.data"),
        of=("launch.nodes",),
        why="the nodes share whole tensor parallel groups out evenly",
        yields=True,
        example={"launch.nodes": 2},
        change=("launch.nodes", "parallel.data"),
    ),
    Equal(
        left=_RANKS,
        right=("launch.nodes", "launch.ranks_per_node"),
        why="every rank of the layout has one place",
        yields=True,
        example={"launch.ranks_per_node": 2},
        change=("launch.ranks_per_node", "launch.nodes", "parallel.data"),
        instead=("launch.ranks_per_node", None),
    ),
    Multiple(
        whole=("train.global_batch_size",),
        of=("train.micro_batch_size", "parallel.data"),
        why="every replica runs whole micro-batches",
        example={"train.global_batch_size": 6, "train.micro_batch_size": 2, "parallel.data": 2},
        change=("train.global_batch_size", "train.micro_batch_size"),
    ),
    Multiple(
        whole=("train.global_batch_size",),
        of=("train.micro_batch_size", "parallel.data", "parallel.pipeline"),
        when=_INTERLEAVED,
        why="the interleaved schedule runs micro-batches in groups of parallel.pipeline",
        example={
            "train.global_batch_size": 6,
            "train.micro_batch_size": 2,
            "parallel.pipeline": 2,
            "parallel.virtual_pipeline": 2,
        },
        change=("train.global_batch_size", "train.micro_batch_size"),
        instead=("parallel.virtual_pipeline", 1),
    ),
    Needs(
        key="train.ramp_tokens",
        off=0,
        other="train.ramp_start_batch_size",
        other_off=None,
        other_on=range(1, 1 + NUM_TRIES),
        why="a batch that grows has a first size",
        example={"train.ramp_tokens": 1000},
    ),
    Needs(
        key="train.ramp_start_batch_size",
        off=None,
        other="train.ramp_tokens",
        other_off=0,
        why="a batch that grows does so over some tokens",
        example={"train.ramp_start_batch_size": 8},
    ),
    AtMost(
        key="train.ramp_start_batch_size",
        other="train.global_batch_size",
        fixes=lambda start, full: (("train.ramp_start_batch_size", full), ("train.global_batch_size", start)),
        why="the batch grows from the one to the other",
        example={"train.ramp_start_batch_size": 512, "train.ramp_tokens": 1000},
    ),
    Multiple(
        whole=("train.ramp_start_batch_size",),
        of=("train.micro_batch_size", "parallel.data"),
        why="the batch grows by this size, and every replica runs whole micro-batches",
        example={"train.ramp_start_batch_size": 6, "train.ramp_tokens": 1000, "train.micro_batch_size": 4},
        change=("train.ramp_start_batch_size", "train.micro_batch_size"),
    ),
    Multiple(
        whole=("train.ramp_start_batch_size",),
        of=("train.micro_batch_size", "parallel.data", "parallel.pipeline"),
        when=_INTERLEAVED,
        why="the batch grows by this size, and the interleaved schedule runs groups of parallel.pipeline micro-batches",
        example={
            "train.ramp_start_batch_size": 3,
            "train.ramp_tokens": 1000,
            "parallel.pipeline": 2,
            "parallel.virtual_pipeline": 2,
        },
        change=("train.ramp_start_batch_size", "train.micro_batch_size"),
        instead=("parallel.virtual_pipeline", 1),
    ),
    AtLeast(
        key="train.total_tokens",
        least=1,
        why="a run has a step",
        example={"train.total_tokens": 0},
    ),
    AtMost(
        key="optimizer.warmup_tokens",
        other="train.total_tokens",
        strictly=True,
        fixes=lambda warmup, total: (("optimizer.warmup_tokens", total // 20),),
        why="the learning rate would never reach its peak",
        yields=True,
        example={"train.total_tokens": 2000, "optimizer.warmup_tokens": 2000},
    ),
    AtMost(
        key="optimizer.warmup_tokens",
        other="optimizer.decay_tokens",
        strictly=True,
        fixes=lambda warmup, decay: (("optimizer.warmup_tokens", decay // 20),),
        why="the learning rate would never reach its peak",
        yields=True,
        example={"optimizer.decay_tokens": 2000, "optimizer.warmup_tokens": 3000},
    ),
)
