"""Every place that the config names: whether its data can be read, and its checkpoints written and read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.filesize import decimal

from data_pipeline.manifest import Manifest
from data_pipeline.sources import PYTHON_STDLIB
from data_pipeline.sources.find import find_files
from data_pipeline.sources.hugging_face import PREFIX, plan_hugging_face
from launcher.doctor.finding import Finding, ok
from trainer.checkpoint.format import store
from trainer.checkpoint.remote.copies import Remote
from trainer.config import RunConfig, UserError
from trainer.urls import without_secrets

NAME = "storage"


@dataclass(frozen=True)
class Place:
    setting: str
    """That names it."""
    target: str
    """A path or a URL."""
    kind: Literal["source", "prepared", "upload", "checkpoint"]
    text_field: str = "text"
    """Of a source."""

    @property
    def shown(self) -> str:
        return f"{self.setting} {without_secrets(self.target)}"


def places(config: RunConfig) -> list[Place]:
    """In the order of the config; sources only where the run reads them."""
    data, saving = config.data, config.checkpoint
    found = [Place("data.prepared", data.prepared, "prepared")] if data.prepared else []
    for name, dataset in data.named_datasets.items() if not data.prepared else ():
        setting = f"data.datasets.{name}.sources" if data.datasets else "data.sources"
        found += [Place(setting, source, "source", dataset.text_field) for source in dataset.sources]
    if saving.upload_to:
        found.append(Place("checkpoint.upload_to", saving.upload_to, "upload"))
    if saving.resume_from:
        found.append(Place("checkpoint.resume_from", saving.resume_from, "checkpoint"))
    if saving.weights_from:
        found.append(Place("checkpoint.weights_from", saving.weights_from, "checkpoint"))
    return found


def examine(place: Place, timeout_seconds: float) -> Finding:
    """Raises:
    UserError: it cannot be used as the config wants to.
    """
    try:
        return ok(NAME, f"{place.shown}: {_reach(place, timeout_seconds)}")
    except UserError as error:
        text = str(error).replace(place.target, without_secrets(place.target))
        raise UserError(text if place.setting in text else f"{place.setting}: {text}") from error


def _reach(place: Place, timeout_seconds: float) -> str:
    match place.kind:
        case "source":
            return _read_source(place)
        case "prepared":
            folder = Path(place.target).expanduser()
            manifest = Manifest.load(folder)
            manifest.verify(folder)
            return f"{sum(portion.tokens for portion in manifest.portions.values()):,} tokens"
        case "upload":
            Remote.open(place.target, timeout_seconds=timeout_seconds).check()
            return "written, read and removed"
        case "checkpoint":
            return _look_at_checkpoint(Path(place.target))


def _read_source(place: Place) -> str:
    """As a preparation begins: a little of every file is read."""
    if place.target == PYTHON_STDLIB:
        return "text that comes with Python"
    if place.target.startswith(PREFIX):
        splits = plan_hugging_face("text", place.target, place.text_field, place.setting)
        return f"{len(splits)} shard(s)"
    files, _ = find_files(place.target, place.setting)
    bad = next((file for file in files if file.problem), None)
    if bad:
        raise UserError(f"{place.setting}: {bad.place} cannot be read ({bad.problem}); make it readable or remove it")
    return f"{len(files)} file(s), {decimal(sum(file.size_bytes or 0 for file in files))}"


def _look_at_checkpoint(path: Path) -> str:
    """Sizes only: a run verifies what it reads."""
    checkpoint = store.find(path)
    manifest = store.read(checkpoint)
    for name, (num_bytes, _) in manifest.files.items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != num_bytes:
            raise UserError(f"{file} is missing or not as long as the manifest says; name another checkpoint")
    size = decimal(sum(num_bytes for num_bytes, _ in manifest.files.values()))
    return f"{checkpoint.name}, {len(manifest.files)} file(s), {size}"
