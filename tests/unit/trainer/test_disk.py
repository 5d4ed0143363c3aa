"""Copies of snapshots on disk: every byte, of any size, and what is read back is what the disk has."""

import errno
import os
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made_snapshots import folder_in_memory
from trainer.checkpoint.format import disk
from trainer.checkpoint.format.disk import copy_durably, fingerprint_on_disk, reason_of
from trainer.checkpoint.format.manifest import fingerprint

PAGE, PIECE = 4096, 8 << 20
SIZES = [
    0,
    1,
    511,
    512,
    PAGE - 1,
    PAGE,
    PAGE + 1,
    3 * PAGE - 7,
    *(PIECE + d for d in (-PAGE, -1, 0, 1, PAGE)),
    2 * PIECE,
]


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    with folder_in_memory() as memory:
        yield memory


@pytest.mark.parametrize("size", SIZES)
def test_a_copy_has_every_byte_and_is_vouched_for(folder: Path, size: int) -> None:
    source, target = folder / "source", folder / "target"
    source.write_bytes(content(size))
    target.write_bytes(b"an older and longer one" * (1 + size // 10))
    copy_durably(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert fingerprint_on_disk(target) == fingerprint(target) == fingerprint(source)
    assert fingerprint_on_disk(target)[0] == size


@pytest.mark.parametrize("size", [1, PAGE + 1, PIECE + 5])
def test_a_disk_that_cannot_pass_the_page_cache_by(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct access")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    (tmp_path / "source").write_bytes(content(size))
    copy_durably(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == content(size)
    assert fingerprint_on_disk(tmp_path / "target") == fingerprint(tmp_path / "source")


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("most", [1 << 20, 100_000, 2 * PAGE + 512])
def test_a_disk_that_takes_and_gives_less_than_it_is_asked_for(
    tmp_path: Path, is_direct: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (1 << 20) + 3 * PAGE + 17
    (tmp_path / "source").write_bytes(content(size))
    open_file, pwrite, preadv = os.open, os.pwrite, os.preadv
    monkeypatch.setattr(disk, "_PIECE_BYTES", 1 << 20)
    if not is_direct:
        monkeypatch.setattr(os, "open", lambda path, flags, *rest: open_file(path, flags & ~os.O_DIRECT, *rest))

    def write_less(descriptor: int, data: Any, offset: int) -> int:
        assert not is_direct or offset % PAGE == 0, "a disk refuses a direct write that does not begin at a page"
        if len(data) == PAGE:
            return pwrite(descriptor, data, offset)
        return min(pwrite(descriptor, data, offset), most)

    def read_less(descriptor: int, buffers: Any, offset: int) -> int:
        assert not is_direct or offset % PAGE == 0
        return min(preadv(descriptor, buffers, offset), most)

    monkeypatch.setattr(os, "pwrite", write_less)
    monkeypatch.setattr(os, "preadv", read_less)
    copy_durably(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == content(size)
    assert fingerprint_on_disk(tmp_path / "target") == fingerprint(tmp_path / "source")


@pytest.mark.parametrize(("call", "returns"), [("pwrite", 0), ("pwrite", 100), ("preadv", 0), ("preadv", 100)])
def test_a_disk_that_does_not_go_on_is_an_error_and_no_endless_loop(
    tmp_path: Path, call: str, returns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").write_bytes(content(3 * PAGE))
    copy_durably(tmp_path / "source", tmp_path / "target")
    monkeypatch.setattr(os, call, lambda *_: returns)
    with pytest.raises(OSError, match="the disk does not go on at byte 0 of 12288") as caught:
        copy_durably(tmp_path / "source", tmp_path / "target")
        fingerprint_on_disk(tmp_path / "target")
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_of_the_disk_is_told_as_it_is(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    (tmp_path / "source").write_bytes(content(3 * PAGE))
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        copy_durably(tmp_path / "source", tmp_path / "target")
    assert reason_of(caught.value) == os.strerror(code)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """The copy itself: what is mapped is the snapshot, which is memory anyway."""
    with open(tmp_path / "source", "wb") as file:
        file.truncate(64 << 20)

    def high_water_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))

    before = high_water_bytes()
    tracemalloc.start()
    copy_durably(tmp_path / "source", tmp_path / "target")
    fingerprint_on_disk(tmp_path / "target")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 and high_water_bytes() - before < 2 * PIECE


# --------------------------------------------------------------------------------------------- what the disk really has


def test_a_copy_does_not_fill_the_page_cache_and_is_read_from_the_disk(tmp_path: Path) -> None:
    size = 4 << 20
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content(size))
    if not _goes_direct(tmp_path):
        pytest.skip("this file system has no direct access")
    copy_durably(source, target)
    before = _bytes_read()
    assert fingerprint_on_disk(target) == fingerprint(source)
    assert _bytes_read() - before >= size


def _goes_direct(folder: Path) -> bool:
    descriptor, is_direct = disk._open_direct(folder / "probe", os.O_WRONLY | os.O_CREAT)
    os.close(descriptor)
    file_system = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True).stdout.strip()
    return is_direct and file_system not in ("tmpfs", "overlayfs", "ramfs")


def _bytes_read() -> int:
    """Which this process has had fetched from block devices (proc(5), `read_bytes`)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@pytest.fixture
def loop_disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The image of a disk, and where its file system is mounted: what is changed in one the other does not hear of."""
    image, folder = tmp_path / "image", tmp_path / "mounted"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    folder.mkdir()
    commands = (["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(folder)])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"loop devices are not to be had here: {done.stderr.strip()}")
    try:
        yield image, folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("is_direct", [True, False])
def test_rot_under_the_page_cache_is_seen(
    loop_disk: tuple[Path, Path], is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page cache still has what was written; the disk does not any more."""
    image, folder = loop_disk
    real = os.open
    if not is_direct:
        monkeypatch.setattr(os, "open", lambda path, flags, *rest: real(path, flags & ~os.O_DIRECT, *rest))
    mark = content(3 * PAGE)
    (folder / "source").write_bytes(mark)
    copy_durably(folder / "source", folder / "target")
    subprocess.run(["sync", "-f", str(folder)], check=True)
    written = fingerprint(folder / "target")  # which fills the page cache
    assert fingerprint_on_disk(folder / "target") == written and (folder / "target").read_bytes() == mark
    whole = bytearray(image.read_bytes())
    start = whole.find(mark)
    while start >= 0:
        whole[start + PAGE + 5] ^= 8
        start = whole.find(mark, start + 1)
    with open(image, "r+b") as file:
        file.write(whole)
        os.fsync(file.fileno())
    assert (folder / "target").read_bytes() == mark, "the page cache should not know yet"
    assert fingerprint_on_disk(folder / "target") != written
