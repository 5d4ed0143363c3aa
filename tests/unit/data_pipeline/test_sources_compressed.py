"""Compressed files, against independent writers, and what becomes of damaged ones; text files."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sources import UnreadableSplit, decompress, read_split
from data_pipeline.sources.decompress import DecompressedStream
from data_pipeline.sources.split import Compression
from data_pipeline.tally import Tally
from peak_memory import peak_growth_mb
from read_sources import counts, places, plan, read, texts

Compress = Callable[[bytes], bytes]


def zstd(data: bytes) -> bytes:
    """Without the size of the content, with a checksum, in many blocks."""
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return compressor.compress(data) + compressor.flush()


COMPRESS: dict[str, Compress] = {"gz": gzip.compress, "zst": zstd}
both = pytest.mark.parametrize("suffix", COMPRESS)


def made_up_lines(seed: int, num_lines: int) -> list[bytes]:
    draw = random.Random(seed)
    return [json.dumps({"text": f"{i} {draw.randbytes(20).hex()}"}).encode() + b"\n" for i in range(num_lines)]


def texts_of(lines: list[bytes]) -> list[str]:
    return [json.loads(line)["text"] for line in lines]


@both
@pytest.mark.parametrize("members", [1, 7])
def test_compressed_lines_round_trip(suffix: str, members: int, tmp_path: Path) -> None:
    lines = made_up_lines(0, 20_000)
    data, path = b"".join(lines), tmp_path / f"a.jsonl.{suffix}"
    size = len(data) // members + 1  # members begin in the middle of lines
    path.write_bytes(b"".join(COMPRESS[suffix](data[i : i + size]) for i in range(0, len(data), size)))
    documents, tally = read(path)
    assert texts(documents) == texts_of(lines)
    assert not tally.dropped
    assert documents[2].id == f"{path}@{len(lines[0] + lines[1])}"


@pytest.mark.parametrize("level", [1, 6, 9])
@pytest.mark.parametrize("text", ["a" * 900_000, "", "short"])
@both
def test_compressed_texts_round_trip(suffix: str, text: str, level: int, tmp_path: Path) -> None:
    compress = {
        "gz": lambda data: gzip.compress(data, level),
        "zst": zstandard.ZstdCompressor(level=2 * level).compress,  # with the size of the content
    }[suffix]
    (tmp_path / f"a.txt.{suffix}").write_bytes(compress(text.encode()))
    documents, tally = read(tmp_path)
    assert texts(documents) == [text] * bool(text)
    assert counts(tally) == ({} if text else {"empty_file": 1})


def test_skippable_frames_and_padding_are_passed_over(tmp_path: Path) -> None:
    line = b'{"text": "x"}\n'
    skippable = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"\x28\xb5\x2f\xfd!"
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + zstd(line) + skippable + zstd(line) + skippable)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line) + gzip.compress(line) + b"\0" * 100_000)
    documents, tally = read(tmp_path)
    assert texts(documents) == ["x"] * 4
    assert not tally.dropped


@both
def test_lines_before_a_cut_are_kept(suffix: str, tmp_path: Path) -> None:
    lines = made_up_lines(1, 50_000)
    whole = COMPRESS[suffix](b"".join(lines))
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    documents, tally = read(path)
    assert 10_000 < len(documents) < 40_000
    assert texts(documents) == texts_of(lines[: len(documents)])
    ((place,),) = [places(tally)["truncated"]]
    offset = int(place.rpartition("@")[2])
    kept_bytes = sum(map(len, lines[: len(documents)]))
    assert kept_bytes <= offset <= kept_bytes + len(lines[len(documents)])
    assert counts(tally) == {"truncated": 1} | ({"bad_json": 1} if offset > kept_bytes else {})


@both
@pytest.mark.parametrize("where", [0.02, 0.5, 0.98])
def test_damage_costs_its_member_only(suffix: str, where: float, tmp_path: Path) -> None:
    parts = [made_up_lines(seed, 3000) for seed in range(3)]
    members = [COMPRESS[suffix](b"".join(part)) for part in parts]
    damaged = bytearray(members[1])
    at = int(len(damaged) * where)
    damaged[at : at + 30] = bytes(30)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(members[0] + damaged + members[2])
    documents, tally = read(path)
    got = texts(documents)
    assert got[:3000] == texts_of(parts[0])
    assert got[-3000:] == texts_of(parts[2])
    assert counts(tally)["truncated"] == 1
    assert len(got) < 9000


@pytest.mark.parametrize("claim", [100_000, 2_000_000])
def test_a_block_that_lies_about_its_size_swallows_no_other_frame(claim: int, tmp_path: Path) -> None:
    """The frames behind it are small, and so in what has been read in search of the block's end."""
    frames = [
        zstd(json.dumps({"text": f"{i} {random.Random(i).randbytes(99).hex()}"}).encode() + b"\n") for i in range(100)
    ]
    header_bytes = zstandard.frame_header_size(frames[10])
    lie = bytearray(frames[10])
    lie[header_bytes : header_bytes + 3] = (claim << 3 | 2 << 1).to_bytes(3, "little")
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join([*frames[:10], lie, *frames[11:]]))
    documents, tally = read(tmp_path)
    assert [int(document.text.split()[0]) for document in documents] == [*range(10), *range(11, 100)]
    assert counts(tally) == {"truncated": 1}


@both
def test_what_only_looks_like_a_member_is_the_same_damage(suffix: str, tmp_path: Path) -> None:
    member = COMPRESS[suffix](b'{"text": "x"}\n')
    looks_alike = member[:10] + b"\xff" * 30
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(member + b"garbage" + looks_alike * 50 + member + b"garbage")
    documents, tally = read(tmp_path)
    assert texts(documents) == ["x", "x"]
    assert counts(tally) == {"truncated": 2}


@both
def test_a_lost_checksum_is_damage(suffix: str, tmp_path: Path) -> None:
    lines = made_up_lines(2, 10)
    member = bytearray(COMPRESS[suffix](b"".join(lines)))
    member[-8 if suffix == "gz" else -1] ^= 1  # before the size in .gz
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(member + COMPRESS[suffix](b'{"text": "after"}'))
    documents, tally = read(tmp_path)
    assert texts(documents)[-1] == "after"
    assert counts(tally)["truncated"] == 1


@both
def test_what_is_not_compressed_at_all_is_counted(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(b'{"text": "plain"}\n')
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(b'{"text": "plain"}\n' * 100_000)
    (tmp_path / f"c.txt.{suffix}").write_bytes(b"plain")
    (tmp_path / f"d.jsonl.{suffix}").touch()
    documents, tally = read(tmp_path)
    assert not documents
    assert counts(tally) == {"truncated": 3, "empty_file": 1 + 2}


@given(data=st.binary(max_size=300), suffix=st.sampled_from(["gz", "zst"]), seed=st.integers(0, 1000))
def test_bytes_from_anywhere_never_crash(data: bytes, suffix: str, seed: int) -> None:
    whole = COMPRESS[suffix](data * 5) + COMPRESS[suffix](data)
    torn = bytearray(whole)
    draw = random.Random(seed)
    for _ in range(draw.randrange(4)):
        torn[draw.randrange(len(torn))] = draw.randrange(256)
    kind: Compression = "gzip" if suffix == "gz" else "zstd"
    pieces = [bytes(torn[i : i + 7]) for i in range(0, len(torn), 7)][::-1]
    tally = Tally()
    stream = DecompressedStream(kind, lambda num_bytes: pieces.pop() if pieces else b"", "f", tally)
    got = []
    try:
        while True:
            got.append(b"".join(iter(stream.read, b"")))
            if not stream.resume():
                break
    except OSError as error:  # the window that a torn header asks for
        assert "window" in str(error)
    assert bool(tally.dropped) == stream.is_damaged
    if bytes(torn) == whole:
        assert got == [data * 6]


def test_a_window_that_would_fill_the_memory_fails_the_split(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(b'{"text": "x"}') + compressor.flush())
    (split,) = plan(tmp_path).splits
    with pytest.raises(UnreadableSplit, match="window of 256 MB to decompress, more than 128; compress it again"):
        list(read_split(split, 1000, Tally()))


@both
@pytest.mark.parametrize("kind", ["txt", "jsonl", "wet"])
def test_a_bomb_fills_neither_memory_nor_time(
    suffix: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decompress, "MAX_SUSPECT_BYTES", 40 << 20)
    path = tmp_path / f"a.{kind}.{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(50 << 20)))
    (split,) = plan(path).splits
    assert peak_growth_mb(lambda: list(read_split(split, 1 << 20, Tally()))) < 24
    tally = Tally()
    assert not list(read_split(split, 1 << 20, tally))
    if kind != "txt":  # which is too long long before
        (place,) = places(tally)["decompression_bomb"]
        assert 40 << 20 < int(place.rpartition("@")[2]) < 42 << 20


def test_text_files_in_another_encoding_are_dropped_and_damaged_ones_repaired(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(("Größe " * 30).encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16"))
    (tmp_path / "damaged.txt").write_bytes(b"a long and otherwise good text " * 20 + b"\xff")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "long.txt").write_bytes(b"x" * 1001)
    documents, tally = read(tmp_path, max_document_bytes=1000)
    assert [os.path.basename(document.id) for document in documents] == ["damaged.txt", "marked.txt"]
    assert documents[1].text == "marked"
    assert places(tally) == {
        "undecodable": [f"{tmp_path}/latin.txt", f"{tmp_path}/wide.txt"],
        "empty_file": [f"{tmp_path}/nothing.txt"],
        "too_long": [f"{tmp_path}/long.txt"],
    }
    assert tally.repaired["broken_utf8"].places == [f"{tmp_path}/damaged.txt"]


@both
def test_half_a_text_is_no_document(suffix: str, tmp_path: Path) -> None:
    whole = COMPRESS[suffix](random.Random(0).randbytes(50_000).hex().encode())
    (tmp_path / f"a.txt.{suffix}").write_bytes(whole[:-20_000])
    (tmp_path / f"b.txt.{suffix}").write_bytes(whole)
    documents, tally = read(tmp_path)
    assert [document.id for document in documents] == [f"{tmp_path}/b.txt.{suffix}"]
    assert counts(tally) == {"truncated": 1}
