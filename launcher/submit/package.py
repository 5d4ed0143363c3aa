"""What is sent to a cluster with a run: the code and the resolved config, as one folder.

The code always goes along, a few hundred kilobytes, though the cluster may have a Broadgauge installed: what runs there
is then what was submitted, and a version number need not be trusted to say whether two checkouts are equal. What the
code depends on (torch, megatron-core, DeepSpeed) must be there.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import data_pipeline
import launcher
import trainer
from trainer import config_file
from trainer.config import RunConfig, UserError

CONFIG_NAME = "run.yaml"
"""Of the config in the package."""


def write_package(config: RunConfig, folder: Path) -> None:
    """Write code and config into an empty folder; equal ones give equal folders."""
    for package in (trainer, launcher, data_pipeline):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / CONFIG_NAME).write_text(config_file.dump(config), encoding="utf-8")


def check_paths(config: RunConfig, run_dir: Path) -> None:
    """Refuse paths that mean something only from where the user stands.

    Raises:
        UserError: names the first.
    """
    for key, path in [("--run-dir", str(run_dir)), *_paths(config)]:
        if not path.startswith("/"):
            raise UserError(
                f"{key} {path} is no whole path, and the machines of a cluster stand in another folder; begin it with "
                f"/, in a folder that all of them share"
            )


def _paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Keys of the config and the local paths that they hold."""
    data, checkpoint = config.data, config.checkpoint
    if not data.prepared:
        for name, dataset in data.named_datasets.items():
            key = f"data.datasets.{name}.sources" if data.datasets else "data.sources"
            yield from ((key, source) for source in dataset.sources if _is_local(source))
        yield from (("data.decontaminate.against", path) for path in data.decontaminate.against or ())
    single = {
        "data.prepared": data.prepared,
        "data.quality.classifier": data.quality.classifier,
        "data.tokenizer.path": data.tokenizer.path,
        "checkpoint.snapshots_in": checkpoint.snapshots_in,
        "checkpoint.upload_to": checkpoint.upload_to,
        "checkpoint.resume_from": checkpoint.resume_from,
        "checkpoint.weights_from": checkpoint.weights_from,
    }
    yield from ((key, path) for key, path in single.items() if path and _is_local(path))


def _is_local(source: str) -> bool:
    return "://" not in source and not source.startswith("hf:") and source != "python-stdlib"
