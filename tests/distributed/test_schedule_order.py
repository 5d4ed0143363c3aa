"""The order in which a plan has passes follow each other is that of megatron-core's schedules on real ranks."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.planning.timeline import Turn, order
from ranks import run_on_ranks
from trainer import parallel
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.data.batches import MicroBatch
from trainer.model.gpt import GPT, build_chunks
from trainer.pipeline import StageView, run_schedule

STAGES = 4
MODEL = {"num_layers": 8, "hidden_size": 16, "num_heads": 2, "vocab_size": 120, "seq_length": 8}


class Recorded(torch.autograd.Function):
    """A copy, which says when gradients come through it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, turns: list[Turn], chunk: int, micro_batch: int) -> Tensor:
        turns.append(Turn(chunk, micro_batch, is_forward=True))
        ctx.turns, ctx.backward_turn = turns, Turn(chunk, micro_batch, is_forward=False)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.turns.append(ctx.backward_turn)
        return gradients[0], None, None, None


def turns_of_rank(config: RunConfig, target: torch.device) -> list[Turn]:
    """What the schedule has this rank do, micro-batches of a chunk numbered as they come to it."""
    torch.manual_seed(parallel.tensor_rank())
    chunks = build_chunks(config)
    for parameter in (each for chunk in chunks for each in chunk.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)
    turns: list[Turn] = []
    seen = [0] * len(chunks)

    def forward(index: int, chunk: GPT, *inputs: Any, **named: Any) -> Tensor:
        output = chunk(*inputs, **named)
        recorded: Tensor = Recorded.apply(output, turns, index, seen[index])
        seen[index] += 1
        return recorded

    stages = [StageView(chunk, partial(forward, index, chunk)) for index, chunk in enumerate(chunks)]
    tokens = torch.zeros(1, config.model.seq_length + 1, dtype=torch.long)
    run_schedule(stages, config.model, [MicroBatch(tokens)] * config.num_microbatches, forward_only=False)
    return turns


@pytest.mark.parametrize(("num_chunks", "num"), [(1, 6), (1, 2), (2, 8)])
def test_passes_are_planned_in_the_order_in_which_they_run(num_chunks: int, num: int) -> None:
    config = from_tree(
        {
            "model": MODEL,
            "train": {"global_batch_size": num, "micro_batch_size": 1},
            "parallel": {"pipeline": STAGES, "virtual_pipeline": num_chunks},
            "launch": {"device": "cpu"},
        }
    )
    ran = run_on_ranks(config, turns_of_rank)
    assert ran == [order(STAGES, stage, num_chunks, num) for stage in range(STAGES)]
