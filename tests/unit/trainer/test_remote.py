"""Copies of checkpoints on other stores: what exists there and what does not, whatever goes wrong on the way."""

import gc
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pytest

from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest, fingerprint, read_manifest
from trainer.checkpoint.remote.copies import Remote
from trainer.checkpoint.remote.object_store import RemoteFailed, _part_bytes
from trainer.config import UserError
from unreliable_store import Trouble, UnreliableStore

PIECE = 1000  # bytes; the larger files take several
SIZES = {"rank-00000.safetensors": 3456, "rank-00001.safetensors": 2 * PIECE, "tokenizer.json": 77, "empty": 0}


FEW = {"rank-00000.safetensors": 2 * PIECE + 5, "tokenizer.json": 77}


def make(checkpoints: Path, step: int, seed: int = 0, sizes: dict[str, int] = SIZES) -> Path:
    """Commit a checkpoint of made-up bytes, other ones for another seed."""
    folder, content = store.begin(checkpoints, step), random.Random(1000 * step + seed)
    for name, size in sizes.items():
        (folder / name).write_bytes(content.randbytes(size))
    files = {name: fingerprint(folder / name, durable=True) for name in sizes}
    return store.commit(folder, Manifest(step, step * 16, {"seed": seed}, files=files))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copy_of(remote: Remote, folder: Path) -> None:
    remote.upload(folder)
    remote.commit(read_manifest(folder))


def failure(kind: type[Exception], call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(kind) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- stores


S3_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(*server.get_host_and_port(), sep=":", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket of a server that speaks S3."""
    command, pipes = [sys.executable, "-c", S3_SERVER], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True, **pipes) as server,
        pytest.MonkeyPatch.context() as environment,
    ):
        assert server.stdout is not None
        environment.setenv("AWS_ENDPOINT_URL", f"http://{server.stdout.readline().strip()}")
        environment.setenv("AWS_ACCESS_KEY_ID", "anybody")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
        server.kill()


@pytest.fixture(params=["memory", "folder", "file", "unreliable", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{tmp_path.name}/run"
    there = tmp_path / "volume" / "runs" / "run"
    return {"memory": f"memory:/{there}", "folder": str(there)}.get(request.param, f"{request.param}://{there}")


def opened(url: str, **options: Any) -> Remote:
    return Remote.open(url, **({} if url.startswith("s3:") else {"piece_bytes": PIECE}), **options)


@pytest.fixture(autouse=True)
def trouble() -> Iterator[Callable[..., Trouble]]:
    """Gives the unreliable stores new trouble; none before and after."""

    def begin(**kinds: Any) -> Trouble:
        UnreliableStore.trouble.released.set()
        UnreliableStore.trouble = Trouble(**kinds)
        return UnreliableStore.trouble

    begin()
    yield begin
    begin()
    threads_end()


def threads_end() -> None:
    for thread in threading.enumerate():
        if thread.name == "object-store":
            thread.join()


class Unreliable:
    """A store that can fail, with one good checkpoint in it, and the local ones."""

    def __init__(self, place: Path) -> None:
        self.there, self.here, self.elsewhere = (place / name for name in ("there", "here", "elsewhere"))
        self.remote = opened(f"unreliable://{self.there}")
        self.before = make(self.here, 3)
        copy_of(self.remote, self.before)

    def content(self, step: int) -> dict[str, bytes]:
        """What lies there, without what says that it has arrived."""
        found = contents(self.there / store.folder_name(step))
        return {name: content for name, content in found.items() if ".xxh3-" not in name}

    def exist(self) -> list[int]:
        """Steps that any reader would take for checkpoints; every one of them must be whole."""
        found = []
        for step in store.steps(self.there):
            with suppress(UserError):
                read_manifest(self.there / store.folder_name(step))
                found.append(step)
        for step in found:
            store.verify(self.there / store.folder_name(step))
        return found


@pytest.fixture
def unreliable(tmp_path: Path) -> Unreliable:
    return Unreliable(tmp_path)


# ------------------------------------------------------------------------------------------------------- there and back


def test_a_checkpoint_exists_there_from_its_manifest_on(url: str, tmp_path: Path) -> None:
    remote, folder = opened(url), make(tmp_path / "here", 7)
    remote.check()
    assert remote.steps() == remote.unfinished() == []
    assert remote.upload(folder) == sum(SIZES.values())
    assert remote.steps() == [] and remote.unfinished() == [7]
    assert "is not a checkpoint" in failure(UserError, remote.read_manifest, 7)
    remote.commit(read_manifest(folder))
    assert remote.steps() == [7] and remote.unfinished() == []
    assert remote.read_manifest(7) == read_manifest(folder)
    assert contents(opened(url).fetch(7, tmp_path / "elsewhere")) == contents(folder)
    assert store.verify(tmp_path / "elsewhere" / folder.name).step == 7
    assert remote.upload(folder) == 0
    remote.commit(read_manifest(folder))
    assert remote.steps() == [7]


def test_prune_leaves_nothing_and_may_be_repeated(url: str, tmp_path: Path) -> None:
    remote = opened(url)
    for step in (5, 7, 9):
        copy_of(remote, make(tmp_path / "here", step))
    for _ in range(2):
        remote.prune([5, 9])
        assert remote.steps() == [7] and remote.unfinished() == []
    assert remote.fetch_newest(tmp_path / "elsewhere") == tmp_path / "elsewhere" / "step-00000007"
    filesystem, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    assert {path.rpartition("/")[0].rpartition("/")[2] for path in filesystem.find(root)} == {"step-00000007"}


def test_other_content_of_a_step_replaces_what_is_there(url: str, tmp_path: Path) -> None:
    remote, old, new = opened(url), make(tmp_path / "old", 7, seed=1), make(tmp_path / "new", 7, seed=2)
    copy_of(remote, old)
    assert remote.upload(new, only=["tokenizer.json"]) == SIZES["tokenizer.json"]
    assert remote.steps() == []  # neither the old nor the new
    copy_of(remote, old)
    assert contents(remote.fetch(7, tmp_path / "elsewhere")) == contents(old)
    copy_of(remote, new)
    assert contents(remote.fetch(7, tmp_path / "elsewhere")) == contents(new)


def test_machines_send_their_files_and_one_commits(url: str, tmp_path: Path) -> None:
    remote, folder = opened(url), make(tmp_path / "here", 7)
    copy_of(remote, make(tmp_path / "earlier_life", 7, seed=5))  # of the same sizes
    manifest, first, *others = read_manifest(folder), *SIZES
    remote.upload(folder, only=[first])
    assert "2 of 4 files of step 7 are not there" in failure(RemoteFailed, remote.commit, manifest)  # not the empty one
    second = opened(url)
    assert second.upload(folder, only=others) == sum(SIZES.values()) - SIZES[first]
    remote.commit(manifest)
    mine = opened(url).fetch(7, tmp_path / "one_machine", only=[first])
    assert set(contents(mine)) == {first, "manifest.json"} and contents(mine)[first] == contents(folder)[first]
    assert read_manifest(mine).num_files == len(SIZES) and not read_manifest(mine).is_whole
    assert contents(remote.fetch(7, tmp_path / "elsewhere")) == contents(folder)


def test_files_of_an_earlier_life_in_another_layout_are_removed(url: str, tmp_path: Path) -> None:
    remote, old, new = opened(url), make(tmp_path / "old", 7), make(tmp_path / "new", 7, seed=2)
    remote.upload(old)
    manifest = read_manifest(new)
    kept = dict(list(manifest.files.items())[:2])
    remote.upload(new, only=kept)
    remote.commit(replace(manifest, files=kept))
    filesystem, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    names = {path.rpartition("/")[2] for path in filesystem.find(root)}
    assert {name for name in names if ".xxh3-" not in name} == {*kept, "manifest.json"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [16 << 20, (16 << 20) + 1, 33 << 20])
def test_large_files_go_in_parts(s3: str, tmp_path: Path, size: int) -> None:
    folder = store.begin(tmp_path, 7)
    (folder / "large").write_bytes(random.Random(size).randbytes(size))
    folder = store.commit(folder, Manifest(7, 0, {}, files={"large": fingerprint(folder / "large")}))
    remote = Remote.open(f"{s3}/large/{size}")
    copy_of(remote, folder)
    assert contents(remote.fetch(7, tmp_path / "elsewhere")) == contents(folder)


def test_a_store_takes_no_more_than_so_many_parts() -> None:
    piece = 16 << 20
    for num_bytes in (0, piece, 10_000 * piece, 10_000 * piece + 1, 5 << 40):
        part = _part_bytes(num_bytes, piece)
        assert part >= piece and part % (1 << 20) == 0 and part * 10_000 >= num_bytes
    assert _part_bytes(10_000 * piece, piece) == piece


# -------------------------------------------------------------------------------------------------- a store that fails


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """Leave all that is imported out of the search for garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def every_failure(trouble: Callable[..., Trouble], attempt: Callable[[], Any], look: Callable[[], Any]) -> None:
    """Let every operation of an attempt fail in turn, alone and with all that follow; `look` judges what is left."""
    for only_once in (True, False):
        for fails_at in range(1000):
            watch = trouble(fails_at=fails_at, only_once=only_once)
            try:
                attempt()
            except RemoteFailed as error:
                assert "unreliable://" in str(error) and "\n" not in str(error)
            else:
                assert only_once or not watch.struck
            struck = watch.struck
            trouble()
            gc.collect()  # files that nobody has closed are completed now
            look()
            if not struck:
                break
        assert 5 < fails_at < 999


@pytest.mark.usefixtures("quick_collection")
def test_an_upload_that_fails_anywhere_leaves_no_half_a_checkpoint_and_goes_on(
    unreliable: Unreliable, trouble: Callable[..., Trouble]
) -> None:
    folder, remote = make(unreliable.here, 7, sizes=FEW), unreliable.remote
    original = contents(folder)

    def look() -> None:
        assert unreliable.exist() in ([3], [3, 7])
        assert remote.steps() == unreliable.exist()
        assert contents(folder) == original
        copy_of(remote, folder)
        assert unreliable.exist() == [3, 7] and unreliable.content(7) == original
        shutil.rmtree(unreliable.there / folder.name)

    every_failure(trouble, lambda: copy_of(remote, folder), look)


def test_what_was_given_up_is_not_completed_later(unreliable: Unreliable, trouble: Callable[..., Trouble]) -> None:
    """Drivers complete what is open when it is collected: here once the error is forgotten, after a retry."""
    folder = make(unreliable.here, 7)
    unreliable.remote.upload(folder, only=["tokenizer.json"])
    trouble(fails_at=3, only_once=True)  # after a listing, an opening and the write of the first piece
    with pytest.raises(RemoteFailed) as caught:
        unreliable.remote.upload(folder, only=["rank-00000.safetensors"])
    assert "writing step-00000007/rank-00000.safetensors" in str(caught.value)
    copy_of(unreliable.remote, folder)
    del caught
    gc.collect()
    assert unreliable.exist() == [3, 7] and unreliable.content(7) == contents(folder)


def test_what_has_arrived_is_not_sent_again(unreliable: Unreliable, trouble: Callable[..., Trouble]) -> None:
    folder, largest = make(unreliable.here, 7), "rank-00000.safetensors"
    unreliable.remote.upload(folder, only=["tokenizer.json"])
    trouble(full_after_bytes=SIZES["rank-00001.safetensors"] + 100)
    message = failure(RemoteFailed, unreliable.remote.upload, folder, ["rank-00001.safetensors", largest])
    assert "No space left on device" in message
    trouble()
    unreliable.remote.upload(folder, only=["rank-00001.safetensors"])
    trouble(full_after_bytes=SIZES[largest] + 100)  # enough for what is left, and what says that it has arrived
    assert unreliable.remote.upload(folder) == SIZES[largest]


@pytest.mark.usefixtures("quick_collection")
def test_a_replacement_that_fails_anywhere_never_mixes_old_and_new(
    unreliable: Unreliable, tmp_path: Path, trouble: Callable[..., Trouble]
) -> None:
    old, new = (make(tmp_path / f"seed_{seed}", 7, seed, FEW) for seed in (1, 2))
    remote, there = unreliable.remote, unreliable.there / old.name
    copy_of(remote, old)
    shutil.copytree(there, tmp_path / "old_copy")

    def look() -> None:
        assert 7 not in unreliable.exist() or unreliable.content(7) in (contents(old), contents(new))
        copy_of(remote, new)
        assert unreliable.exist() == [3, 7] and unreliable.content(7) == contents(new)
        shutil.rmtree(there)
        shutil.copytree(tmp_path / "old_copy", there)

    every_failure(trouble, lambda: copy_of(remote, new), look)


@pytest.mark.usefixtures("quick_collection")
def test_a_removal_that_fails_anywhere_leaves_a_checkpoint_or_none(
    unreliable: Unreliable, tmp_path: Path, trouble: Callable[..., Trouble]
) -> None:
    folder, remote = make(unreliable.here, 7, sizes=FEW), unreliable.remote
    copy_of(remote, folder)
    shutil.copytree(unreliable.there / folder.name, tmp_path / "copy")

    def look() -> None:
        assert unreliable.exist() in ([3], [3, 7])
        remote.prune([7])
        assert unreliable.exist() == remote.steps() == [3] and remote.unfinished() == []
        assert not (unreliable.there / folder.name).exists()
        shutil.copytree(tmp_path / "copy", unreliable.there / folder.name)

    every_failure(trouble, lambda: remote.prune([7]), look)


@pytest.mark.usefixtures("quick_collection")
def test_a_download_that_fails_anywhere_leaves_what_was_here(
    unreliable: Unreliable, tmp_path: Path, trouble: Callable[..., Trouble]
) -> None:
    copy_of(unreliable.remote, make(unreliable.here, 7, sizes=FEW))
    checkpoints = tmp_path / "elsewhere"
    shutil.copytree(unreliable.before, checkpoints / unreliable.before.name)

    def look() -> None:
        assert sorted(item.name for item in checkpoints.iterdir())[0] == "step-00000003"
        assert store.steps(checkpoints) == [int(item.name[5:]) for item in sorted(checkpoints.iterdir())]  # no more
        assert contents(checkpoints / "step-00000003") == contents(unreliable.before)
        assert unreliable.remote.fetch_newest(checkpoints, newer_than=3) == checkpoints / "step-00000007"
        assert store.verify(checkpoints / "step-00000007").step == 7
        shutil.rmtree(checkpoints / "step-00000007")

    every_failure(trouble, lambda: unreliable.remote.fetch_newest(checkpoints, newer_than=3), look)


@pytest.mark.parametrize("name", [*(name for name in SIZES if SIZES[name]), "manifest.json"])
def test_what_a_store_loses_silently_is_noticed(
    unreliable: Unreliable, tmp_path: Path, trouble: Callable[..., Trouble], name: str
) -> None:
    folder = make(unreliable.here, 7)
    trouble(truncates=name)
    message = failure(RemoteFailed, copy_of, unreliable.remote, folder)
    assert name in message and ("was sent with" in message or "reads differently" in message)
    assert unreliable.exist() == [3]
    trouble()
    copy_of(unreliable.remote, folder)
    assert contents(unreliable.remote.fetch(7, tmp_path / "elsewhere")) == contents(folder)


def test_a_store_that_is_read_only_or_full_is_found_by_the_check(
    unreliable: Unreliable, tmp_path: Path, trouble: Callable[..., Trouble]
) -> None:
    for kinds in ({"read_only": True}, {"full_after_bytes": 3}):
        trouble(**kinds)
        assert "check the URL, your credentials and the network" in failure(UserError, unreliable.remote.check)
        failure(RemoteFailed, unreliable.remote.upload, make(unreliable.here, 7))
        assert unreliable.exist() == [3]
        assert unreliable.remote.fetch_newest(tmp_path / "elsewhere") is not None
    trouble()
    unreliable.remote.check()
    assert unreliable.remote.steps() == [3]


@pytest.mark.parametrize("operation", ["list", "look", "open", "write", "read"])
def test_a_store_that_hangs_does_not_hold_us_up(
    unreliable: Unreliable, trouble: Callable[..., Trouble], operation: str
) -> None:
    folder, remote = make(unreliable.here, 7), opened(f"unreliable://{unreliable.there}", timeout_seconds=0.1)
    trouble(hangs_in=operation)
    began = time.monotonic()
    assert "has not ended in 0.1 s" in failure(RemoteFailed, copy_of, remote, folder)
    assert time.monotonic() - began < 10
    trouble()
    threads_end()  # those that hung go on now, and may write what nobody waits for
    copy_of(unreliable.remote, folder)
    assert unreliable.exist() == [3, 7]


# ------------------------------------------------------------------------------------------------------ damaged copies


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "shorter":
        path.write_bytes(content[:-1])
    elif kind == "longer":
        path.write_bytes(content + b"\0")
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("kind", ["missing", "shorter", "longer", "flipped"])
@pytest.mark.parametrize("name", [*SIZES, "manifest.json"])
def test_a_damaged_copy_is_refused_and_the_one_before_is_taken(
    unreliable: Unreliable, tmp_path: Path, name: str, kind: str
) -> None:
    if name == "empty" and kind in ("shorter", "flipped"):
        kind = "longer"
    copy_of(unreliable.remote, make(unreliable.here, 7))
    damage(unreliable.there / "step-00000007" / name, kind)
    checkpoints = tmp_path / "elsewhere"
    message = failure(UserError, unreliable.remote.fetch, 7, checkpoints)
    assert f"unreliable://{unreliable.there}/step-00000007" in message and name in message
    assert not checkpoints.exists() or not list(checkpoints.iterdir())
    heard: list[str] = []
    assert unreliable.remote.fetch_newest(checkpoints, rejected=heard.append) == checkpoints / "step-00000003"
    if (name, kind) != ("manifest.json", "missing"):  # which is none at all
        assert heard == [f"{message}; trying the one before"]
    assert unreliable.remote.fetch_newest(checkpoints, newer_than=3, rejected=heard.append) is None


def test_a_copy_under_another_name_and_one_that_reaches_out_of_its_folder_are_refused(
    unreliable: Unreliable, tmp_path: Path
) -> None:
    shutil.copytree(unreliable.there / "step-00000003", unreliable.there / "step-00000009")
    assert "is of step 3" in failure(UserError, unreliable.remote.fetch, 9, tmp_path / "elsewhere")
    for name in ("../evil", "/evil", "manifest.json", "..", ".", ""):
        folder = store.begin(tmp_path / "crafted", 8)
        crafted = store.commit(folder, Manifest(8, 0, {}, files={name: [0, ""]}))
        shutil.copytree(crafted, unreliable.there / "step-00000008", dirs_exist_ok=True)
        assert "which is no file name" in failure(UserError, unreliable.remote.fetch, 8, tmp_path / "elsewhere")


@pytest.mark.parametrize("kind", ["missing", "shorter", "flipped"])
def test_a_damaged_checkpoint_is_not_copied(unreliable: Unreliable, kind: str) -> None:
    folder = make(unreliable.here, 7)
    damage(folder / "tokenizer.json", kind)
    assert "tokenizer.json" in failure(UserError, unreliable.remote.upload, folder)
    assert "are not there" in failure(RemoteFailed, unreliable.remote.commit, read_manifest(folder))
    assert unreliable.exist() == [3]


def test_a_disk_that_is_full_here_is_not_taken_for_a_damaged_copy(unreliable: Unreliable, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        unreliable.remote.fetch_newest(tmp_path / "elsewhere")


# ------------------------------------------------------------------------------------------------------------- opening


def test_urls_that_make_no_sense_are_refused() -> None:
    for url, part in {
        "": "no place",
        "nosuch://a/b": "Protocol not known",
        "s3:/bucket/run": "write s3://bucket/run",
        "memory://": "names no bucket or folder",
        "/": "names no bucket or folder",
        "zip::s3://bucket/a.zip": "no place",
    }.items():
        assert part in failure(UserError, Remote.open, url)


def test_a_driver_that_is_not_installed_is_named() -> None:
    fsspec.register_implementation("absent", "a_driver_nobody_has.Store", errtxt="Install it", clobber=True)
    assert "pip install a_driver_nobody_has" in failure(UserError, Remote.open, "absent://a/b")


def test_a_store_that_does_not_answer_when_it_is_opened_is_refused(trouble: Callable[..., Trouble]) -> None:
    trouble(hangs_in="connect")
    with pytest.raises(UserError, match=r"unreliable:///a/b has not answered in 0.1 s"):
        opened("unreliable:///a/b", timeout_seconds=0.1)


def test_no_password_is_shown(tmp_path: Path) -> None:
    remote = Remote.open(f"memory://user:secret@host/{tmp_path.name}?sig=secret")
    assert remote.url == f"memory://user:...@host/{tmp_path.name}"


@pytest.mark.slow
def test_a_bucket_is_never_made(s3: str, tmp_path: Path) -> None:
    for url in ("s3://another", "s3://another/run/of/mine"):
        failure(UserError, Remote.open(url).check)
        failure(RemoteFailed, Remote.open(url).upload, make(tmp_path, 7))
    assert fsspec.filesystem("s3", skip_instance_cache=True).ls("") == ["bucket"]


def test_a_process_that_a_store_holds_up_can_end(tmp_path: Path) -> None:
    """As the service does when its time is over: threads that hang in a driver must not keep it."""
    program = f"""
from unreliable_store import Trouble, UnreliableStore
from trainer.checkpoint.remote.copies import Remote, RemoteFailed
UnreliableStore.trouble = Trouble(hangs_in="list")
try:
    Remote.open("unreliable://{tmp_path}", timeout_seconds=0.1).steps()
except RemoteFailed as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0 and "has not ended in 0.1 s" in done.stdout, done.stderr


def test_a_copied_manifest_is_that_of_the_folder(unreliable: Unreliable) -> None:
    """Byte for byte, so that a folder copied from there by other tools is a checkpoint as well."""
    there = unreliable.there / "step-00000003" / "manifest.json"
    assert there.read_bytes() == (unreliable.before / "manifest.json").read_bytes()
    assert orjson.loads(there.read_bytes())["step"] == 3
