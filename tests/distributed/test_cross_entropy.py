"""The fused output layer against PyTorch's own matrix product and cross entropy."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ranks import run_on_ranks
from trainer import parallel
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.model import cross_entropy
from trainer.model.cross_entropy import OutputLayer
from trainer.model.gpt import transformer_config

SEQ, BATCH, HIDDEN, ROWS = 12, 3, 16, 128


def problem(vocab_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden": torch.randn(SEQ, BATCH, HIDDEN, generator=generator),
        "weight": torch.randn(ROWS, HIDDEN, generator=generator) * 3,
        "labels": torch.randint(0, vocab_size, (BATCH, SEQ), generator=generator),
        "gradient": torch.rand(BATCH, SEQ, generator=generator),  # a weight of its own for every token
    }


def fused(config: RunConfig, _: torch.device) -> dict[str, Any]:
    given, size = problem(config.model.vocab_size), parallel.tensor_size()
    layer = OutputLayer(
        HIDDEN, ROWS, config=transformer_config(config), init_method=lambda _: None, bias=False, gather_output=False
    )
    layer.vocab_size = config.model.vocab_size
    layer.weight.data.copy_(given["weight"].chunk(size)[parallel.tensor_rank()])
    hidden = given["hidden"].requires_grad_()
    losses = layer(hidden, given["labels"], None)
    losses.backward(given["gradient"])
    logits = layer(hidden, None, None).detach()
    return {"losses": losses.detach(), "hidden": hidden.grad, "weight": layer.weight.grad, "logits": logits}


@pytest.mark.parametrize("rows_at_once", [1, 5, 1000])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [128, 120, 40, 1])  # of 128 rows: with 40 and 4 ranks, two hold padding alone
def test_losses_and_gradients_are_those_of_pytorch(
    vocab_size: int, tensor: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cross_entropy._ELEMENTS_AT_ONCE, "cpu", rows_at_once * ROWS // tensor)
    tree = {"hidden_size": HIDDEN, "num_heads": 4, "vocab_size": vocab_size, "seq_length": SEQ}
    config = from_tree({"model": tree, "train": {"precision": "fp32"}, "parallel": {"tensor": tensor}})
    ranks = run_on_ranks(config, fused)

    given = problem(vocab_size)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    logits = hidden.transpose(0, 1) @ weight[:vocab_size].T
    losses = F.cross_entropy(logits.flatten(0, 1), given["labels"].flatten(), reduction="none").view(BATCH, SEQ)
    losses.backward(given["gradient"])
    for found in ranks:
        torch.testing.assert_close(found["losses"], losses.detach(), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(found["hidden"], hidden.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([found["weight"] for found in ranks]), weight.grad, rtol=1e-5, atol=1e-5)
    whole = torch.cat([found["logits"] for found in ranks], dim=-1)
    torch.testing.assert_close(whole[..., :vocab_size], logits.detach(), rtol=1e-6, atol=1e-6)
    assert (whole[..., vocab_size:] == -torch.inf).all()
