"""A small model of random weights as a checkpoint and as its export, with a tokenizer of ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.tokenization import train_tokenizer
from parity import reference_of
from trainer.checkpoint.huggingface import export
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.data_config import TokenizerConfig
from weights import write_checkpoint

VOCAB, SEQ = 270, 32  # the padded vocabulary has 384 rows
SIZES = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "vocab_size": VOCAB, "seq_length": SEQ}
VARIANTS: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "GPT-1": {"norm_placement": "post"},
    "GPT-Neo": {"biases": "all_but_qkv", "attention_window": 7},
    "Llama": {"num_kv_heads": 2, "positions": "rotary", "norm": "rms", "activation": "swiglu", "biases": "none"},
}
TEXTS = ["the cat sat on the mat, and the dog sat on the log. where did the dog sit?\n\non the log, the cat said: so"]


@dataclass(frozen=True)
class ExportedModel:
    config: RunConfig
    checkpoint: Path
    folder: Path


def exported_model(root: Path, **model: Any) -> ExportedModel:
    """Weights are large enough for answers that vary."""
    config = from_tree({"model": SIZES | model, "train": {"global_batch_size": 4, "precision": "fp32"}})
    train_tokenizer(TEXTS, TokenizerConfig(), VOCAB, root / "tokenizer", SEQ)
    reference = reference_of(config.model)
    reference.randomize(seed=7)
    checkpoint = write_checkpoint(root / "checkpoints", config, reference.global_tensors())
    export.commit(export.export_model(checkpoint, config, root / "tokenizer", root / "export", {}), root / "export")
    return ExportedModel(config, checkpoint, root / "export")
