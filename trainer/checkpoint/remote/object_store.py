"""Bytes behind a URL, through fsspec: its only user in the trainer.

Drivers raise what their own libraries do, and may wait for ever. Here every operation runs in a thread of its own, for
which one waits so long and no longer, and whatever goes wrong comes out as `RemoteFailed`. The thread itself cannot be
ended: one that hangs stays until the process ends, which it does not hold up.

A store belongs to the process that opened it, because the event loop of fsspec's asynchronous drivers does not survive
a fork; threads may share it. It is no cached instance of fsspec's, and keeps no listings.
"""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from trainer.checkpoint.format.manifest import sync_folder
from trainer.config import UserError
from trainer.urls import without_secrets

TIMEOUT_SECONDS = 300.0  # of one operation; above the retries that drivers make by themselves
PIECE_BYTES = 16 << 20
_MOST_PARTS = 10_000  # of one upload: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
_PART_UNIT_BYTES = 1 << 20  # Google's parts must be multiples of 256 KiB
_NOT_THERE = (FileNotFoundError, NotADirectoryError)
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/?(?!/)")


class RemoteFailed(Exception):
    """A store did not do what it was asked to: where, what and why, in one line. Asking again later may help."""


class ObjectStore:
    """Objects below one URL; all paths are relative to it.

    Every method raises `RemoteFailed` for whatever goes wrong between here and the store.

    Raises:
        UserError: the URL makes no sense, its driver is not installed, or no store answers there.
    """

    def __init__(self, url: str, *, timeout_seconds: float = TIMEOUT_SECONDS, piece_bytes: int = PIECE_BYTES) -> None:
        self.url, self._timeout_seconds, self.piece_bytes = without_secrets(url), timeout_seconds, piece_bytes
        if "::" in url or not url.strip():
            raise UserError(
                f"{self.url or 'an empty URL'} is no place to store at; give a folder or a URL like s3://a/b"
            )
        scheme, _, rest = url.partition(":")
        if "://" not in url and _ONE_SLASH.match(url):
            raise UserError(f"{self.url} has too few slashes for a URL; write {scheme}://{rest.lstrip('/')}")
        try:
            self._filesystem, root = _within(
                timeout_seconds, lambda: fsspec.core.url_to_fs(url, skip_instance_cache=True)
            )
        except ImportError as error:
            package = getattr(error.__cause__ or error.__context__ or error, "name", None)
            fix = f"pip install {package}" if package else one_line(error)
            raise UserError(f"{self.url} needs a driver that is not installed; {fix}") from error
        except _Hangs:
            raise UserError(
                f"{self.url} has not answered in {timeout_seconds:g} s; check the URL and the network"
            ) from None
        except Exception as error:
            raise UserError(f"{self.url} cannot be used ({one_line(error)}); check the URL") from error
        self._root = root.rstrip("/")
        if not self._root.strip("/"):
            raise UserError(f"{self.url} names no bucket or folder; give one, like s3://a/b")
        self._filesystem.dircache.use_listings_cache = False  # others write there too

    def listing(self, folder: str = "") -> dict[str, int | None]:
        """Names in a folder with their size (bytes; None for folders); none if it does not exist."""
        action, path = f"listing {folder or 'its folders'}", self._path(folder)
        found = self._ask(action, self._filesystem.ls, path, detail=True, or_none=True)
        return {
            info["name"].rstrip("/").rpartition("/")[2]: info.get("size") if info["type"] == "file" else None
            for info in found or ()
        }

    def size(self, name: str) -> int | None:
        """Bytes of an object, None if it is not there."""
        info = self._ask(f"looking for {name}", self._filesystem.info, self._path(name), or_none=True)
        return info["size"] if info and info["type"] == "file" else None

    def get(self, name: str, first: int | None = None, end: int | None = None) -> bytes | None:
        """An object, or its bytes from `first` to before `end`; None if it is not there."""
        action, path = f"reading {name}", self._path(name)
        return self._ask(action, self._filesystem.cat_file, path, start=first, end=end, or_none=True)

    def pieces(self, name: str, num_bytes: int) -> Iterator[bytes]:
        """The first `num_bytes` of an object, or as many as there are, piece by piece."""
        for first in range(0, num_bytes, self.piece_bytes):
            end = min(first + self.piece_bytes, num_bytes)
            piece = self.get(name, first, end) or b""
            yield piece
            if len(piece) != end - first:
                return

    def put(self, name: str, content: bytes) -> None:
        """Write a small object, whole."""
        self._in_folder(name, lambda or_none: self._put(name, content, or_none))

    def put_file(self, name: str, source: Path) -> list[Any]:
        """Copy a file there; returns [bytes, xxh3-128 in hex] of what was read.

        Raises:
            OSError: the file cannot be read.
        """
        with open(source, "rb") as file:
            num_bytes = source.stat().st_size
            if num_bytes <= self.piece_bytes:  # one request
                content = file.read()
                self.put(name, content)
                return [len(content), xxhash.xxh3_128_hexdigest(content)]
            part_bytes = _part_bytes(num_bytes, self.piece_bytes)
            handle = self._in_folder(name, lambda or_none: self._open(name, part_bytes, or_none))
            try:
                digest = xxhash.xxh3_128()
                while piece := file.read(self.piece_bytes):
                    digest.update(piece)
                    self._ask(f"writing {name}", handle.write, piece)
                self._ask(f"completing {name}", handle.close)
            except BaseException:
                self._abandon(handle)
                raise
            self._settle(name)
            return [file.tell(), digest.hexdigest()]

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        self._ask(f"removing {name}", self._filesystem.rm_file, self._path(name), or_none=True)

    def remove_folder(self, folder: str) -> None:
        """Remove an empty folder, where folders are more than the beginnings of names."""
        path = self._path(folder)
        info = self._ask(f"looking for {folder}", self._filesystem.info, path, or_none=True)
        if info and info["type"] == "directory":
            self._ask(f"removing {folder}", self._filesystem.rmdir, path, or_none=True)

    # ---------------------------------------------------------------------------------------------------------- inside

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _ask(self, action: str, call: Callable[..., Any], *args: Any, or_none: bool = False, **kwargs: Any) -> Any:
        """Call a driver; `or_none`: None where it finds no such object."""
        try:
            return _within(self._timeout_seconds, lambda: call(*args, **kwargs))
        except _Hangs:
            raise RemoteFailed(f"{self.url}: {action} has not ended in {self._timeout_seconds:g} s") from None
        except _NOT_THERE as error:
            if or_none:
                return None
            raise RemoteFailed(f"{self.url}: {action} failed ({one_line(error)})") from error
        except Exception as error:
            raise RemoteFailed(f"{self.url}: {action} failed ({one_line(error)})") from error

    def _put(self, name: str, content: bytes, or_none: bool) -> bool | None:
        def put() -> bool:
            self._filesystem.pipe_file(self._path(name), content)
            return True

        done: bool | None = self._ask(f"writing {name}", put, or_none=or_none)
        if done:
            self._settle(name)
        return done

    def _open(self, name: str, part_bytes: int, or_none: bool) -> Any:
        return self._ask(
            f"writing {name}", self._filesystem.open, self._path(name), "wb", block_size=part_bytes, or_none=or_none
        )

    def _in_folder(self, name: str, write: Callable[[bool], Any]) -> Any:
        """Write; where the folder is missed, make it and write again. Buckets are never made."""
        done = write(True)
        if done is not None:
            return done
        levels = self._path(name).strip("/").split("/")
        for depth in range(2, len(levels)):
            folder = "/" * self._path(name).startswith("/") + "/".join(levels[:depth])
            self._ask(f"making the folder of {name}", self._make_folder, folder)
        return write(False)

    def _make_folder(self, path: str) -> None:
        if not self._filesystem.isdir(path):
            with suppress(FileExistsError):  # another thread was faster
                self._filesystem.mkdir(path, create_parents=False)

    def _abandon(self, handle: Any) -> None:
        """Let go of a file that is half written, so that nothing completes it; drivers would when it is collected."""
        with suppress(Exception):
            if isinstance(handle, AbstractBufferedFile):
                handle.closed = True
                self._ask("giving up an upload", handle.discard)
            else:
                self._ask("giving up an upload", handle.close)

    def _settle(self, name: str) -> None:
        """On a file system of this machine, wait until the disk has it; stores promise that by themselves."""
        if isinstance(self._filesystem, LocalFileSystem):
            path = Path(self._path(name))
            for each in (path, path.parent):
                self._ask(f"syncing {name}", sync_folder, each)


class _Hangs(Exception):
    pass


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call returns or raises; `_Hangs` if that takes longer. Its thread is then left to itself."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="object-store", daemon=True).start()
    try:
        error = outcome.exception(seconds)
    except TimeoutError:
        raise _Hangs from None
    if error is None:
        return outcome.result()
    if isinstance(error, Exception):
        raise error
    raise RuntimeError(one_line(error)) from error  # asyncio's cancellation is no Exception


def _part_bytes(num_bytes: int, piece_bytes: int) -> int:
    """How large the parts of an upload are: a piece, or more where there would be too many of them."""
    least = -(-num_bytes // _MOST_PARTS)
    return piece_bytes if least <= piece_bytes else -(-least // _PART_UNIT_BYTES) * _PART_UNIT_BYTES


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
