"""The peer: GPT-2 as one would write it in plain PyTorch, with SDPA, autocast and fused AdamW; no code of ours.

Shapes: b batch, s sequence, h hidden, n heads, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, h: int, n: int) -> None:
        super().__init__()
        self.n = n
        self.norm_1, self.norm_2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.proj = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.fc1, self.fc2 = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        b, s, h = x.shape
        q, k, v = (
            part.view(b, s, self.n, h // self.n).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(context.transpose(1, 2).reshape(b, s, h))
        return x + self.fc2(F.gelu(self.fc1(self.norm_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, num_layers: int, h: int, n: int, vocab_size: int, seq_length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, h), nn.Embedding(seq_length, h)
        self.blocks = nn.ModuleList(Block(h, n) for _ in range(num_layers))
        self.norm = nn.LayerNorm(h)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels [b, s] -> mean loss"""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def autocast_step(
    model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], micro_batch_size: int
) -> Callable[[Tensor], None]:
    """The usual loop: autocast to bf16, accumulate, clip, fused AdamW."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(windows: Tensor) -> None:
        parts = windows.split(micro_batch_size)
        for part in parts:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(part[:, :-1], part[:, 1:])
            (loss / len(parts)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
