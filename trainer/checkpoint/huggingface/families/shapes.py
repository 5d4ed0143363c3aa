"""Shapes of the model's global tensors, from the config alone.

Shapes: V vocabulary rows with padding, h hidden, s sequence, n heads, m key-value heads, d = h / n, f feed-forward.
"""

from trainer.config import ModelConfig

Shape = tuple[int, ...]


def shape_of(name: str, model: ModelConfig) -> Shape:
    """Of a global tensor, or of one layer of those that stack all layers."""
    h, kv_rows = model.hidden_size, model.kv_heads * model.head_size
    rows = {
        "embedding.word_embeddings": model.padded_vocab_size,
        "embedding.position_embeddings": model.seq_length,
        "output_layer": model.padded_vocab_size,
        "linear_qkv": h + 2 * kv_rows,
        "linear_fc1": model.ffn_size * (2 if model.activation == "swiglu" else 1),
    }
    module, _, kind = name.rpartition(".")
    num_rows = next((count for suffix, count in rows.items() if module.endswith(suffix)), h)
    if kind == "bias" or module.endswith("norm"):
        return (num_rows,)
    return num_rows, model.ffn_size if module.endswith("linear_fc2") else h
