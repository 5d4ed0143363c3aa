"""Exports to Hugging Face, each verified before it appears.

In full where memory holds the model twice, and else on a sample: see `trainer.checkpoint.huggingface.verification`.
"""

import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainer import config_file
from trainer.config import ModelConfig, RunConfig
from trainer.plan import FP32, num_parameters
from trainer.progress import Update, counting, unheard
from trainer.rank_spec import RankSpec
from trainer.run_dir import RunDir

if TYPE_CHECKING:
    import torch

    from launcher.job.ranks import Ranks
    from trainer.checkpoint.huggingface.verification import LogitDifference, TensorComparison

Dtype = Literal["fp32", "bf16"]
Verify = Literal["auto", "full", "sample", "none"]

MAX_PAIRS = 3
"""Of layers in a model cut down."""
_COPIES = 2.5  # of the model in fp32: the ranks', transformers', and room for activations and logits


class RankLost(RuntimeError):
    """The process that computes logits has failed; one line says why."""


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


def export_checkpoint(
    config: RunConfig,
    run_dir: RunDir,
    ranks: Callable[[], "Ranks"],
    checkpoint: Path,
    tokenizer: Path,
    out: Path,
    facts: Mapping[str, object],
    dtype: Dtype = "fp32",
    verify: Verify = "auto",
    update: Update = unheard,
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
    temporary = export.export_model(
        checkpoint, config, tokenizer, out, facts, dtype=weights, advance=counting(update, "export: writing", "tensors")
    )
    how = method(verify, config.model, available_bytes())
    try:
        with _scratch(out.with_name(f".{out.name}.verify")) as scratch:
            verified = _verify(how, temporary, checkpoint, config, run_dir, ranks, scratch, weights, update)
    except Exception:
        shutil.rmtree(temporary)
        raise
    model_card.add_verification(temporary, verified.text)
    export.commit(temporary, out)
    return verified


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for a while; one that was left by a command that was killed is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def method(verify: Verify, model: ModelConfig, memory_bytes: int) -> Verify:
    """How to verify an export, where that is left open: in full if the memory that is free suffices."""
    if verify != "auto":
        return verify
    return "full" if _COPIES * FP32 * num_parameters(model, padded=True) <= memory_bytes else "sample"


def pairs_that_fit(model: ModelConfig, memory_bytes: int) -> int:
    """Pairs of layers for a model cut down, of which memory holds one copy with its logits at a time; at least 1."""
    smallest, one_more = (model.model_copy(update={"num_layers": count}) for count in (2, 4))
    pair_bytes = FP32 * (num_parameters(one_more) - num_parameters(smallest))
    room_bytes = memory_bytes / _COPIES - FP32 * num_parameters(smallest, padded=True)
    return max(1, min(MAX_PAIRS, 1 + int(room_bytes // pair_bytes)))


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
    ranks: Callable[[], "Ranks"],
    scratch: Path,
    dtype: "torch.dtype",
    update: Update,
) -> Verified:
    from trainer.checkpoint.huggingface import verification
    from trainer.checkpoint.huggingface.abridgement import abridge

    if how == "none":
        return Verified(how, None, 0, "not verified", "Not verified, as was asked for.")
    sample = verification.SAMPLED_TENSORS if how == "sample" else None
    tensors = verification.check_tensors(
        folder, checkpoint, config.model, dtype, config.seed, sample, counting(update, "export: comparing", "tensors")
    )
    update("export: computing logits", 0, None, "tokens")
    output = (scratch / "logits.pt").resolve()
    if how == "full":
        ranks().run("logits", lambda: None, checkpoint=checkpoint.resolve(), output=output)
        whose, opened = "the trained model's", folder
    else:
        num_pairs = pairs_that_fit(config.model, available_bytes())
        short = abridge(folder, checkpoint, config, config.seed, scratch / "abridged", num_pairs)
        _run_one_rank(short.config, run_dir, short.checkpoint, output, scratch)
        layers = ", ".join(str(layer + 1) for layer in short.layers)
        whose, opened = f"the trained model's, both cut down to layers {layers}", short.export
    return _compare_logits(how, opened, output, whose, dtype, tensors, update)


def _compare_logits(
    how: Verify,
    folder: Path,
    output: Path,
    whose: str,
    dtype: "torch.dtype",
    tensors: "TensorComparison",
    update: Update,
) -> Verified:
    import torch

    from trainer.checkpoint.huggingface import verification

    trained = torch.load(output, weights_only=True)
    advance = counting(update, "export: comparing logits", "tokens")
    found = verification.check_logits(folder, trained["logits"], trained["tokens"], dtype, advance)
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
    relative = f", and their root mean square {found.relative:.2g} of the logits' own"
    return f"{'' if dtype.itemsize == FP32 else relative} ({found.allowed:.2g} is allowed)"


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
        raise RankLost(f"the rank that computes the model's logits failed: {lines[-1]}")


def _one_rank(spec: RankSpec, log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from trainer import rank

    rank.main(spec)
