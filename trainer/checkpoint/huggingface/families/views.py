"""Where in our tensors the elements of theirs lie, as views: to be read for an export, to be filled for an import.

Shapes: h hidden, n heads, m key-value heads, d = h / n, f feed-forward, V vocabulary.
"""

from collections.abc import Callable

from torch import Tensor

from trainer.config import ModelConfig

View = Callable[[Tensor, ModelConfig], Tensor]
"""A view of one layer's global tensor whose elements, in order, are those of theirs; it need not have their shape."""


def whole(tensor: Tensor, _: ModelConfig) -> Tensor:
    return tensor


def transposed(tensor: Tensor, _: ModelConfig) -> Tensor:
    """The weight of their Conv1D, which is [in, out]."""
    return tensor.T


def vocabulary(rows: Tensor, model: ModelConfig) -> Tensor:
    """Without the rows that only pad it."""
    return rows[: model.vocab_size]


def qkv_groups(rows: Tensor, model: ModelConfig) -> Tensor:
    """megatron-core's linear_qkv [(n + 2m) d, ...] as [m, n / m queries + key + value, d, ...]."""
    return rows.unflatten(0, (model.kv_heads, -1, model.head_size))


def query(rows: Tensor, model: ModelConfig) -> Tensor:
    return qkv_groups(rows, model)[:, :-2]


def key(rows: Tensor, model: ModelConfig) -> Tensor:
    return qkv_groups(rows, model)[:, -2]


def value(rows: Tensor, model: ModelConfig) -> Tensor:
    return qkv_groups(rows, model)[:, -1]


def qkv_blocks(rows: Tensor, model: ModelConfig) -> Tensor:
    """All queries, then all keys, then all values; of models whose every head has a key: [3, n, d, ...]."""
    return qkv_groups(rows, model).transpose(0, 1)


def qkv_blocks_transposed(rows: Tensor, model: ModelConfig) -> Tensor:
    """`qkv_blocks` as the weight of a Conv1D: [h, 3, n, d]."""
    return qkv_blocks(rows, model).movedim(-1, 0)


def gate(rows: Tensor, model: ModelConfig) -> Tensor:
    """The half of a SwiGLU's linear_fc1 [2f, h] that goes through SiLU."""
    return rows[: model.ffn_size]


def up(rows: Tensor, model: ModelConfig) -> Tensor:
    return rows[model.ffn_size :]
