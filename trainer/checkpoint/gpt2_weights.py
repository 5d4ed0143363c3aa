"""Trained weights as the safetensors files of a GPT-2 folder, streamed.

Weights are read one global tensor at a time and written straight to the files: no model is built, and memory holds
one global tensor (all layers of one matrix) and one layer's copy of it.

Shapes: L layers, h hidden, n heads, d = h / n, f feed-forward.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trainer.config import ModelConfig

MAX_SHARD_BYTES = 5 * 10**9
"""Size from which the weights are split into several files, which users can fetch in parallel."""


@dataclass(frozen=True)
class _Gpt2Tensor:
    """One tensor of the exported model, and how it comes from a global one."""

    name: str
    shape: tuple[int, ...]
    source: str
    layer: int | None
    """Index on the source's leading axis; None where there is none."""
    convert: Callable[[Tensor], Tensor]

    @property
    def num_bytes(self) -> int:
        return 4 * math.prod(self.shape)


def write_weights(folder: Path, weights: Mapping[str, Tensor], model: ModelConfig, max_shard_bytes: int) -> None:
    """Write model.safetensors, or several files of at most `max_shard_bytes` and the index that names them.

    Args:
        weights: fp32 under megatron-core's global names, those of all layers stacked: [L, ...]. Only asked for single
            names, each once.
    """
    tensors = list(_gpt2_tensors(model))
    shards = _shards(tensors, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    values = _converted(weights, tensors)
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard, values)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _gpt2_tensors(model: ModelConfig) -> Iterator[_Gpt2Tensor]:
    """Every tensor of GPT2LMHeadModel, those from one source together.

    GPT-2's linear layers (Conv1D) hold [in, out], the transpose of PyTorch's, and its qkv is three blocks of h rows.
    """
    h, f, vocab_size = model.hidden_size, model.ffn_size, model.vocab_size
    true_rows = partial(_first_rows, vocab_size)
    qkv_blocks = partial(_qkv_blocks, model.num_heads)
    layer_tensors: list[tuple[str, str, tuple[int, ...], Callable[[Tensor], Tensor]]] = [
        ("input_layernorm.weight", "ln_1.weight", (h,), _same),
        ("input_layernorm.bias", "ln_1.bias", (h,), _same),
        ("self_attention.linear_qkv.weight", "attn.c_attn.weight", (h, 3 * h), lambda rows: qkv_blocks(rows).T),
        ("self_attention.linear_qkv.bias", "attn.c_attn.bias", (3 * h,), qkv_blocks),
        ("self_attention.linear_proj.weight", "attn.c_proj.weight", (h, h), torch.t),
        ("self_attention.linear_proj.bias", "attn.c_proj.bias", (h,), _same),
        ("pre_mlp_layernorm.weight", "ln_2.weight", (h,), _same),
        ("pre_mlp_layernorm.bias", "ln_2.bias", (h,), _same),
        ("mlp.linear_fc1.weight", "mlp.c_fc.weight", (h, f), torch.t),
        ("mlp.linear_fc1.bias", "mlp.c_fc.bias", (f,), _same),
        ("mlp.linear_fc2.weight", "mlp.c_proj.weight", (f, h), torch.t),
        ("mlp.linear_fc2.bias", "mlp.c_proj.bias", (h,), _same),
    ]
    embedding, positions = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
    yield _Gpt2Tensor("transformer.wte.weight", (vocab_size, h), embedding, None, true_rows)
    yield _Gpt2Tensor("transformer.wpe.weight", (model.seq_length, h), positions, None, _same)
    for ours, theirs, shape, convert in layer_tensors:
        for layer in range(model.num_layers):
            yield _Gpt2Tensor(f"transformer.h.{layer}.{theirs}", shape, f"decoder.layers.{ours}", layer, convert)
    for part in ("weight", "bias"):
        yield _Gpt2Tensor(f"transformer.ln_f.{part}", (h,), f"decoder.final_layernorm.{part}", None, _same)
    if not model.tied_embeddings:
        yield _Gpt2Tensor("lm_head.weight", (vocab_size, h), "output_layer.weight", None, true_rows)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _first_rows(num_rows: int, tensor: Tensor) -> Tensor:
    return tensor[:num_rows]


def _qkv_blocks(num_heads: int, rows: Tensor) -> Tensor:
    """[n x (q, k, v) x d, ...] -> [(q, k, v) x n x d, ...]"""
    return rows.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _shards(tensors: list[_Gpt2Tensor], max_shard_bytes: int) -> list[list[_Gpt2Tensor]]:
    """Cut the list wherever the next tensor would make a file too large; a single larger tensor has one to itself."""
    shards: list[list[_Gpt2Tensor]] = [[]]
    held_bytes = 0
    for tensor in tensors:
        if shards[-1] and held_bytes + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            held_bytes = 0
        shards[-1].append(tensor)
        held_bytes += tensor.num_bytes
    return shards


def _converted(weights: Mapping[str, Tensor], tensors: list[_Gpt2Tensor]) -> Iterator[Tensor]:
    """The values of the tensors, in their order; each source is read once and let go before the next."""
    source, held = "", torch.empty(0)
    for tensor in tensors:
        if tensor.source != source:
            del held
            source, held = tensor.source, weights[tensor.source]
        value = tensor.convert(held if tensor.layer is None else held[tensor.layer])
        assert value.dtype == torch.float32, f"{source} is {value.dtype}, not float32"
        assert value.shape == tensor.shape, f"{source} gives {tuple(value.shape)} for {tensor.name} {tensor.shape}"
        yield value


def _write_safetensors(path: Path, tensors: list[_Gpt2Tensor], values: Iterator[Tensor]) -> None:
    """Write the file piece by piece: the header's length (8 bytes, little-endian), the header (JSON), the values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the values are aligned
    with open(path, "wb") as handle:
        handle.write(len(encoded).to_bytes(8, "little") + encoded)
        for _ in tensors:
            handle.write(next(values).contiguous().numpy().data)
