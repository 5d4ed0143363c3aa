"""Keys and values of what has been read, so that every further token costs one position's work.

Rows of different lengths end at the same slot: the shorter ones begin with padding, which nothing attends to and no
position counts.

Shapes: b rows, s new positions, n heads of this tensor-parallel rank, m key-value heads (m divides n), d head size,
L slots filled.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.model.attention import CausalAttention, attend
from trainer.model.rotary import cos_and_sin, turn


class KeyValueCache:
    """Of this rank's layers, for one batch: first all prompts at once, then a token at a time."""

    def __init__(
        self, attentions: Iterable[CausalAttention], paddings: Sequence[int], num_slots: int, device: torch.device
    ) -> None:
        """paddings: of each row, in front of its first token."""
        self.length = 0
        """Slots filled, those of the positions at work included."""
        self._num_slots, self._device = num_slots, device
        self._layers = [_Layer(self, attention, num_slots) for attention in attentions]
        self._keep(paddings)

    def attach(self) -> None:
        """From now on the layers' attention reads and fills this cache."""
        for layer in self._layers:
            layer.attention.memory = layer

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order, any of them several times."""
        if list(rows) == list(range(len(self._paddings))):
            return
        index = torch.tensor(rows, device=self._device)
        for layer in self._layers:
            layer.select(index)
        self._keep([self._paddings[row] for row in rows])

    def advance(self, num_positions: int) -> Tensor:
        """Make room for so many positions in every row; returns which they are, [b, s]."""
        assert self.length == 0 or num_positions == 1
        slots = torch.arange(self.length, self.length + num_positions, device=self._device)
        self.length += num_positions
        self.positions = (slots - self._first).clamp(min=0)
        self._masks: dict[int | None, Tensor | None] = {}
        self._turns: dict[float, tuple[Tensor, Tensor]] = {}
        return self.positions

    def mask(self, window: int | None) -> Tensor | None:
        """What the positions at work attend to [b, 1, s, L]; None where that is all that causal attention does."""
        if not any(self._paddings):
            return None
        if window not in self._masks:
            column = torch.arange(self.length, device=self._device)
            row = column[-self.positions.shape[1] :, None]
            seen = (column <= row) & (column >= self._first[:, :, None])
            if window is not None:
                seen &= column > row - window
            seen |= column == row  # in padding too: a position that sees nothing is no number
            self._masks[window] = seen.unsqueeze(1)
        return self._masks[window]

    def rotation(self, base: float, head_size: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines at the positions at work, each [s, b, 1, d / 2]."""
        if base not in self._turns:
            tables = cos_and_sin(self._num_slots, head_size, base, self._device)
            cos, sin = (table[self.positions.t(), 0] for table in tables)
            self._turns[base] = cos, sin
        return self._turns[base]

    def _keep(self, paddings: Sequence[int]) -> None:
        self._paddings = list(paddings)
        self._first = torch.tensor(self._paddings, device=self._device)[:, None]


class _Layer:
    """One layer's keys and values; a `trainer.model.attention.Memory`."""

    def __init__(self, cache: KeyValueCache, attention: CausalAttention, num_slots: int) -> None:
        self.attention = attention
        self._cache, self._num_slots = cache, num_slots
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        assert self._keys is not None and self._values is not None
        self._keys, self._values = (self._selected(tensor, rows) for tensor in (self._keys, self._values))

    def _selected(self, tensor: Tensor, rows: Tensor) -> Tensor:
        selected = tensor.new_empty(len(rows), *tensor.shape[1:])
        selected[:, :, : self._cache.length] = tensor[:, :, : self._cache.length].index_select(0, rows)
        return selected

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [s, b, n, d], key and value [s, b, m, d] of the positions at work -> [s, b, n * d]."""
        cache, window, base = self._cache, self.attention.window, self.attention.rotary_base
        s, b, n, d = query.shape
        if base is not None:
            rotation = cache.rotation(base, d)
            query, key = turn(query, *rotation), turn(key, *rotation)
        key, value = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        if self._keys is None or self._values is None:
            self._keys, self._values = (x.new_empty(b, key.shape[1], self._num_slots, d) for x in (key, value))
        end = cache.length
        self._keys[:, :, end - s : end] = key
        self._values[:, :, end - s : end] = value
        mask = cache.mask(window)
        if end == s:
            query = query.permute(1, 2, 0, 3)
            if mask is None:
                context = attend(query, key, value, window)
            else:
                grouped = n != key.shape[1]
                context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
            return context.permute(2, 0, 1, 3).reshape(s, b, -1)
        seen = slice(0 if window is None else max(0, end - window), end)
        # the heads that share keys attend to them as so many positions would
        query = query.reshape(b, key.shape[1], -1, d)
        mask = mask[..., seen] if mask is not None else None
        context = F.scaled_dot_product_attention(query, self._keys[:, :, seen], self._values[:, :, seen], mask)
        return context.reshape(1, b, -1)
