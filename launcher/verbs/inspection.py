"""Verbs that look at what a run has made: find a checkpoint, export it.

They work beside a run, never in its folder, so they may be used while it trains.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from data_pipeline.manifest import Manifest as DataManifest
from data_pipeline.pipeline import TOKENIZER_FOLDER
from launcher.job.failures import JobFailed
from launcher.job.ranks import Ranks, check_embedded, ready_ranks
from launcher.verbs import exporting, importing
from trainer import config_file
from trainer.checkpoint.format import compatibility, store
from trainer.checkpoint.format.manifest import Manifest, read_manifest
from trainer.config import RunConfig
from trainer.progress import Update, counting, unheard
from trainer.run_dir import RunDir

ALONE = "evaluation.where=ranks"
"""A setting: what looks at a checkpoint needs no room for a service beside it, whatever the run has."""


@dataclass(frozen=True)
class Found:
    """A checkpoint with the config it is read under, whose `data.prepared` is set."""

    checkpoint: Path
    manifest: Manifest
    config: RunConfig


def find(path: Path, data: Path | None, settings: Sequence[str], doing: str = "", update: Update = unheard) -> Found:
    """The checkpoint that `path` means, verified, with its run's config and data, changed by `settings`.

    Args:
        doing: for whom, as `update` is told.

    Raises:
        UserError: there is no checkpoint, or no data is known for it.
    """
    checkpoint = store.find(path)
    manifest = store.verify(checkpoint, advance=counting(update, f"{doing}: verifying", "files"))
    tree = manifest.config | {"preset": None}
    run_dir = RunDir(checkpoint.resolve().parent.parent)
    recorded = tree["data"].get("prepared")
    prepared = data or (Path(recorded) if recorded else run_dir.data)
    config = config_file.override(
        tree, [*settings, ALONE, f"data.prepared={orjson.dumps(str(prepared.resolve())).decode()}"]
    )
    compatibility.check_architecture(manifest, config, checkpoint)
    check_embedded(config)
    data_manifest = DataManifest.load(prepared)
    data_manifest.verify(prepared, counting(update, f"{doing}: verifying data", "bytes"))
    if manifest.data:  # not of imported weights whose tokenizer is none of ours
        found = {"tokenizer": data_manifest.tokenizer_fingerprint}
        compatibility.check_tokenizer(manifest, found, checkpoint)
    return Found(checkpoint.resolve(), manifest, config)


def find_to_export(
    path: Path, data: Path | None, settings: Sequence[str], doing: str = "", update: Update = unheard
) -> tuple[Found, Path]:
    """As `find`, and the tokenizer's folder; weights just imported have it beside them, and need no data."""
    checkpoint = store.find(path)
    imported = checkpoint.parent / importing.TOKENIZER_FOLDER
    was_trained_here = read_manifest(checkpoint).step > 0
    if data or was_trained_here or not imported.is_dir():
        found = find(path, data, settings, doing, update)
        return found, Path(str(found.config.data.prepared)) / TOKENIZER_FOLDER
    manifest = store.verify(checkpoint, advance=counting(update, f"{doing}: verifying", "files"))
    config = config_file.override(manifest.config | {"preset": None}, [*settings, ALONE])
    compatibility.check_architecture(manifest, config, checkpoint)
    check_embedded(config)
    return Found(checkpoint.resolve(), manifest, config), imported


@contextmanager
def scratch_run() -> Iterator[RunDir]:
    """A run folder for ranks that only read; it stays when they fail, for their logs, which the failure names."""
    run_dir = RunDir(Path(tempfile.mkdtemp(prefix="broadgauge-")))
    run_dir.logs.mkdir()
    try:
        yield run_dir
    except JobFailed:
        raise
    except BaseException:
        shutil.rmtree(run_dir.path, ignore_errors=True)
        raise
    shutil.rmtree(run_dir.path)


def export(
    path: Path,
    out: Path,
    data: Path | None,
    settings: Sequence[str],
    dtype: exporting.Dtype,
    verify: exporting.Verify,
    update: Update = unheard,
) -> exporting.Verified:
    from trainer.checkpoint.huggingface import export, model_card

    found, tokenizer = find_to_export(path, data, settings, "export", update)
    export.check_export(found.config, tokenizer, out)
    facts = model_card.training_facts(found.manifest)
    with scratch_run() as run_dir, ExitStack() as resources, store.being_read(found.checkpoint):

        def ranks() -> Ranks:
            return resources.enter_context(ready_ranks(found.config, run_dir))

        return exporting.export_checkpoint(
            found.config, run_dir, ranks, found.checkpoint, tokenizer, out, facts, dtype, verify, update
        )
