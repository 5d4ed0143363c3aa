"""README.md of an export: what the model is, how it was trained, and what was done to verify it."""

from collections.abc import Mapping
from pathlib import Path

import torch

from trainer import config_file
from trainer.checkpoint.format.manifest import Manifest
from trainer.config import RunConfig
from trainer.plan import num_parameters

CARD = "README.md"
_RECIPE = {"preset", "seed", "model", "train", "optimizer", "stability", "parallel"}
_TAG = "- broadgauge\n"  # in the card of every folder we write: only such a folder may be replaced


def is_ours(folder: Path) -> bool:
    """Whether an export of ours lies there."""
    card = folder / CARD
    return card.is_file() and _TAG in card.read_text(encoding="utf-8", errors="replace")


def trained_with(manifest: Manifest) -> RunConfig | None:
    """The config that a checkpoint was trained with here; None of one that was imported and not trained."""
    return config_file.from_tree(manifest.config | {"preset": None}) if manifest.step else None


def training_facts(manifest: Manifest) -> dict[str, object]:
    """What a checkpoint tells of its training, for the model card."""
    facts: dict[str, object] = {"Weights began as": _published(manifest.origin)} if manifest.origin else {}
    trained = trained_with(manifest)
    if trained is not None:
        facts["Trained on, tokens"] = manifest.consumed_samples * trained.model.seq_length
        facts |= {"Steps": manifest.step, "Layout": trained.parallel.describe()}
    if manifest.heldout_loss is not None:
        facts["Held-out loss, nats per token"] = manifest.heldout_loss
    names = {"train": "Data, xxh3-128", "blend": "Blend", "tokenizer": "Tokenizer, xxh3-128"}
    return facts | {names.get(key, key): value for key, value in manifest.data.items()}


def model_card(
    config: RunConfig, architecture: str, dtype: torch.dtype, facts: Mapping[str, object], trained: RunConfig | None
) -> str:
    """Markdown.

    Args:
        trained: the config of which to print what made the model.
    """
    model = config.model
    rows: dict[str, object] = {"Parameters": num_parameters(model), "Layers": model.num_layers}
    rows |= {"Hidden size": model.hidden_size, "Attention heads": model.num_heads}
    if model.kv_heads != model.num_heads:
        rows["Key-value heads"] = model.kv_heads
    if model.attention_window is not None:
        rows["Attention window of every second layer, tokens"] = model.attention_window
    rows |= {"Context, tokens": model.seq_length, "Vocabulary, tokens": model.vocab_size}
    rows |= {"Weights": str(dtype).removeprefix("torch."), **facts}
    table = "".join(f"| {name} | {_formatted(value)} |\n" for name, value in rows.items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n{_TAG}---\n\n"
        f"# {config.name}\n\n"
        f"A GPT trained with Broadgauge, as a `{architecture}`. Open it with `transformers`:\n\n"
        "```python\n"
        "from transformers import pipeline\n\n"
        'generate = pipeline("text-generation", model="this folder")\n'
        f"print(generate({config.generate.prompt!r}, max_new_tokens={config.generate.max_new_tokens}))\n"
        "```\n\n"
        f"## Model and training\n\n| | |\n|---|---|\n{table}"
        + (f"\nHow it was trained:\n\n```yaml\n{_recipe(trained)}```\n" if trained else "")
    )


def _recipe(trained: RunConfig) -> str:
    """What of a config tells a stranger how a model came to be; where its data and its checkpoints lie is nobody's."""
    return config_file.dump_tree(trained.model_dump(mode="json", include=_RECIPE))


def add_verification(folder: Path, text: str) -> None:
    with open(folder / CARD, "a", encoding="utf-8") as card:
        card.write(f"\n## Verification\n\n{text}\n")


def _published(origin: str) -> str:
    """Of a folder the name alone; `owner/name` of the hub is a name."""
    is_folder = origin.startswith((".", "/", "~")) or origin.count("/") > 1
    return Path(origin).name if is_folder else origin


def _formatted(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
