"""What is installed: ranks of one run must run the same code on all machines."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import xxhash

from launcher.doctor.finding import Finding, fail, ok, skipped

NAME = "versions"
_PACKAGES = ("torch", "ray", "broadgauge")
_OURS = ("trainer", "launcher", "data_pipeline")
_ROOT = Path(__file__).parents[3]

Versions = Mapping[str, str]


def measure() -> Versions:
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}, "code": code_hash()}


def code_hash(root: Path = _ROOT) -> str:
    """Of Broadgauge's files as they are: two checkouts may call themselves the same version."""
    digest = xxhash.xxh3_64()
    for path in sorted(path for package in _OURS for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def judge(found: Mapping[str, Versions]) -> Finding:
    """Machine -> what it has."""
    first, *others = found.values()
    if not others:
        return skipped(NAME, f"one machine: {_listed(first)}")
    differing = [name for name in first if any(each.get(name) != first[name] for each in others)]
    if not differing:
        return ok(NAME, f"the same on {len(found)}: {_listed(first)}")
    name, machines = differing[0], dict[str, list[str]]()
    for machine, each in found.items():
        machines.setdefault(each.get(name, "not there"), []).append(machine)
    measured = "; ".join(f"{name} {number} on {', '.join(on)}" for number, on in machines.items())
    more = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
    return fail(NAME, f"{measured}{more}", "install the same code and constraints.txt, or the same image, on all")


def _listed(versions: Versions) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
