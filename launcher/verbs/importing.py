"""Imports from Hugging Face: a folder with all that training needs to go on from a model."""

import re
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.tokenization import Tokenizer, install_tokenizer
from trainer import config_file
from trainer.checkpoint.format import store
from trainer.config import ModelConfig, RunConfig, UserError
from trainer.progress import Update, unheard

CONFIG_FILE = "config.yaml"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Imported:
    checkpoint: Path
    config: RunConfig
    architecture: str
    config_path: Path
    tokenizer_problem: str | None
    """Why no data can be prepared with its tokenizer."""


def import_model(source: str, out: Path, revision: str | None = None, update: Update = unheard) -> Imported:
    """Make a model of Hugging Face a checkpoint to train on from, with its config and its tokenizer, in `out`.

    Raises:
        UserError: there is no such model, something of it cannot be honoured, or `out` holds something already.
    """
    from trainer.checkpoint.huggingface import configs, importing
    from trainer.checkpoint.huggingface.source import local_folder

    _check_new(out)
    folder = local_folder(source, revision)
    family, model = configs.read_config(folder)
    tokenizer = out / TOKENIZER_FOLDER
    data, problem = _import_tokenizer(folder, tokenizer, model)
    settings = {
        "name": _run_name(folder.resolve().name if Path(source).is_dir() else source),
        "model": model.model_dump(mode="json"),
        "data": {"tokenizer": str(tokenizer.resolve())} if data else {},
        "checkpoint": {"weights_from": str(out.resolve())},
    }
    config, path = config_file.from_tree(settings), out / CONFIG_FILE
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(config_file.dump_tree({key: value for key, value in settings.items() if value}), encoding="utf-8")
    origin = source if revision is None else f"{source}@{revision}"
    checkpoint = importing.import_weights(folder, family, config, out, origin, data, update=update)
    return Imported(checkpoint, config, family.architecture, path, problem)


def _import_tokenizer(source: Path, folder: Path, model: ModelConfig) -> tuple[dict[str, str], str | None]:
    """Write the tokenizer, if there is one; returns what the manifest says of it, or why it is of no use here."""
    from trainer.checkpoint.huggingface.tokenizer import save_tokenizer

    try:
        if not save_tokenizer(source, folder):
            install_tokenizer(source, folder, model.seq_length)
        return {"tokenizer": Tokenizer.load(folder, "reference").fingerprint}, None
    except UserError as error:
        return {}, str(error).removeprefix("data.tokenizer: ")


def _run_name(source: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source).strip("-._") or "run"


def _check_new(out: Path) -> None:
    """An import that was interrupted has left no more than these."""
    leftovers = {TOKENIZER_FOLDER, CONFIG_FILE, store.temporary_folder(out, 0).name}
    if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= leftovers):
        raise UserError(f"{out} exists already; name another folder, or remove it")
