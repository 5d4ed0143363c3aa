"""Peak memory and time of exporting and importing a 1.3B model: `make bench-export`.

The checkpoint, of random weights, is written straight in the checkpoint's format. Every step is a process of its own,
whose peak resident memory (VmHWM, imports and all) the kernel tells. Reading and writing are pread and pwrite, so that
the page cache is not counted; the verification reads through the safetensors library, whose memory map is.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trainer import config_file
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.huggingface import abridgement, configs, export, importing, verification
from trainer.checkpoint.huggingface.checkpoint_weights import CheckpointWriter
from trainer.checkpoint.huggingface.families.choice import family_of
from trainer.config import RunConfig
from trainer.plan import num_parameters


def write_checkpoint(config: RunConfig, folder: Path) -> None:
    family = family_of(config.model)
    slabs = family.slabs(config.model, configs.shapes_of(family, config.model))
    writer = CheckpointWriter(store.begin(folder / "checkpoints", 1), config.model, slabs)
    draw = torch.Generator().manual_seed(1)
    for slab in slabs:
        writer.write(slab, torch.randn(slab.shape(config.model), generator=draw).mul_(config.model.init_std))
    writer.commit(Manifest(1, config.train.global_batch_size, config.model_dump(mode="json")))
    tokenizer = {"<|endoftext|>": 0, "word": 1}
    content = {"model": {"type": "WordLevel", "vocab": tokenizer, "unk_token": "word"}, "version": "1.0"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": []}))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))


def import_only(config: RunConfig, folder: Path) -> None:
    """What every step below imports before it begins."""


def export_as(dtype: str) -> Callable[[RunConfig, Path], None]:
    def work(config: RunConfig, folder: Path) -> None:
        checkpoint, out = folder / "checkpoints" / store.folder_name(1), folder / f"export-{dtype}"
        weights = export.EXPORT_DTYPES[dtype]
        export.commit(export.export_model(checkpoint, config, folder / "tokenizer", out, {}, dtype=weights), out)

    return work


def import_back(config: RunConfig, folder: Path) -> None:
    source = folder / "export-fp32"
    family, model = configs.read_config(source)
    theirs = config.model_copy(update={"model": model})
    importing.import_weights(source, family, theirs, folder / "import", "benchmark", {})


def compare_sample(config: RunConfig, folder: Path) -> None:
    checkpoint, sample = folder / "checkpoints" / store.folder_name(1), verification.SAMPLED_TENSORS
    verification.check_tensors(folder / "export-fp32", checkpoint, config.model, torch.float32, 1, sample)


def cut_down(config: RunConfig, folder: Path) -> None:
    checkpoint = folder / "checkpoints" / store.folder_name(1)
    abridgement.abridge(folder / "export-fp32", checkpoint, config, 1, folder / "abridged", num_pairs=3)


STEPS: dict[str, Callable[[RunConfig, Path], None]] = {
    "import torch and transformers": import_only,
    "write the checkpoint": write_checkpoint,
    "export, fp32": export_as("fp32"),
    "export, bf16": export_as("bf16"),
    "import the fp32 export": import_back,
    "compare a sample of tensors": compare_sample,
    "cut down to six layers": cut_down,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gpt3_xl")
    parser.add_argument("--folder", type=Path, help="where to work, with room for four copies of the model")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = config_file.from_tree({"preset": arguments.preset})
    if arguments.step:
        started = time.monotonic()
        STEPS[arguments.step](config, arguments.folder)
        print(json.dumps([time.monotonic() - started, _peak_mb()]))
        return
    print(f"{arguments.preset}: {num_parameters(config.model):,} weights")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for step in STEPS:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.export", "--preset", arguments.preset]
            done = subprocess.run([*command, "--folder", folder, "--step", step], stdout=subprocess.PIPE, check=True)
            seconds, peak_mb = json.loads(done.stdout.splitlines()[-1])
            print(f"{step:32} {seconds:7.1f} s   peak {peak_mb:6,.0f} MB", flush=True)


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()
