"""Between checkpoints and Hugging Face folders: an export and its verification; an import and what training needs.

An export is verified in full where memory holds the model twice, and else on a sample: see
`trainer.checkpoint.huggingface.verification`.
"""

import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_pipeline.tokenization import Tokenizer, install_tokenizer
from launcher.job import JobFailed, Ranks
from trainer import config_file
from trainer.checkpoint import store
from trainer.config import ModelConfig, RunConfig, UserError
from trainer.plan import FP32, num_parameters
from trainer.rank_spec import RankSpec
from trainer.run_dir import RunDir

if TYPE_CHECKING:
    import torch

    from trainer.checkpoint.huggingface.verification import LogitDifference, TensorComparison

Dtype = Literal["fp32", "bf16"]
Verify = Literal["auto", "full", "sample", "none"]

CONFIG_FILE = "config.yaml"
TOKENIZER_FOLDER = "tokenizer"
_COPIES = 2.5  # of the model in fp32: the ranks', transformers', and room for activations and logits


@dataclass(frozen=True)
class Verified:
    """What was done to an export, and what came of it."""

    how: Verify
    largest_difference: float | None
    """Of a logit."""
    num_tokens: int
    summary: str
    """Half a line."""
    text: str
    """For the model card."""


# -------------------------------------------------------------------------------------------------------------- export


def export_checkpoint(
    config: RunConfig,
    run_dir: RunDir,
    ranks: Callable[[], Ranks],
    checkpoint: Path,
    tokenizer: Path,
    out: Path,
    facts: Mapping[str, object],
    dtype: Dtype = "fp32",
    verify: Verify = "auto",
) -> Verified:
    """Export, verify and put in place.

    Args:
        run_dir: of the run whose held-out text is used where `data.prepared` names none; there for the ranks too.
        ranks: called if logits of the whole model are needed.

    Raises:
        ExportMismatch: the export is not the trained model; nothing is left at `out`.
    """
    from trainer.checkpoint.huggingface import export, model_card  # seconds to import: not before they are needed

    weights = export.EXPORT_DTYPES[dtype]
    temporary = export.export_model(checkpoint, config, tokenizer, out, facts, dtype=weights)
    how = method(verify, config.model, available_bytes())
    try:
        with tempfile.TemporaryDirectory(prefix=".verify-", dir=out.parent) as scratch:
            verified = _verify(how, temporary, checkpoint, config, run_dir, ranks, Path(scratch), weights)
    except Exception:
        shutil.rmtree(temporary)
        raise
    model_card.add_verification(temporary, verified.text)
    export.commit(temporary, out)
    return verified


def method(verify: Verify, model: ModelConfig, memory_bytes: int) -> Verify:
    """How to verify an export, where that is left open: in full if the memory that is free suffices."""
    if verify != "auto":
        return verify
    return "full" if _COPIES * FP32 * num_parameters(model, padded=True) <= memory_bytes else "sample"


def available_bytes() -> int:
    """Memory of this machine that can be had without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    return int(found[1]) * 1024 if found else 0


def _verify(
    how: Verify,
    folder: Path,
    checkpoint: Path,
    config: RunConfig,
    run_dir: RunDir,
    ranks: Callable[[], Ranks],
    scratch: Path,
    dtype: "torch.dtype",
) -> Verified:
    from trainer.checkpoint.huggingface import verification
    from trainer.checkpoint.huggingface.abridgement import abridge

    if how == "none":
        return Verified(how, None, 0, "not verified", "Not verified, as was asked for.")
    sample = verification.SAMPLED_TENSORS if how == "sample" else None
    tensors = verification.check_tensors(folder, checkpoint, config.model, dtype, config.seed, sample)
    output = (scratch / "logits.pt").resolve()
    if how == "full":
        ranks().run("logits", lambda: None, checkpoint=checkpoint.resolve(), output=output)
        whose, opened = "the trained model's", folder
    else:
        short = abridge(folder, checkpoint, config, config.seed, scratch / "abridged")
        _run_one_rank(short.config, run_dir, short.checkpoint, output, scratch)
        layers = ", ".join(str(layer + 1) for layer in short.layers)
        whose, opened = f"the trained model's, both cut down to layers {layers}", short.export
    return _compare_logits(how, opened, output, whose, dtype, tensors)


def _compare_logits(
    how: Verify, folder: Path, output: Path, whose: str, dtype: "torch.dtype", tensors: "TensorComparison"
) -> Verified:
    import torch

    from trainer.checkpoint.huggingface import verification

    trained = torch.load(output, weights_only=True)
    found = verification.check_logits(folder, trained["logits"], trained["tokens"], dtype)
    summary = (
        f"{tensors.num_tensors} of {tensors.of_tensors} tensors equal bit for bit, logits within {found.largest:.2g} "
        f"of {whose} over {found.num_tokens} tokens"
    )
    text = (
        f"{tensors.num_tensors:,} of {tensors.of_tensors:,} tensors ({tensors.num_elements:,} numbers), read back with "
        f"`safetensors`, are the checkpoint's to the last bit{_rounded(dtype)}. Opened with `transformers`, its logits "
        f"in fp32 were compared with {whose}, over {found.num_tokens:,} tokens {trained['text']}: the largest "
        f"absolute difference of a logit is {found.largest:.3g}{_allowed(found, dtype)}."
    )
    return Verified(how, found.largest, found.num_tokens, summary, text)


def _rounded(dtype: "torch.dtype") -> str:
    return "" if dtype.itemsize == FP32 else f", once those are rounded to {str(dtype).removeprefix('torch.')}"


def _allowed(found: "LogitDifference", dtype: "torch.dtype") -> str:
    from trainer.checkpoint.huggingface.verification import BF16_TOLERANCE, TOLERANCE

    if dtype.itemsize == FP32:
        return f" ({TOLERANCE:g} is allowed)"
    return f", and their root mean square {found.relative:.2g} of the logits' own ({BF16_TOLERANCE:g} is allowed)"


def _run_one_rank(config: RunConfig, run_dir: RunDir, checkpoint: Path, output: Path, scratch: Path) -> None:
    """Logits of a small model, by one rank in a process of its own."""
    log = scratch / "rank.log"
    spec = RankSpec(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        rendezvous=f"file://{scratch.resolve()}/rendezvous",
        config_yaml=config_file.dump(config),
        run_dir=run_dir.path.resolve(),
        task="logits",
        threads=len(os.sched_getaffinity(0)),
        checkpoint=checkpoint.resolve(),
        output=output,
    )
    process = multiprocessing.get_context("spawn").Process(target=_one_rank, args=(spec, log))
    process.start()
    process.join()
    if process.exitcode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
        raise JobFailed(f"the rank that computes the model's logits failed: {lines[-1]}")


def _one_rank(spec: RankSpec, log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from trainer import rank

    rank.main(spec)


# -------------------------------------------------------------------------------------------------------------- import


@dataclass(frozen=True)
class Imported:
    checkpoint: Path
    config: RunConfig
    architecture: str
    config_path: Path
    tokenizer_problem: str | None
    """Why no data can be prepared with its tokenizer."""


def import_model(source: str, out: Path, revision: str | None = None) -> Imported:
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
    checkpoint = importing.import_weights(folder, family, config, out, origin, data)
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
