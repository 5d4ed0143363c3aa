"""The RayJob that a run's is made from: `k8s/base/rayjob`, or an overlay of it, which `kubectl` renders."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainer.config import UserError

MANIFESTS = Path(__file__).parents[3] / "k8s"
_KUSTOMIZATION = "kustomization.yaml"
_RENDERING_SECONDS = 60.0


def load(overlay: str | None) -> dict[str, Any]:
    """The template: the base's own, or an overlay's.

    Args:
        overlay: a folder of `k8s/overlays`, or any kustomization (or a folder with one in `rayjob/`) that renders one
            RayJob.

    Raises:
        UserError: there is no such overlay, it cannot be rendered, or it holds no RayJob.
    """
    if overlay is None:
        base = MANIFESTS / "base" / "rayjob" / "rayjob.yaml"
        if not base.exists():
            raise UserError(f"{base} is missing, as in an installation without k8s/; give --overlay DIR")
        return only_rayjob(base.read_text(encoding="utf-8"), base)
    folder = find(overlay)
    return only_rayjob(_kustomize(folder), folder)


def find(overlay: str) -> Path:
    """The folder of an overlay's kustomization.

    Raises:
        UserError: there is none.
    """
    for folder in (MANIFESTS / "overlays" / overlay, Path(overlay)):
        for each in (folder / "rayjob", folder):
            if (each / _KUSTOMIZATION).exists():
                return each
    known = sorted(path.name for path in (MANIFESTS / "overlays").glob("*"))
    raise UserError(
        f"--overlay {overlay} is neither a folder with a {_KUSTOMIZATION} nor one of {', '.join(known) or 'none'}"
    )


def only_rayjob(text: str, source: Path) -> dict[str, Any]:
    """The one RayJob among YAML documents.

    Raises:
        UserError: there is none, or there are several.
    """
    found = [each for each in yaml.safe_load_all(text) if isinstance(each, dict) and each.get("kind") == "RayJob"]
    if len(found) != 1:
        raise UserError(f"{source} holds {len(found)} RayJobs, and a run is one; leave one of them")
    return found[0]


def dump(rayjob: Mapping[str, Any]) -> str:
    """As YAML for a person, or for `kubectl apply`: texts of several lines as such."""
    return yaml.dump(dict(rayjob), Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """With texts of several lines as blocks, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


def _kustomize(folder: Path) -> str:
    command = ["kubectl", "kustomize", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_RENDERING_SECONDS, check=False)
    except FileNotFoundError as error:
        raise UserError(f"--overlay {folder} needs kubectl 1.27 or newer to render it, and there is none") from error
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {' '.join(done.stderr.split())}")
    return done.stdout
