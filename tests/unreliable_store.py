"""A store for fsspec that keeps its objects in a folder and fails as it is told: `unreliable:///some/folder`.

Its objects are visible while they are being written, as on a mounted volume, and completed by whoever closes them, as
those of the drivers for object stores: the worst of both.
"""

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

ODD_ERRORS: list[Callable[[], BaseException]] = [  # of the kinds that drivers raise
    lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    lambda: ConnectionResetError("peer"),
    lambda: RuntimeError("HttpError 503\nBackend Error"),
    asyncio.TimeoutError,
    asyncio.CancelledError,
    lambda: KeyError("Contents"),
]


@dataclass
class Trouble:
    """What goes wrong: operations are counted, and from `fails_at` on all fail, or that one alone."""

    fails_at: int | None = None
    only_once: bool = False
    full_after_bytes: int | None = None
    read_only: bool = False
    truncates: str | None = None
    """Objects whose name ends so lose their last byte, and nobody says so."""
    hangs_in: str | None = None
    """The kind of operation that has no end until `released`."""
    released: threading.Event = field(default_factory=threading.Event)
    operations: list[str] = field(default_factory=list)
    written_bytes: int = 0
    lock: Any = field(default_factory=threading.Lock)

    @property
    def struck(self) -> bool:
        return self.fails_at is not None and len(self.operations) > self.fails_at

    def __call__(self, operation: str) -> None:
        if operation == self.hangs_in:
            self.released.wait()
        with self.lock:
            number = len(self.operations)
            self.operations.append(operation)
        if self.read_only and operation in ("open", "write", "remove"):
            raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))
        if self.fails_at is not None and (number == self.fails_at or (number > self.fails_at and not self.only_once)):
            raise ODD_ERRORS[number % len(ODD_ERRORS)]()

    def write(self, path: str, content: bytes, final: bool) -> None:
        """Append to an object; where it fails, half of the bytes have come."""
        try:
            self("write")
            if self.full_after_bytes is not None and self.written_bytes + len(content) > self.full_after_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except BaseException:
            content, final = content[: len(content) // 2], False
            raise
        finally:
            self.written_bytes += len(content)
            with open(path, "ab") as file:
                file.write(content)
            if final and self.truncates and path.endswith(self.truncates):
                os.truncate(path, max(0, os.path.getsize(path) - 1))


class UnreliableStore(AbstractFileSystem):
    protocol = "unreliable"
    trouble = Trouble()
    """Of all stores of this process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.trouble.hangs_in == "connect":
            self.trouble.released.wait()
        self.folder = LocalFileSystem()

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self.trouble("list")
        return self.folder.ls(path, detail)

    def info(self, path: str, **options: Any) -> Any:
        self.trouble("look")
        return self.folder.info(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        self.trouble("read")
        return self.folder.cat_file(path, start, end)

    def rm_file(self, path: str) -> None:
        self.trouble("remove")
        self.folder.rm_file(path)

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        self.trouble("mkdir")
        self.folder.mkdir(path, create_parents=create_parents)

    def rmdir(self, path: str) -> None:
        self.trouble("rmdir")
        self.folder.rmdir(path)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        self.trouble("open")
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return _Object(self, path, mode, block_size or "default", **options)


class _Object(AbstractBufferedFile):
    def _initiate_upload(self) -> None:
        Path(self.path).write_bytes(b"")

    def _upload_chunk(self, final: bool = False) -> bool:
        self.fs.trouble.write(self.path, self.buffer.getvalue(), final)
        return True


fsspec.register_implementation("unreliable", UnreliableStore, clobber=True)
