"""Whether an export is the trained model: by its logits, and by its bits.

`check_logits` opens a folder with transformers and compares what it computes with what our ranks computed. A model too
large for that is compared in two parts: `check_tensors` reads tensors of it back, by the safetensors library on both
sides, and compares every bit with the checkpoint's; and `abridgement` cuts it down to a few layers, checkpoint and
export alike, whose logits are compared.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.checkpoint.format.manifest import read_manifest
from trainer.checkpoint.huggingface.configs import shapes_of
from trainer.checkpoint.huggingface.families.choice import family_of
from trainer.checkpoint.huggingface.families.family import Part, Slab
from trainer.checkpoint.huggingface.generation import quiet
from trainer.checkpoint.huggingface.rounding import MISSES
from trainer.checkpoint.huggingface.safetensors_files import INDEX, LONE_FILE
from trainer.config import ModelConfig
from trainer.progress import Advance, unheard
from trainer.training_state import MASTER

TOLERANCE = 1e-4
"""Largest absolute difference of a logit, in fp32, between the trained and the exported model, of logits up to 10; the
rounding of larger ones (GPT-2's come to -100) grows with them, and so does what is allowed."""
_LARGE_LOGIT = 10.0
_POSITIONS_AT_ONCE = 64
BF16_TOLERANCE = 0.1
"""Of an export in bf16: root mean square of the differences over that of the logits (about their mean)."""
SAMPLED_TENSORS = 48
"""Tensors of a sample, beside those that are not of a layer."""


class ExportMismatch(RuntimeError):
    """The exported model is not the trained one."""


@dataclass(frozen=True)
class LogitDifference:
    """Between the logits of two models over the same tokens."""

    largest: float
    """Absolute."""
    relative: float
    """Root mean square over that of the trained model's logits about their mean at each position."""
    allowed: float
    """Of weights in fp32 the largest, of others the relative."""
    num_tokens: int


# ------------------------------------------------------------------------------------------------------------ by logits


def check_logits(
    folder: Path,
    reference_logits: Tensor,
    tokens: Tensor,
    dtype: torch.dtype = torch.float32,
    advance: Advance = unheard,
) -> LogitDifference:
    """Open the folder with transformers and compare its logits, computed in fp32, with the trained model's.

    Args:
        reference_logits: [batch, seq, V] fp32, of the trained model.
        tokens: [batch, seq].
        dtype: of the folder's weights; rounded ones are held to BF16_TOLERANCE.
        advance: hears over how many of the tokens they have been compared.

    Raises:
        ExportMismatch: they differ by more than is allowed, or the folder cannot be opened.
    """
    model = opened(folder)
    largest, largest_logit, squares, reference_squares = 0.0, 0.0, 0.0, 0.0
    num_compared = 0
    for found, reference in _pieces(model, tokens, reference_logits):
        difference = found - reference
        largest = max(largest, difference.abs().nan_to_num(torch.inf, torch.inf).max().item())
        largest_logit = max(largest_logit, reference.abs().nan_to_num(0, 0).max().item())
        squares += difference.double().square().sum().item()
        reference_squares += (reference - reference.mean(-1, keepdim=True)).double().square().sum().item()
        advance(num_compared := num_compared + len(found), tokens.numel())
    relative = (squares / max(reference_squares, torch.finfo(torch.float64).tiny)) ** 0.5
    is_rounded = dtype != torch.float32
    allowed = BF16_TOLERANCE if is_rounded else TOLERANCE * max(1.0, largest_logit / _LARGE_LOGIT)
    if not (relative if is_rounded else largest) <= allowed:
        by = f"{relative:.3g} of their size" if is_rounded else f"up to {largest:.3g}"
        raise ExportMismatch(
            f"the exported model's logits differ from the trained model's by {by} over {tokens.numel()} tokens, and "
            f"{allowed:.3g} is allowed; the export in {folder} must not be used"
        )
    return LogitDifference(largest, relative, allowed, tokens.numel())


@torch.inference_mode()
def _pieces(model: Any, tokens: Tensor, reference_logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The model's logits and the reference's, some positions at a time: arithmetic on all of them needs gigabytes."""
    for sequence, reference in zip(tokens.cpu(), reference_logits.cpu(), strict=True):
        logits = model(sequence[None]).logits[0]
        yield from zip(logits.split(_POSITIONS_AT_ONCE), reference.split(_POSITIONS_AT_ONCE), strict=True)


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder, with its weights in `dtype`.

    Raises:
        ExportMismatch: transformers cannot open it, or its weights are not those that its config.json asks for.
    """
    with quiet():
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ExportMismatch(f"transformers cannot open the export in {folder}: {error}") from error
    model, report = loaded
    unfitting = sorted({str(name) for names in report.values() for name in names})
    if unfitting:
        raise ExportMismatch(f"the export in {folder} does not fit its config.json: {', '.join(unfitting[:4])}")
    return model


# -------------------------------------------------------------------------------------------------------------- by bits


@dataclass(frozen=True)
class TensorComparison:
    """What was found equal, to the last bit."""

    num_tensors: int
    num_elements: int
    of_tensors: int
    """All that the export has."""


def check_tensors(
    folder: Path,
    checkpoint: Path,
    model: ModelConfig,
    dtype: torch.dtype,
    seed: int,
    sample: int | None,
    advance: Advance = unheard,
) -> TensorComparison:
    """Read exported tensors back and compare them bit for bit with the checkpoint's.

    Both are read by the safetensors library from the files themselves, by none of the code that wrote the export.

    Args:
        dtype: of the export.
        seed: of the sample.
        sample: how many tensors of layers to compare beside all others; None: all of them.
        advance: hears how many of these have been compared.

    Raises:
        ExportMismatch: names the first tensor that differs.
    """
    family = family_of(model)
    slabs = family.slabs(model, shapes_of(family, model))
    stored = _Blocks(checkpoint)
    pairs = [(slab, part) for slab in slabs for part in slab.parts]
    chosen = [pair for pair in pairs if pair[0].layer is None]
    layered = [pair for pair in pairs if pair[0].layer is not None]
    draw = random.Random(seed)
    chosen += layered if sample is None else draw.sample(layered, min(sample, len(layered)))
    num_elements = 0
    for number, (slab, part) in enumerate(chosen, 1):
        theirs, expected = _exported_tensor(folder, part.name), _expected(stored, slab, part, model).to(dtype)
        if theirs.dtype != dtype or theirs.shape != part.shape or not _same_bits(theirs, expected):
            raise ExportMismatch(f"{part.name} of the export in {folder} is not what the checkpoint holds")
        num_elements += theirs.numel()
        advance(number, len(chosen))
    return TensorComparison(len(chosen), num_elements, len(pairs))


def _expected(stored: "_Blocks", slab: Slab, part: Part, model: ModelConfig) -> Tensor:
    ours, scaling = part.read(stored.read(f"{MASTER}/{slab.ours}", slab.layer), model), part.scaling(model)
    if scaling is None:
        return ours
    misses = f"{MISSES}/{slab.ours}"
    return scaling.to_theirs(ours, stored.read(misses, slab.layer).to(torch.int8) if misses in stored else None)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _exported_tensor(folder: Path, name: str) -> Tensor:
    index = folder / INDEX
    file = json.loads(index.read_bytes())["weight_map"][name] if index.is_file() else LONE_FILE
    with safe_open(folder / file, framework="pt") as handle:
        return handle.get_tensor(name)


class _Blocks:
    """The blocks of a checkpoint, found by their names in its files."""

    def __init__(self, checkpoint: Path) -> None:
        self._blocks: dict[str, list[tuple[Path, str, list[slice]]]] = {}
        for file in read_manifest(checkpoint).files:
            with safe_open(checkpoint / file, framework="pt") as handle:
                for label in handle.keys():  # noqa: SIM118  (not a dict)
                    name, bounds = re.fullmatch(r"(.*)\[(.*)\]", label).groups()  # type: ignore[union-attr]
                    place = [slice(*map(int, bound.split(":"))) for bound in bounds.split(",")]
                    self._blocks.setdefault(name, []).append((checkpoint / file, label, place))

    def __contains__(self, name: str) -> bool:
        return name in self._blocks

    def read(self, name: str, layer: int | None) -> Tensor:
        """A whole tensor, or one layer of it; elements that no block holds are NaN."""
        blocks = self._blocks[name]
        shape = [max(place[axis].stop for _, _, place in blocks) for axis in range(len(blocks[0][2]))]
        first = 0 if layer is None else layer
        if layer is not None:
            blocks = [block for block in blocks if block[2][0].start <= layer < block[2][0].stop]
            shape[0] = 1
        whole = torch.full(shape, torch.nan)
        for path, label, (rows, *others) in blocks:
            with safe_open(path, framework="pt") as handle:
                block = handle.get_tensor(label)
            if layer is not None:
                block, rows = block[layer - rows.start : layer - rows.start + 1], slice(layer, layer + 1)
            whole[(slice(rows.start - first, rows.stop - first), *others)] = block
        return whole if layer is None else whole[0]
