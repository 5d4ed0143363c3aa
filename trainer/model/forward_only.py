"""The layers of a chunk in plain PyTorch: what megatron-core's compute, without what only training needs.

A token at a time, megatron-core's modules spend more time on their way to a matrix product than in it. Here are the
same weights, read where they lie. No dropout, no sequence or context parallelism, one chunk a stage.

Shapes: b sequences, s positions, t = b * s tokens, h hidden, m key-value heads of this tensor-parallel rank, r query
heads for each of them, d head size, v this rank's rows of the padded vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainer import parallel
from trainer.model.gpt import GPT, gelu_tanh
from trainer.model.rotary import cos_and_sin, turn

Map = Callable[[Tensor], Tensor]


class Attention(Protocol):
    """What the layers leave open: what a position attends to beyond the positions at work."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """query [b, s, m, r, d], key and value [b, s, m, d], rotated -> [b, s, m * r * d].

        Args:
            layer: counted among those of this rank.
            window: how many positions each sees, its own included; None for all before it.
        """


class ForwardOnly:
    """A chunk's weights, and the way through them."""

    def __init__(self, chunk: GPT) -> None:
        """Takes the chunk over: it may be laid out anew in memory."""
        self._chunk = chunk
        self._output = _output_weight(chunk) if chunk.post_process else None
        self.is_first, self.is_last = chunk.pre_process, chunk.post_process
        self._layers = [_layer(number, layer) for number, layer in enumerate(chunk.decoder.layers)]
        final = chunk.decoder.final_layernorm
        self._final_norm: Map = final.forward if final is not None else _same

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[b, s] each -> [t, h], in the first stage."""
        embedding = self._chunk.embedding
        words = embedding.word_embeddings(tokens)
        if embedding.add_position_embedding:
            words = words + embedding.position_embeddings(positions)
        return words.flatten(0, 1)

    def hidden(self, hidden: Tensor, positions: Tensor, num_positions: int, attention: Attention) -> Tensor:
        """[t, h] in front of the layers of this chunk -> [t, h] behind them.

        Args:
            positions: [b, s] of the tokens in their sequences.
            num_positions: beyond any of them.
        """
        b, s = positions.shape
        rotation = self._rotation(positions, num_positions)
        for layer in self._layers:
            hidden = layer(hidden, b, s, rotation, attention)
        return self._final_norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[t, h] -> logits [t, v] of this rank, in the last stage, those of rows that only pad the vocabulary too."""
        assert self._output is not None
        return F.linear(hidden, self._output)

    def _rotation(self, positions: Tensor, num_positions: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines, each [b, s, 1, 1, d / 2]."""
        attention = self._chunk.decoder.layers[0].self_attention
        base = attention.core_attention.rotary_base
        if base is None:
            return None
        cos, sin = cos_and_sin(num_positions, attention.hidden_size_per_attention_head, base, positions.device)
        return cos[positions], sin[positions]


@dataclass(frozen=True)
class _Layer:
    number: int
    window: int | None
    num_kv_heads: int
    head_size: int
    norms_before: tuple[Map, Map]
    """Of attention and of the feed-forward layer."""
    norms_after: tuple[Map, Map]
    """After the residual has been added: one of the two pairs does nothing."""
    qkv: Map
    projection: Map
    up: Map
    activation: Map
    down: Map

    def __call__(
        self, hidden: Tensor, b: int, s: int, rotation: tuple[Tensor, Tensor] | None, attention: Attention
    ) -> Tensor:
        # by key-value head, the rows of its queries, of its key and of its value
        heads = self.qkv(self.norms_before[0](hidden)).view(b, s, self.num_kv_heads, -1, self.head_size)
        value = heads[..., -1, :]
        if rotation is not None:
            heads = turn(heads[..., :-1, :], *rotation)
            query, key = heads[..., :-1, :], heads[..., -1, :]
        else:
            query, key = heads[..., :-2, :], heads[..., -2, :]
        attended = attention(self.number, query, key, value, self.window).view(b * s, -1)
        hidden = self.norms_after[0](hidden + self.projection(attended))
        inner = self.activation(self.up(self.norms_before[1](hidden)))
        return self.norms_after[1](hidden + self.down(inner))


def _layer(number: int, layer: Any) -> _Layer:
    """Of megatron-core's."""
    attention, mlp = layer.self_attention, layer.mlp
    is_post = hasattr(layer.self_attn_bda, "norm")
    return _Layer(
        number=number,
        window=attention.core_attention.window,
        num_kv_heads=attention.num_query_groups_per_partition,
        head_size=attention.hidden_size_per_attention_head,
        norms_before=(_same, _same) if is_post else (layer.input_layernorm.forward, layer.pre_mlp_layernorm.forward),
        norms_after=(layer.self_attn_bda.norm.forward, layer.mlp_bda.norm.forward) if is_post else (_same, _same),
        qkv=_columns(attention.linear_qkv),
        projection=_rows(attention.linear_proj),
        up=_columns(mlp.linear_fc1),
        activation=_gated if mlp.config.gated_linear_unit else gelu_tanh,
        down=_rows(mlp.linear_fc2),
    )


def _output_weight(chunk: GPT) -> Tensor:
    is_tied = chunk.share_embeddings_and_output_weights
    return _laid_out(chunk.shared_embedding_or_output_weight() if is_tied else chunk.output_layer.weight)


def _laid_out(weight: Tensor) -> Tensor:
    """The same matrix, with its columns contiguous where that is faster.

    On a processor in fp32 a single row times the matrix takes 25 to 40 % less, and many rows take as long as before; in
    bf16 it would take half as long again.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous():
        weight.data = weight.data.t().contiguous().t()
    return weight


def _columns(linear: Any) -> Map:
    """A matrix whose output is split over tensor-parallel ranks, and whose input all have."""
    weight, bias = _laid_out(linear.weight), linear.bias
    return lambda x: F.linear(x, weight, bias)


def _rows(linear: Any) -> Map:
    """A matrix whose input is split, and whose output is the sum over the ranks."""
    weight, bias = _laid_out(linear.weight), linear.bias
    if parallel.tensor_size() == 1:
        return lambda x: F.linear(x, weight, bias)

    def summed(x: Tensor) -> Tensor:
        part = F.linear(x, weight)
        dist.all_reduce(part, group=parallel.tensor_group())
        return part if bias is None else part.add_(bias)

    return summed


def _gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _same(x: Tensor) -> Tensor:
    return x
