"""What evaluations have found of a checkpoint: a file beside its folder, which outlives it.

`step-<n>.results.json` is a JSON object with `format`, `identity` (of the manifest of the very checkpoint that was
evaluated: a run that goes back comes by the same step again), `step`, `scores` (numbers by name, of which the larger is
the better) and `evaluation`, what else was found, which is for whoever evaluates to know.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from trainer.checkpoint.format.manifest import Manifest
from trainer.config import UserError

FORMAT = 1
RESULTS_PATTERN = "step-*.results.json"


def results_path(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.results.json")


def write_results(
    checkpoint: Path, manifest: Manifest, scores: Mapping[str, float], evaluation: Mapping[str, Any] | None = None
) -> Path:
    """Whole or not at all."""
    path = results_path(checkpoint)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    tree = {
        "format": FORMAT,
        "identity": manifest.identity,
        "step": manifest.step,
        "scores": scores,
        "evaluation": evaluation,
    }
    try:
        temporary.write_bytes(orjson.dumps(tree, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_results(checkpoint: Path, manifest: Manifest) -> dict[str, Any] | None:
    """None where this very checkpoint has not been evaluated, or nobody can tell."""
    try:
        tree = orjson.loads(results_path(checkpoint).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    is_ours = isinstance(tree, dict) and tree.get("format") == FORMAT and tree.get("identity") == manifest.identity
    return tree if is_ours else None


def score_of(checkpoint: Path, manifest: Manifest, name: str) -> float | None:
    scores = (read_results(checkpoint, manifest) or {}).get("scores")
    value: Any = scores.get(name) if isinstance(scores, dict) else None
    return float(value) if type(value) in (float, int) else None


def read_evaluation(path: Path) -> dict[str, Any]:
    """`evaluation` of a file of results, whatever has become of its checkpoint.

    Raises:
        UserError: it is none, or of another version.
    """
    try:
        tree = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and evaluate again") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT or not isinstance(tree.get("evaluation"), dict):
        raise UserError(f"{path} holds no results of format {FORMAT}; remove it and evaluate again")
    return dict(tree["evaluation"])
