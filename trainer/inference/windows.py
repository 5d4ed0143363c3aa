"""Logits of whole windows, through megatron-core's schedule: in every layout that trains, and so of the training engine
too, whose weights may be split in ways that no cache of keys and values follows.

Shapes: b sequences, s sequence, h hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer import parallel
from trainer.config import ModelConfig, RunConfig
from trainer.data.batches import MicroBatch
from trainer.inference.requests import Score, Scored, Tokens
from trainer.model.context_parallel import local_positions
from trainer.pipeline import StageView, run_schedule


@torch.no_grad()
def window_logits(stages: Sequence[StageView], model: ModelConfig, tokens: Tensor) -> Tensor | None:
    """tokens [b, s] -> logits [b, s, V], fp32, on the ranks of the last pipeline stage; None on the others.

    Collective over the replica; with ZeRO-3 over all replicas. s is the model's context.
    """
    found: list[Tensor] = []

    def keep(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        hidden, _, weight = inputs
        if not found:  # the copies below give the same
            found.append(layer.forward(hidden, None, weight))  # without labels it returns logits

    last = [stage.module.output_layer for stage in stages if stage.module.post_process]
    # before the layer is called: afterwards ZeRO-3 has let go of its weights
    hooks = [layer.register_forward_pre_hook(keep) for layer in last]
    # the schedule moves activations between stages; the losses it computes beside the logits are not used
    padded = torch.nn.functional.pad(tokens, (0, 1))
    copies = parallel.pipeline_size() if len(stages) > 1 else 1  # interleaving wants whole rounds
    try:
        run_schedule(stages, model, [MicroBatch(padded)] * copies, forward_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return None
    shard = found[0].float()  # [b, s / context ranks, V / tensor ranks]
    rows = torch.cat(parallel.gather(shard, parallel.tensor_group()), dim=-1)[..., : model.vocab_size]
    whole = rows.new_empty(*tokens.shape, rows.shape[-1])
    for rank, part in enumerate(parallel.gather(rows, parallel.context_group())):
        whole[:, local_positions(tokens.shape[1], rank, parallel.context_size())] = part
    return whole


class WindowModel:
    """The weights of whatever trains, as a `trainer.inference.model.LanguageModel`: every token by a window of its own.

    Slow where much is generated, and in no layout wrong.
    """

    def __init__(self, stages: Sequence[StageView], config: RunConfig, device: torch.device) -> None:
        self._stages, self._config, self.device = stages, config, device
        self._rows: list[list[int]] = []
        for stage in stages:
            stage.module.eval()

    @property
    def _moves_together(self) -> bool:
        """Whether data-parallel ranks hold parts of the weights, and so need each other in every forward pass."""
        return self._config.parallel.zero == 3

    @property
    def replica(self) -> int:
        return 0 if self._moves_together else parallel.data_rank()

    @property
    def num_replicas(self) -> int:
        return 1 if self._moves_together else parallel.data_size()

    @property
    def context(self) -> int:
        return self._config.model.seq_length

    @property
    def tokens_at_once(self) -> int:
        return self._config.train.micro_batch_size * self.context

    @property
    def tokens_kept(self) -> int:
        return self.tokens_at_once

    def score(self, requests: Sequence[Score]) -> list[Scored]:
        scored = []
        for first in range(0, len(requests), self._config.train.micro_batch_size):
            scored += self._score(requests[first : first + self._config.train.micro_batch_size])
        return scored

    def _score(self, requests: Sequence[Score]) -> list[Scored]:
        logits = self._logits([[*each.context, *each.continuation][:-1] for each in requests])
        lengths = [len(each.continuation) for each in requests]
        found = torch.zeros(2, sum(lengths), dtype=torch.float64, device=self.device)
        if logits is not None:
            for row, each, part in zip(logits, requests, found.split(lengths, dim=1), strict=True):
                targets = torch.tensor(each.continuation, device=row.device)
                mine = row[len(each.context) - 1 :][: len(targets)]
                part[0] = mine.log_softmax(-1).gather(1, targets[:, None])[:, 0]
                part[1] = mine.argmax(-1) == targets
        parts = self.share(found).split(lengths, dim=1)
        return [Scored(tuple(part[0].tolist()), bool(part[1].all())) for part in parts]

    def begin(self, prompts: Sequence[Tokens], num_new_tokens: int) -> Tensor | None:
        self._rows = [list(prompt) for prompt in prompts]
        return self._following()

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor | None:
        self._rows = [[*self._rows[row], token] for row, token in zip(rows, tokens, strict=True)]
        return self._following()

    def _following(self) -> Tensor | None:
        found = []
        for first in range(0, len(self._rows), self._config.train.micro_batch_size):
            rows = self._rows[first : first + self._config.train.micro_batch_size]
            logits = self._logits(rows)
            if logits is not None:
                found += [logits[number, len(row) - 1] for number, row in enumerate(rows)]
        return torch.stack(found) if found else None

    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor | None:
        """Filled up at their ends, where no position of theirs looks."""
        tokens = torch.zeros(len(rows), self.context, dtype=torch.int64)
        for place, row in zip(tokens, rows, strict=True):
            place[: len(row)] = torch.tensor(row)
        return window_logits(self._stages, self._config.model, tokens.to(self.device))

    def share(self, choice: Tensor) -> Tensor:
        """Of replicas that move together one's: rounding may differ, and with it when a text ends."""
        choice = parallel.from_last_stage(choice)
        return parallel.from_first_replica(choice) if self._moves_together else choice
