"""A checkpoint's weights that answer requests, with tensor and pipeline ranks and a cache of keys and values.

Shapes: b rows, s positions, h hidden, n positions wanted, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import parallel
from trainer.config import RunConfig
from trainer.inference.cache import KeyValueCache, attend_from_start
from trainer.inference.frozen import FrozenModel
from trainer.inference.layout import is_for_inference
from trainer.inference.requests import Score, Scored, Tokens
from trainer.model.forward_only import Attention, ForwardOnly

_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32768}
_PROMPTS_AT_ONCE = 8  # times as many tokens; of prompts no more is computed than the last position's logits
_CACHE_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
_LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 28}  # elements


class CachedModel:
    """This rank's share of a replica; a `trainer.inference.model.LanguageModel`."""

    def __init__(self, config: RunConfig, checkpoint: Path, device: torch.device) -> None:
        """config: of `trainer.inference.layout.inference_config`.

        Raises:
            UserError: the checkpoint is of another architecture.
        """
        assert is_for_inference(config), f"no layout for inference: {config.parallel.describe()}"
        (chunk,) = FrozenModel(config, checkpoint, device).chunks
        self._stage = ForwardOnly(chunk)
        self._model, self._parallel, self._device = config.model, config.parallel, device
        self._dtype = next(chunk.parameters()).dtype
        self._cache: KeyValueCache | None = None

    @property
    def replica(self) -> int:
        return parallel.data_rank()

    @property
    def num_replicas(self) -> int:
        return parallel.data_size()

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def context(self) -> int:
        return self._model.seq_length

    @property
    def tokens_at_once(self) -> int:
        return _TOKENS_AT_ONCE[self._device.type]

    @property
    def tokens_kept(self) -> int:
        model, parallel = self._model, self._parallel
        elements = 2 * model.num_layers // parallel.pipeline * model.kv_heads // parallel.tensor * model.head_size
        have_room = _CACHE_BYTES[self._device.type] // (elements * self._dtype.itemsize)
        return min(have_room, _PROMPTS_AT_ONCE * self.tokens_at_once)

    @torch.inference_mode()
    def score(self, requests: Sequence[Score]) -> list[Scored]:
        """Rows are filled up at their ends, where no position of theirs looks: causal attention needs no mask."""
        self._cache = None
        rows = [(*request.context, *request.continuation) for request in requests]
        longest = max(map(len, rows)) - 1
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, filled in zip(tokens, rows, strict=True):
            row[: len(filled) - 1] = torch.tensor(filled[:-1])
        positions = torch.arange(longest, device=self._device).expand(len(rows), -1)
        hidden = self._forward(tokens.to(self._device), positions, longest, _nothing_before)
        targets = torch.tensor([token for request in requests for token in request.continuation], device=self._device)
        found = torch.zeros(2, len(targets), dtype=torch.float64, device=self._device)
        if hidden is not None:
            # position p predicts token p + 1
            wanted = [
                row * longest + position
                for row, request in enumerate(requests)
                for position in range(len(request.context) - 1, len(rows[row]) - 1)
            ]
            chosen = hidden[torch.tensor(wanted, device=self._device)]
            for part, logits in self._logits(chosen):
                logprobs = logits.log_softmax(-1).gather(1, targets[part, None]).squeeze(1)
                found[0, part], found[1, part] = logprobs.double(), (logits.argmax(-1) == targets[part]).double()
        logprobs, is_likeliest = self.share(found).tolist()
        ends = accumulate((len(request.continuation) for request in requests), initial=0)
        return [Scored(tuple(logprobs[a:b]), all(is_likeliest[a:b])) for a, b in pairwise(ends)]

    @torch.inference_mode()
    def begin(self, prompts: Sequence[Tokens], num_new_tokens: int) -> Tensor | None:
        """Rows are filled up at their beginnings, so that all have their last token in the same place."""
        longest = max(map(len, prompts))
        paddings = [longest - len(prompt) for prompt in prompts]
        self._cache = KeyValueCache(paddings, longest + num_new_tokens, self._device)
        return self._next(
            self._cache, [(0,) * padding + prompt for padding, prompt in zip(paddings, prompts, strict=True)]
        )

    @torch.inference_mode()
    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor | None:
        assert self._cache is not None
        self._cache.select(rows)
        return self._next(self._cache, [(token,) for token in tokens])

    def _next(self, cache: KeyValueCache, rows: Sequence[Tokens]) -> Tensor | None:
        """Logits [b, V] after the next tokens of each row."""
        positions = cache.advance(len(rows[0]))
        hidden = self._forward(torch.tensor(rows, device=self._device), positions, cache.num_slots, cache)
        if hidden is None:
            return None
        parts = [logits for _, logits in self._logits(hidden.view(*positions.shape, -1)[:, -1])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def share(self, choice: Tensor) -> Tensor:
        return parallel.from_last_stage(choice)

    def _forward(self, tokens: Tensor, positions: Tensor, num_positions: int, attention: Attention) -> Tensor | None:
        """tokens and positions [b, s] through all stages: hidden states [b * s, h] on ranks of the last one."""
        if self._stage.is_first:
            hidden = self._stage.embed(tokens, positions)
        else:
            hidden = torch.empty(tokens.numel(), self._model.hidden_size, dtype=self._dtype, device=self._device)
            dist.recv(hidden, src=parallel.previous_stage_rank(), group=parallel.pipeline_group())
        hidden = self._stage.hidden(hidden, positions, num_positions, attention)
        if self._stage.is_last:
            return hidden
        dist.send(hidden, dst=parallel.next_stage_rank(), group=parallel.pipeline_group())
        return None

    def _logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """hidden [n, h] -> some of the n, and their logits [., V], fp32; together all."""
        rows_at_once = max(1, _LOGITS_AT_ONCE[self._device.type] // self._model.padded_vocab_size)
        for first in range(0, len(hidden), rows_at_once):
            part = slice(first, first + rows_at_once)
            shard = self._stage.logits(hidden[part]).float()
            shards = parallel.gather(shard, parallel.tensor_group()) if parallel.tensor_size() > 1 else [shard]
            whole = torch.cat(shards, dim=-1) if len(shards) > 1 else shard
            yield part, whole[:, : self._model.vocab_size]


def _nothing_before(layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    return attend_from_start(query, key, value, window)
