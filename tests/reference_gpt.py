"""A GPT and its training loop in plain PyTorch and one process: the reference that every parallel layout must match.

It shares no code with the product. Weights come and go as a dict of global tensors under megatron-core's names, those
of all layers stacked on a leading axis; the modules below are nested so that their own parameter names, less the
layer's number, are those names.

Shapes: b batch, s sequence, h hidden, n heads, m key-value heads, d = h / n, f feed-forward, L layers,
V padded vocabulary.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Shape:
    """What the model is; the defaults are GPT-2's."""

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    vocab_size: int
    padded_vocab_size: int
    seq_length: int
    num_kv_heads: int | None = None
    attention_window: int | None = None
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: float = 10_000.0
    norm: Literal["layer", "rms"] = "layer"
    norm_placement: Literal["pre", "post"] = "pre"
    activation: Literal["gelu", "swiglu"] = "gelu"
    biases: Literal["all", "all_but_qkv", "none"] = "all"
    tied_embeddings: bool = True


class RMSNorm(nn.Module):
    def __init__(self, h: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(h))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight.float()).to(x.dtype)


def make_norm(shape: Shape) -> nn.Module:
    return RMSNorm(shape.hidden_size) if shape.norm == "rms" else nn.LayerNorm(shape.hidden_size, eps=1e-5)


def rotate(x: Tensor, base: float) -> Tensor:
    """Turn element i and element i + d / 2 of the vector at position p by the angle p / base^(2i / d). [b, n, s, d]"""
    s, d = x.shape[-2:]
    angles = torch.arange(s)[:, None] / base ** (torch.arange(0, d, 2) / d)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)
    return turned.to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        h, self.shape = shape.hidden_size, shape
        self.n, self.m, self.d = shape.num_heads, shape.num_kv_heads or shape.num_heads, h // shape.num_heads
        self.window = shape.attention_window if layer % 2 else None
        # output rows by group of heads that share a key and a value: q ... q k v, q ... q k v, ...
        self.linear_qkv = nn.Linear(h, (self.n + 2 * self.m) * self.d, bias=shape.biases == "all")
        self.linear_proj = nn.Linear(h, h, bias=shape.biases != "none")

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        b, s, h = x.shape
        groups = self.linear_qkv(x).view(b, s, self.m, self.n // self.m + 2, self.d).permute(0, 2, 3, 1, 4)
        q, k, v = groups[:, :, :-2], groups[:, :, -2:-1], groups[:, :, -1:]  # [b, m, n / m or 1, s, d]
        if self.shape.positions == "rotary":
            q, k = rotate(q, self.shape.rotary_base), rotate(k, self.shape.rotary_base)
        scores = q.float() @ k.float().transpose(-1, -2) / self.d**0.5
        distance = torch.arange(s)[:, None] - torch.arange(s)
        unseen = (distance < 0) | (distance >= (self.window or s))
        weights = scores.masked_fill(unseen, float("-inf")).softmax(-1).to(v.dtype)
        return self.linear_proj((weights @ v).flatten(1, 2).transpose(1, 2).reshape(b, s, h))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h, f, bias = shape.hidden_size, shape.ffn_hidden_size, shape.biases != "none"
        self.is_gated = shape.activation == "swiglu"
        self.linear_fc1 = nn.Linear(h, 2 * f if self.is_gated else f, bias=bias)
        self.linear_fc2 = nn.Linear(f, h, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_fc1(x)
        if self.is_gated:
            gate, up = x.chunk(2, dim=-1)
            return self.linear_fc2(F.silu(gate) * up)
        return self.linear_fc2(F.gelu(x, approximate="tanh"))


class PreNormLayer(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(shape)
        self.self_attention = SelfAttention(shape, layer)
        self.pre_mlp_layernorm = make_norm(shape)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.pre_mlp_layernorm(x))


class PostNormLayer(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(shape, layer)
        self.self_attn_bda = nn.ModuleDict({"norm": make_norm(shape)})
        self.mlp = FeedForward(shape)
        self.mlp_bda = nn.ModuleDict({"norm": make_norm(shape)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.self_attn_bda["norm"](x + self.self_attention(x))
        return self.mlp_bda["norm"](x + self.mlp(x))


class Embedding(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(shape.padded_vocab_size, shape.hidden_size)
        if shape.positions == "learned":
            self.position_embeddings = nn.Embedding(shape.seq_length, shape.hidden_size)
        else:
            self.position_embeddings = None

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.word_embeddings(tokens)
        positions = self.position_embeddings
        return words if positions is None else words + positions.weight[: tokens.shape[1]]


class ReferenceGPT(nn.Module):
    def __init__(self, **sizes: Any) -> None:
        """Takes the fields of `Shape`."""
        super().__init__()
        shape = Shape(**sizes)
        h, self.vocab_size = shape.hidden_size, shape.vocab_size
        self.embedding = Embedding(shape)
        kind = PreNormLayer if shape.norm_placement == "pre" else PostNormLayer
        layers = nn.Sequential(*(kind(shape, layer) for layer in range(shape.num_layers)))
        final = {"final_layernorm": make_norm(shape)} if shape.norm_placement == "pre" else {}
        self.decoder = nn.Sequential(OrderedDict({"layers": layers, **final}))
        self.output_layer = None if shape.tied_embeddings else nn.Linear(h, shape.padded_vocab_size, bias=False)

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
