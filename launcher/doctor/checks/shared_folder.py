"""Whether all machines see one folder for the run: its checkpoints, and the data that it prepares, lie there."""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from launcher.doctor.checks.folders import existing
from launcher.doctor.finding import Finding, fail, ok

NAME = "shared folder"


@contextmanager
def marker(folder: Path) -> Iterator[Path]:
    """A file in the folder, or where it will be, for as long as machines are asked for it.

    Raises:
        UserError, OSError: none can be made.
    """
    path = existing(folder) / f".doctor-{secrets.token_hex(8)}"
    path.touch(exist_ok=False)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def judge(folder: Path, seen: Mapping[str, bool]) -> Finding:
    """Machine -> whether it has seen a file made there."""
    blind = [name for name, has_seen in seen.items() if not has_seen]
    if not blind:
        return ok(NAME, f"{len(seen)} machines see what is written to {folder}")
    return fail(
        NAME,
        f"a file made in {folder} is not seen on {', '.join(blind)}",
        "mount one file system on all machines, and put --run-dir there",
    )
