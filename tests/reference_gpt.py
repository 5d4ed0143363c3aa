"""A GPT and its training loop in plain PyTorch and one process: the reference that every parallel layout must match.

It shares no code with the product. Weights come and go as a dict of global tensors under megatron-core's names, those
of all layers stacked on a leading axis; the modules below are nested so that their own parameter names, less the
layer's number, are those names.

Shapes: b batch, s sequence, h hidden, n heads, d = h / n, f feed-forward, L layers, V padded vocabulary.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Precision = Literal["fp32", "bf16"]


class SelfAttention(nn.Module):
    def __init__(self, h: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear_qkv = nn.Linear(h, 3 * h)  # output rows grouped per head: q_0 k_0 v_0 q_1 k_1 v_1 ...
        self.linear_proj = nn.Linear(h, h)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        b, s, h = x.shape
        qkv = self.linear_qkv(x).view(b, s, self.num_heads, 3, h // self.num_heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [b, n, s, d]
        scores = q.float() @ k.float().transpose(-1, -2) / (h // self.num_heads) ** 0.5
        future = torch.ones(s, s, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(v.dtype)
        return self.linear_proj((weights @ v).transpose(1, 2).reshape(b, s, h))


class FeedForward(nn.Module):
    def __init__(self, h: int, f: int) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(h, f)
        self.linear_fc2 = nn.Linear(f, h)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class PreNormLayer(nn.Module):
    def __init__(self, h: int, f: int, num_heads: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(h, eps=1e-5)
        self.self_attention = SelfAttention(h, num_heads)
        self.pre_mlp_layernorm = nn.LayerNorm(h, eps=1e-5)
        self.mlp = FeedForward(h, f)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.pre_mlp_layernorm(x))


class PostNormLayer(nn.Module):
    def __init__(self, h: int, f: int, num_heads: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(h, num_heads)
        self.self_attn_bda = nn.ModuleDict({"norm": nn.LayerNorm(h, eps=1e-5)})
        self.mlp = FeedForward(h, f)
        self.mlp_bda = nn.ModuleDict({"norm": nn.LayerNorm(h, eps=1e-5)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.self_attn_bda["norm"](x + self.self_attention(x))
        return self.mlp_bda["norm"](x + self.mlp(x))


class Embedding(nn.Module):
    def __init__(self, h: int, num_words: int, num_positions: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(num_words, h)
        self.position_embeddings = nn.Embedding(num_positions, h)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.word_embeddings(tokens) + self.position_embeddings.weight[: tokens.shape[1]]


class ReferenceGPT(nn.Module):
    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        ffn_hidden_size: int,
        vocab_size: int,
        padded_vocab_size: int,
        seq_length: int,
        norm_placement: Literal["pre", "post"] = "pre",
        tied_embeddings: bool = True,
    ) -> None:
        super().__init__()
        h, self.vocab_size = hidden_size, vocab_size
        self.embedding = Embedding(h, padded_vocab_size, seq_length)
        layer = PreNormLayer if norm_placement == "pre" else PostNormLayer
        layers = nn.Sequential(*(layer(h, ffn_hidden_size, num_heads) for _ in range(num_layers)))
        final = {"final_layernorm": nn.LayerNorm(h, eps=1e-5)} if norm_placement == "pre" else {}
        self.decoder = nn.Sequential(OrderedDict({"layers": layers, **final}))
        self.output_layer = None if tied_embeddings else nn.Linear(h, padded_vocab_size, bias=False)

    def randomize(self, seed: int) -> None:
        """Random values everywhere, norms and biases included, so that no two tensors can be taken for each other."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.1, generator=generator)

    def _by_global_name(self) -> dict[str, list[nn.Parameter]]:
        """The parameters behind each global tensor: one per layer, or just one."""
        grouped: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            grouped.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.", name), []).append(parameter)
        return grouped

    @torch.no_grad()
    def load_global(self, tensors: Mapping[str, Tensor]) -> None:
        grouped = self._by_global_name()
        assert grouped.keys() == tensors.keys(), f"names differ: {sorted(grouped.keys() ^ tensors.keys())}"
        for name, parameters in grouped.items():
            values = tensors[name] if ".layers." in name else tensors[name][None]
            assert len(values) == len(parameters), f"{name}: {len(values)} layers, not {len(parameters)}"
            for parameter, value in zip(parameters, values, strict=True):
                assert parameter.shape == value.shape, f"{name}: {tuple(value.shape)}, not {tuple(parameter.shape)}"
                parameter.copy_(value)

    def global_tensors(self) -> dict[str, Tensor]:
        """Copies of the weights under their global names, those of all layers stacked: [L, ...]."""
        stacked = {name: torch.stack([p.detach() for p in ps]) for name, ps in self._by_global_name().items()}
        return {name: value if ".layers." in name else value[0] for name, value in stacked.items()}

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, s] -> fp32 logits [b, s, vocab_size]. Leaving padded rows out is what masking them to -inf amounts to."""
        output_matrix = (self.output_layer or self.embedding.word_embeddings).weight
        return F.linear(self.decoder(self.embedding(tokens)), output_matrix[: self.vocab_size]).float()

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of [b, s] labels, in nats per token."""
        return F.cross_entropy(self(tokens).flatten(0, 1), labels.flatten())


def train(
    model: ReferenceGPT,
    batches: Iterable[Sequence[Tensor]],
    *,
    lrs: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float,
    precision: Precision,
) -> list[tuple[float, float]]:
    """Train for len(lrs) steps of equally large micro-batches [b, s + 1]; return (loss, gradient norm) of each step.

    The optimizer's weights, its state and the accumulated gradients are fp32; under "bf16" the model computes with
    bf16 copies of the weights. The gradient norm is that before clipping. The model is left with the fp32 weights.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    working = list(model.parameters())
    masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in working]
    matrices, vectors = ([m for m in masters if (m.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)
    history = []
    for micro_batches, lr in zip(batches, lrs, strict=True):
        model.to(dtype)
        for parameter, master in zip(working, masters, strict=True):
            parameter.data.copy_(master)
        loss, gradients = 0.0, [torch.zeros_like(master) for master in masters]
        for windows in micro_batches:
            micro_loss = model.loss(windows[:, :-1], windows[:, 1:])
            loss += micro_loss.item() / len(micro_batches)
            for total, part in zip(gradients, torch.autograd.grad(micro_loss, working), strict=True):
                total += part.float() / len(micro_batches)
        for master, total in zip(masters, gradients, strict=True):
            master.grad = total
        norm = nn.utils.clip_grad_norm_(masters, clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        history.append((loss, norm.item()))
    model.float()
    for parameter, master in zip(working, masters, strict=True):
        parameter.data.copy_(master)
    return history
