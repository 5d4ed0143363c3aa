"""A corpus of everything bad at once, disks that are full or read-only, and memory that must not grow."""

import gzip
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
import zstandard

from data_pipeline.manifest import DatasetManifest, Manifest
from data_pipeline.tokenization import train_bpe
from prepare_command import (
    COMMAND,
    asked,
    content_of,
    environment,
    prepare_command,
    prepared,
    text,
    write_config,
    write_corpus,
)

# ---------------------------------------------------------------------------------------------------------- bad input


def lines_of(first: int, count: int) -> bytes:
    return b"".join(orjson.dumps({"text": text(number)}) + b"\n" for number in range(first, first + count))


def write_everything_bad(folder: Path) -> int:
    """Returns the number of good documents."""
    folder.mkdir()
    (folder / "lines.jsonl").write_bytes(
        lines_of(0, 40)
        + b"\n\n{]\n[1]\nnull\n\x00\x00\x00\n"  # bad json: {], [1], null; undecodable: NULs
        + b'{"other": 1}\n{"text": null}\n{"text": 7}\n{"text": ""}\n'
        + b'{"text": "'
        + b"\\ud83d and on " * 100_000
        + b'"}\n'  # too long, and its sample has lone surrogates
        + b'{"text": "a half \\udc00 pair"}\n'
        + lines_of(40, 10)
    )
    with open(folder / "long.jsonl", "wb") as handle:
        handle.write(lines_of(50, 5) + b'{"text": "')
        for _ in range(100):
            handle.write(b"x" * 1_000_000)
        handle.write(b'"}\n' + lines_of(55, 5))
    (folder / "utf16.txt").write_bytes(text(1).encode("utf-16"))
    (folder / "utf16.jsonl").write_bytes(lines_of(60, 1).decode().encode("utf-16-le"))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines_of(70, 400))[:-2000])
    (folder / "cut.jsonl.zst").write_bytes(zstandard.compress(lines_of(500, 400))[:-2000])
    (folder / "cut.txt.gz").write_bytes(gzip.compress(text(2).encode())[:-20])
    with gzip.open(folder / "bomb.txt.gz", "wb") as handle:
        for _ in range(200):
            handle.write(bytes(1_000_000))
    for name in ("empty.jsonl", "empty.txt", "empty.jsonl.gz", "zeros.parquet"):
        (folder / name).touch()
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "dangling.jsonl").symlink_to(folder / "nothing")
    (folder / "round.jsonl").symlink_to(folder / "round.jsonl")
    (folder / "loop").symlink_to(folder)
    (folder / "folder.jsonl").mkdir()
    (folder / "new\nline.txt").write_text(text(3000))
    Path(os.fsdecode(os.fsencode(folder) + b"/br\xf6ken\xff.txt")).write_text(text(4000))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "a.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    return 50 + 1 + 10 + 2


BAD_SPLITS = {"a.parquet", "dangling.jsonl", "pipe.jsonl", "round.jsonl", "zeros.parquet"}


def test_a_corpus_of_everything_bad_ends_well_and_every_loss_is_counted(tmp_path: Path) -> None:
    num_good = write_everything_bad(tmp_path / "bad")
    config = write_config(tmp_path / "config.yaml", sources=[str(tmp_path / "bad")], max_document_bytes=1_000_000)
    out = tmp_path / "out"
    refused = prepare_command(config, "--out", out, "--workers", 2)
    assert refused.returncode == 1
    assert f"{len(BAD_SPLITS)} of " in refused.stderr and "data.max_bad_splits allows 0" in refused.stderr
    prepared(config, out, "--set", f"data.max_bad_splits={len(BAD_SPLITS)}")
    manifest, dataset = Manifest.load(out), DatasetManifest.load(out / "text")
    assert {bad.place.rpartition("/")[2] for bad in manifest.bad_splits} == BAD_SPLITS
    dropped = {reason: count.count for reason, count in dataset.dropped.items()}
    from_cut = sum(portion.documents for portion in dataset.portions.values()) - num_good
    assert 0 < from_cut < 800
    assert dropped.pop("bad_json") >= 3  # and what is left of the lines that damage has cut
    assert dropped == {
        "undecodable": 4,
        "missing_field": 1,
        "field_not_text": 2,
        "empty_text": 1,
        "too_long": 3,
        "truncated": 3,
        "empty_file": 3,
    }
    for count in dataset.dropped.values():
        assert len(count.places) == count.count
        assert all(place.startswith(f"{tmp_path}/bad/") for place in count.places)
    assert any("1 files end neither in" in note for note in manifest.notes)
    assert content_of(out) == content_of(
        prepared(config, tmp_path / "one", "--set", f"data.max_bad_splits={len(BAD_SPLITS)}", workers=1)
    )
    for reason in dropped:
        shown = asked("inspect", out, "--dropped", reason)
        assert shown.returncode == 0, shown.stderr
        assert not set(shown.stdout) & set(map(chr, range(9))), "no control character reaches the terminal"


# -------------------------------------------------------------------------------------------- disks full or read-only


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


needs_mounts = pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0,
    reason="only root may mount a small disk; what follows a limit of file sizes is tested by all",
)
LIMITED = "import resource, sys, os; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
LIMITED += "os.execv(sys.argv[2], sys.argv[2:])"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A config, and what it gives where there is room."""
    folder = tmp_path_factory.mktemp("whole")
    corpus = write_corpus(folder / "corpus", num_files=3)
    config = write_config(folder / "config.yaml", sources=[str(corpus)], dedup={"fuzzy": "standard"})
    return config, content_of(prepared(config, folder / "out"))


@needs_mounts
@pytest.mark.parametrize("size_kb", [16, 150, 420, *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 230, 300))])
def test_a_full_disk_is_one_line_and_with_more_room_the_next_run_goes_on(
    size_kb: int, whole: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    config, undisturbed = whole
    with small_disk(tmp_path / "disk", size_kb << 10):
        done = prepare_command(config, "--out", tmp_path / "disk/out", "--workers", 2)
        assert done.returncode == 2, done.stdout + done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        (line,) = done.stderr.splitlines()
        assert "cannot be written (No space left on device); make room and run again" in line
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], check=True)
        prepared(config, tmp_path / "disk/out")
        assert content_of(tmp_path / "disk/out") == undisturbed


def test_a_limit_of_file_sizes_is_one_line_too(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", num_files=3)
    config = write_config(tmp_path / "config.yaml", sources=[str(corpus)])
    command = [sys.executable, "-c", LIMITED, "8192", *COMMAND, str(config), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "cannot be written (File too large)" in line
    prepared(config, tmp_path / "out")


@needs_mounts
def test_a_disk_that_turns_read_only_is_one_line(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", num_files=2)
    config = write_config(tmp_path / "config.yaml", sources=[str(corpus)])
    with small_disk(tmp_path / "disk", 64 << 20):
        failing = prepare_command(config, "--out", tmp_path / "disk/out", "--set", "model.vocab_size=90000")
        assert failing.returncode == 2
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        done = prepare_command(config, "--out", tmp_path / "disk/out")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "cannot be written (Read-only file system)" in line
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "disk")], check=True)
        prepared(config, tmp_path / "disk/out")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        prepared(config, tmp_path / "disk/out")  # nothing is to be done


# ------------------------------------------------------------------------------------------------------------- memory

PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
sys.exit(code)
"""


def peak_mb(config: Path, out: Path) -> int:
    """Resident memory of the largest process of a preparation: the driver or a worker."""
    command = [sys.executable, "-c", PEAK, *COMMAND, str(config), "--out", str(out), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def write_large(path: Path, num_bytes: int, first: int = 0) -> None:
    """Short documents, of which there are many: pieces of one text, each with a number before it."""
    draw, block = random.Random(0), " ".join(text(seed, 20) for seed in range(100))
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else open(path, "wb") as handle:
        written = 0
        while written < num_bytes:
            start = draw.randrange(len(block) - 500)
            line = orjson.dumps({"text": f"{first} {block[start : start + 500]}"}) + b"\n"
            written, first = written + len(line), first + 1
            handle.write(line)


def sizes_in(folder: Path, num_bytes: int, kind: str) -> None:
    if kind == "one split":
        write_large(folder / "a.jsonl.gz", num_bytes)
    else:
        for number in range(10):
            write_large(folder / f"{number}.jsonl", num_bytes // 10, 1_000_000 * number)


def fused(folder: Path) -> dict[str, object]:
    """Settings with which the first pass makes tokens."""
    (folder / "tokenizer").mkdir()
    train_bpe([text(seed) for seed in range(100)], 300, folder / "tokenizer", 16)
    return {"tokenizer": str(folder / "tokenizer")}


@pytest.mark.parametrize(
    ("passes", "kind"),
    [
        ("two passes", "many splits"),
        pytest.param("one pass", "one split", marks=pytest.mark.slow),
        pytest.param("one pass", "many splits", marks=pytest.mark.slow),
        pytest.param("two passes", "one split", marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_the_corpus(passes: str, kind: str, tmp_path: Path) -> None:
    """Four times as much text, and hardly more memory: a document costs 100 bytes of it, not its text."""
    settings = fused(tmp_path)
    if passes == "two passes":
        settings["dedup"] = {"paragraphs": True}
    peaks = []
    for size_mb in (10, 40):
        sizes_in(tmp_path / f"{size_mb}", size_mb * 10**6, kind)
        config = write_config(tmp_path / f"{size_mb}.yaml", sources=[str(tmp_path / f"{size_mb}")], **settings)
        peaks.append(peak_mb(config, tmp_path / f"out-{size_mb}"))
    assert peaks[1] < peaks[0] + 25, peaks
    assert peaks[1] < 350, peaks


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["one split", "many splits"])
def test_memory_at_half_a_gigabyte(kind: str, tmp_path: Path) -> None:
    sizes_in(tmp_path / "corpus", 464 * 10**6, kind)
    config = write_config(tmp_path / "config.yaml", sources=[str(tmp_path / "corpus")], **fused(tmp_path))
    assert peak_mb(config, tmp_path / "out") < 350
