"""Keys and values of what has been read, so that every further token costs one position's work.

Rows of different lengths end at the same slot: the shorter ones begin with padding, which nothing attends to and no
position counts.

Shapes: b rows, s new positions, m key-value heads of this tensor-parallel rank, r query heads for each of them, d head
size, L slots filled.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.model.attention import attend


def attend_from_start(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, mask: Tensor | None = None
) -> Tensor:
    """Of positions with nothing before them: query [b, s, m, r, d], key and value [b, s, m, d] -> [b, s, m * r * d].

    Args:
        mask: what they attend to [b, 1, s, s], instead of all before them in the window.
    """
    b, s, m, r, d = query.shape
    if mask is None and window is not None and query.is_cuda:
        mask = band(s, window, query.device)  # the banded kernel there is compiled for every length
    query, key, value = query.reshape(b, s, m * r, d).transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if mask is None:
        context = attend(query, key, value, window)
    else:
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=r > 1)
    return context.transpose(1, 2).reshape(b, s, -1)


def band(length: int, window: int, device: torch.device) -> Tensor:
    """What causal attention in a window sees, [length, length]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


class KeyValueCache:
    """Of this rank's layers, for one batch: first all prompts at once, then a token at a time.

    A `trainer.model.forward_only.Attention`.
    """

    def __init__(self, paddings: Sequence[int], num_slots: int, device: torch.device) -> None:
        """paddings: of each row, in front of its first token."""
        self.num_slots = num_slots
        self._length = 0  # slots filled, those of the positions at work included
        self._device = device
        self._kept: list[tuple[Tensor, Tensor]] = []  # of each layer, [b, m, slots, d]
        self._masks: dict[int | None, Tensor] = {}
        self._keep(paddings)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order, any of them several times."""
        if list(rows) == list(range(len(self._paddings))):
            return
        index = torch.tensor(rows, device=self._device)
        for layer, (keys, values) in enumerate(self._kept):  # one after the other, for the memory of one copy
            self._kept[layer] = self._selected(keys, index), self._selected(values, index)
        self._keep([self._paddings[row] for row in rows])

    def advance(self, num_positions: int) -> Tensor:
        """Make room for so many positions in every row; returns which they are, [b, s]."""
        assert self._length == 0 or num_positions == 1
        slots = torch.arange(self._length, self._length + num_positions, device=self._device)
        self._length += num_positions
        self._masks.clear()
        return (slots - self._first).clamp_(min=0)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        b, s, m, _, d = query.shape
        if layer == len(self._kept):
            self._kept.append((key.new_empty(b, m, self.num_slots, d), key.new_empty(b, m, self.num_slots, d)))
        keys, values = self._kept[layer]
        end = self._length
        keys[:, :, end - s : end] = key.transpose(1, 2)
        values[:, :, end - s : end] = value.transpose(1, 2)
        mask = self._mask(s, window) if self._is_padded else None
        if end == s:
            return attend_from_start(query, key, value, window, mask)
        first = 0 if window is None else max(0, end - window)
        # the heads that share keys attend to them as so many positions would
        context = F.scaled_dot_product_attention(query[:, 0], keys[:, :, first:end], values[:, :, first:end], mask)
        return context.view(b, 1, -1)

    def _mask(self, num_positions: int, window: int | None) -> Tensor:
        """What the positions at work attend to, [b, 1, s, L] or as much of L as one position's window has."""
        if window not in self._masks:
            column = torch.arange(self._length, device=self._device)
            row = column[-num_positions:, None]
            seen = (column <= row) & (column >= self._first[:, :, None])
            if window is not None:
                seen &= column > row - window
            seen |= column == row  # in padding too: a position that sees nothing is no number
            first = max(0, self._length - window) if window is not None and num_positions == 1 else 0
            self._masks[window] = seen[:, None, :, first:]
        return self._masks[window]

    def _keep(self, paddings: Sequence[int]) -> None:
        self._paddings, self._is_padded = list(paddings), any(paddings)
        self._first = torch.tensor(self._paddings, device=self._device)[:, None]

    def _selected(self, tensor: Tensor, rows: Tensor) -> Tensor:
        selected = tensor.new_empty(len(rows), *tensor.shape[1:])
        selected[:, :, : self._length] = tensor[:, :, : self._length].index_select(0, rows)
        return selected
