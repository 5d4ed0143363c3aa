"""What tests of Kubernetes need from outside: kubectl, CRDs as data, an API server. Where they are, and what if not."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launcher.submit.kubernetes import template

ROOT = Path(__file__).parents[1]
IN_CI = bool(os.environ.get("CI"))

OVERLAYS = ("cpu-kind", "h100-ib", "spot")


def need_tool(*names: str) -> None:
    """Skip without a tool, but in CI, where .ci/run installs it, fail."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        reason = f"needs {', '.join(missing)}, as .ci/run installs"
        pytest.fail(reason) if IN_CI else pytest.skip(reason)


def outside(variable: str, name: str, what: str) -> Path:
    """A folder beside the checkout, or where the variable points. It is no part of the repository: without it, skip."""
    path = Path(os.environ.get(variable) or ROOT.parent / "shared" / name)
    if not path.is_dir():
        pytest.skip(f"no {what}: there is no {path}; set {variable} to a folder that has them")
    return path


def crd_folder() -> Path:
    return outside("BROADGAUGE_CRDS", "crds", "CRDs of KubeRay, Kueue and the Prometheus operator (*.yaml)")


@cache
def _crd_files(folder: Path) -> dict[tuple[str, str], Path]:
    """(group, kind) -> file; whole files are read where they are needed, since it takes seconds."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text()
        names = [re.search(rf"^{key}: (\S+)$", text, re.M) for key in ("  group", "    kind")]
        found[tuple(name[1] for name in names if name)] = path
    return found  # type: ignore[return-value]


@cache
def _schema(folder: Path, api_version: str, kind: str) -> dict[str, Any]:
    """In which no unknown field is allowed."""
    group, _, version = api_version.partition("/")
    crd = yaml.load(_crd_files(folder)[group, kind].read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = (each["schema"] for each in crd["spec"]["versions"] if each["name"] == version)
    schema["openAPIV3Schema"]["properties"]["metadata"] = {"type": "object"}
    return _strict(schema["openAPIV3Schema"])


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict["properties"] = {name: _strict(each) for name, each in schema["properties"].items()}
        strict.setdefault("additionalProperties", False)
    return strict


def validate(manifest: dict[str, Any]) -> None:
    """Against the schema of its CRD."""
    schema = _schema(crd_folder(), manifest["apiVersion"], manifest["kind"])
    jsonschema.Draft7Validator(schema).validate(manifest)


@cache
def kustomized(folder: str) -> tuple[dict[str, Any], ...]:
    """What `kubectl kustomize k8s/FOLDER` prints, document by document."""
    need_tool("kubectl")
    text = template._kustomize(template.MANIFESTS / folder)
    return tuple(yaml.safe_load_all(text))


def kinds(manifests: tuple[dict[str, Any], ...]) -> Iterator[str]:
    return (manifest["kind"] for manifest in manifests)


@cache
def overlay_template(overlay: str | None) -> dict[str, Any]:
    if overlay is not None:
        need_tool("kubectl")
    return template.load(overlay)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


class ApiServer:
    """A Kubernetes API server for custom resources, on loopback, with nobody behind it: tests play the operator."""

    def __init__(self, scripts: Path, folder: Path, crds: list[Path]) -> None:
        need_tool("kubectl", "openssl", "curl", "xz")
        self._scripts, self._folder = scripts, folder
        started = _run(str(scripts / "start"), str(folder))
        if started.returncode:
            self.stop()
            raise RuntimeError(f"the API server does not start: {started.stderr}")
        self.kubeconfig = Path(started.stdout.split()[-1])
        for crd in crds:
            self._until_done("apply", "--server-side", "-f", str(crd))
        # refused at first: a server says nothing of the condition of what it has only just been told
        self._until_done("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        for crd in crds:
            names = yaml.safe_load(crd.read_text())
            self._until_done("get", f"{names['spec']['names']['plural']}.{names['spec']['group']}", "--all-namespaces")

    def _until_done(self, *arguments: str) -> None:
        """Have kubectl do it, again and again while it cannot."""
        deadline = time.monotonic() + 60.0
        cache = str(self._folder / "kubectl-cache")
        while (
            done := _run("kubectl", "--kubeconfig", str(self.kubeconfig), "--cache-dir", cache, *arguments)
        ).returncode:
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"kubectl {' '.join(arguments)} failed: {done.stderr}")
            shutil.rmtree(cache, ignore_errors=True)  # it may have asked too early what there is
            time.sleep(0.1)

    def stop(self) -> None:
        subprocess.run([str(self._scripts / "stop"), str(self._folder)], check=False, timeout=30)


def api_server(folder: Path, *crds: str) -> ApiServer:
    """With these CRDs, by the names of their files."""
    scripts = outside("BROADGAUGE_APISERVER", "apiserver", "API server for tests (`start` and `stop`)")
    return ApiServer(scripts, folder, [crd_folder() / crd for crd in crds])
