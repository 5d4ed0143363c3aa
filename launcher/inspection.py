"""Verbs that look at what a run has made: evaluate or export a checkpoint, generate from an export.

They work beside a run, never in its folder, so they may be used while it trains.
"""

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.manifest import Manifest as DataManifest
from data_pipeline.pipeline import TOKENIZER_FOLDER
from launcher import stages
from launcher.job import check_embedded, ready_ranks
from trainer import config_file
from trainer.checkpoint import compatibility, store
from trainer.checkpoint.manifest import Manifest
from trainer.config import RunConfig, UserError
from trainer.run_dir import RunDir


@dataclass(frozen=True)
class Found:
    """A checkpoint with the config it is read under, whose `data.prepared` is set."""

    checkpoint: Path
    manifest: Manifest
    config: RunConfig


def find(path: Path, data: Path | None, settings: Sequence[str]) -> Found:
    """The checkpoint that `path` means, with its run's config and data, changed by `settings`.

    Raises:
        UserError: there is no checkpoint, or no data is known for it.
    """
    checkpoint = store.find(path)
    manifest = store.verify(checkpoint)
    tree = manifest.config | {"preset": None}
    run_dir = RunDir(checkpoint.resolve().parent.parent)
    recorded = tree["data"].get("prepared")
    prepared = data or (Path(recorded) if recorded else run_dir.data)
    config = config_file.override(tree, [*settings, f"data.prepared={orjson.dumps(str(prepared.resolve())).decode()}"])
    compatibility.check_architecture(manifest, config, checkpoint)
    check_embedded(config)
    data_manifest = DataManifest.load(prepared)
    data_manifest.verify(prepared)
    compatibility.check_tokenizer(manifest, {"tokenizer": data_manifest.tokenizer_fingerprint}, checkpoint)
    return Found(checkpoint.resolve(), manifest, config)


@contextmanager
def scratch_run() -> Iterator[RunDir]:
    """A run folder for ranks that only read; it stays when they fail, for their logs."""
    run_dir = RunDir(Path(tempfile.mkdtemp(prefix="broadgauge-")))
    run_dir.logs.mkdir()
    yield run_dir
    shutil.rmtree(run_dir.path)


def evaluate(path: Path, data: Path | None, settings: Sequence[str]) -> dict[str, Any]:
    found = find(path, data, settings)
    with scratch_run() as run_dir:
        output = run_dir.path / "heldout.json"
        with ready_ranks(found.config, run_dir) as ranks:
            ranks.run("evaluate", lambda: None, checkpoint=found.checkpoint, output=output)
        result = orjson.loads(output.read_bytes())
    return {
        "checkpoint": str(found.checkpoint),
        "step": found.manifest.step,
        **result,
        "perplexity": math.exp(result["loss"]),
    }


def export(path: Path, out: Path, data: Path | None, settings: Sequence[str]) -> tuple[float, int]:
    """Returns the largest logit difference and the number of tokens compared."""
    from trainer.checkpoint import hf

    found = find(path, data, settings)
    tokenizer = Path(str(found.config.data.prepared)) / TOKENIZER_FOLDER
    hf.check_export(found.config, tokenizer, out)
    tokens = found.manifest.consumed_samples * found.config.model.seq_length
    facts = {"Trained on, tokens": tokens, "Step": found.manifest.step}
    with scratch_run() as run_dir, ready_ranks(found.config, run_dir) as ranks:
        logits = run_dir.path / "logits.pt"
        return stages.export_checkpoint(found.config, ranks, found.checkpoint, tokenizer, out, logits, facts)


def generate(path: Path, prompt: str, max_new_tokens: int, seed: int) -> str:
    from trainer.checkpoint import hf

    folder = path / "export" if (path / "export").is_dir() else path
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is no Hugging Face folder and no run that has one; run `broadgauge export` first")
    return hf.generate(folder, prompt, max_new_tokens, seed)
