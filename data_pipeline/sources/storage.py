"""Bytes of files, local or behind a URL: opening, listing, and hashes of content. The only user of fsspec."""

import os
from collections.abc import Callable
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
import xxhash

from trainer.section import UserError

_SAMPLE_BYTES = 64 << 10
_SAMPLES = 5  # head, quarters, tail
_CONTENT_TAGS = ("md5Hash", "crc32c", "content_md5", "Content-MD5", "Digest", "ETag", "etag", "sha256", "blob_id")
"""What stores (Google's, Azure's, plain HTTP, S3, Hugging Face) call a hash of content; those that only content changes
come first."""


def is_url(source: str) -> bool:
    return "://" in source


def open_file(path: str, *, seekable: bool = True) -> BinaryIO:
    """A path or URL, to be read from.

    Raises:
        OSError: it cannot be opened.
    """
    if not is_url(path):
        return open(path, "rb", buffering=0)
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
        options = {} if seekable else {"block_size": 0}  # what fsspec's HTTP calls streaming
        return cast(BinaryIO, filesystem.open(inner, "rb", **options))
    except Exception as error:  # drivers raise whatever their own library does
        raise OSError(one_line(error)) from error


def read_block(handle: BinaryIO, num_bytes: int) -> bytes:
    """Up to so many bytes; none at the end.

    Raises:
        OSError: reading fails.
    """
    try:
        return handle.read(num_bytes)
    except OSError:
        raise
    except Exception as error:  # as above
        raise OSError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


def sampled_hash(size_bytes: int, read_at: Callable[[int, int], bytes]) -> str:
    """xxh3-128 of a file's size and of blocks at fixed fractions of it (the whole, if it is small)."""
    digest = xxhash.xxh3_128(str(size_bytes).encode())
    if size_bytes <= _SAMPLES * _SAMPLE_BYTES:
        digest.update(read_at(0, size_bytes))
    else:
        for i in range(_SAMPLES):
            digest.update(read_at((size_bytes - _SAMPLE_BYTES) * i // (_SAMPLES - 1), _SAMPLE_BYTES))
    return digest.hexdigest()


def hash_local_file(path: str, size_bytes: int) -> str:
    """`sampled_hash` of a local file.

    Raises:
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return sampled_hash(size_bytes, lambda offset, length: os.pread(descriptor, length, offset))
    finally:
        os.close(descriptor)


class Remote:
    """A store that URLs of one scheme lead to.

    Raises:
        UserError: its driver is not installed.
    """

    def __init__(self, url: str, where: str) -> None:
        self._where, self._url = where, url
        try:
            self._filesystem, self.path = fsspec.core.url_to_fs(url)
            self._filesystem.invalidate_cache()  # of listings, which outlive this object
        except ImportError as error:
            package = getattr(error.__cause__ or error.__context__ or error, "name", None)
            fix = f"pip install {package}" if package else one_line(error)
            raise UserError(f"{where}: {url} needs a driver that is not installed; {fix}") from error
        except Exception as error:
            raise UserError(f"{where}: {url} cannot be used ({one_line(error)}); check the URL") from error
        self.is_http = urlsplit(url).scheme in ("http", "https")

    @property
    def has_glob(self) -> bool:
        magic = "*[" if self.is_http else "*?["  # a question mark begins the query of a web address
        return any(char in self.path for char in magic)

    def list(self) -> dict[str, dict[str, Any]]:
        """Every file that the URL names: a file, those below a folder, those that match a glob (path -> what the
        store says of it); empty if there is none.

        Raises:
            UserError: the store does not answer.
        """
        try:
            return self._list()
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise UserError(
                f"{self._where}: {self._url} cannot be listed ({one_line(error)}); check the URL, your credentials and "
                f"the network"
            ) from error

    def _list(self) -> dict[str, dict[str, Any]]:
        filesystem = self._filesystem
        if self.has_glob:
            matches: dict[str, dict[str, Any]] = filesystem.glob(self.path, detail=True)
        else:
            matches = {self.path: filesystem.info(self.path)}
        files = {}
        for path, info in matches.items():
            if info.get("type") == "directory" or path.endswith("/"):
                files.update(filesystem.find(path, detail=True))
            else:
                files[path] = info
        # a listing of a web server's folder gives links only
        return {path: filesystem.info(path) if info.get("size") is None else info for path, info in files.items()}

    def url_of(self, path: str) -> str:
        return str(self._filesystem.unstrip_protocol(path))

    def is_seekable(self, info: dict[str, Any]) -> bool:
        return bool(info.get("size") is not None and (not self.is_http or info.get("partial")))

    def hash_file(self, path: str, info: dict[str, Any]) -> str:
        """The store's own hash with the size, or `sampled_hash`; of a web server that has neither, size and head."""
        size_bytes = info.get("size")
        for tag in _CONTENT_TAGS:
            if info.get(tag):
                return f"{size_bytes} {tag} {info[tag]}"
        if self.is_seekable(info):
            return sampled_hash(
                size_bytes or 0,
                lambda offset, length: (
                    self._filesystem.cat_file(path, start=offset, end=offset + length) if length else b""
                ),
            )
        with open_file(self.url_of(path), seekable=False) as handle:
            head = read_block(handle, _SAMPLE_BYTES)
        return f"{size_bytes} {xxhash.xxh3_128_hexdigest(head)}"
