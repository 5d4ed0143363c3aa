"""Where a folder is that may not exist yet."""

from pathlib import Path

from trainer.config import UserError


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists.

    Raises:
        UserError: something else is in its place.
    """
    folder = folder.expanduser().absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise UserError(f"{there} is no folder; move it, or name another folder than {folder}")
    return there
