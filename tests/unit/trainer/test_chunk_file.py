"""The files of a checkpoint: written as safetensors, read back in any cut, and never trusted."""

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from made_checkpoints import boxes, place_of, spread, write_checkpoint, write_file
from peak_memory import peak_growth_mb
from trainer.checkpoint.format.chunk_file import PAGE_BYTES, Chunk, FileLayout, incomplete, lay_out, read_layout
from trainer.checkpoint.format.chunk_reader import ChunkReader, OpenFiles, StoredChunk, blocks_of, fill, read_index
from trainer.checkpoint.format.global_tensors import GlobalTensors
from trainer.config import UserError

Cut = tuple[int, ...]


def numbered(*shape: int) -> np.ndarray:
    """No two elements are equal."""
    return np.arange(1, np.prod(shape, dtype=int) + 1, dtype="<f4").reshape(shape)


TENSORS = {
    "master/embedding": numbered(7, 4),
    "master/layers.weight": numbered(3, 5, 2),
    "master/scale": np.array(0.1, dtype="<f4"),
    "master/norm": numbered(5),
}


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------- any cut, any box


@st.composite
def cuts_of(draw: st.DrawFn, shape: Cut) -> list[list[int]]:
    """A grid over a tensor: where it is cut along each axis, with both ends."""
    return [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]


@st.composite
def written(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], list[list[Chunk]], dict[str, list[list[int]]]]:
    """Tensors, the blocks of each that the files hold, and another grid to read each in."""
    shapes = draw(st.lists(st.lists(st.integers(1, 5), max_size=4).map(tuple), min_size=1, max_size=3))
    tensors = {f"master/w{number}": numbered(*shape) for number, shape in enumerate(shapes)}
    files: list[list[Chunk]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for name, tensor in tensors.items():
        for offset, shape in boxes(draw(cuts_of(tensor.shape))):
            owner = draw(st.integers(0, len(files) - 1))
            for rank, file in enumerate(files):
                if rank == owner or draw(st.booleans()):
                    file.append(Chunk(name, tensor.shape, offset, shape, is_copy=rank != owner))
    for file in files:
        draw(st.randoms(use_true_random=False)).shuffle(file)
    return tensors, files, {name: draw(cuts_of(tensor.shape)) for name, tensor in tensors.items()}


@settings(max_examples=60)
@given(written())
def test_whatever_was_cut_and_however_it_is_read_every_element_is_in_its_place(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[dict[str, np.ndarray], list[list[Chunk]], dict[str, list[list[int]]]],
) -> None:
    tensors, files, grids = case
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoints"), 1, tensors, files)
    wanted = [
        (Chunk(name, tensors[name].shape, offset, shape), torch.full(shape, torch.nan))
        for name, grid in grids.items()
        for offset, shape in boxes(grid)
    ]
    fill(blocks_of(wanted), ChunkReader(checkpoint))
    for chunk, values in wanted:
        assert np.array_equal(values.numpy(), tensors[chunk.name][place_of(chunk)]), chunk
    whole = GlobalTensors(checkpoint)
    assert {f"master/{name}": tensor.tolist() for name, tensor in whole.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


@settings(max_examples=60)
@given(written())
def test_files_say_again_what_was_laid_out_and_open_in_other_readers(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[dict[str, np.ndarray], list[list[Chunk]], dict[str, list[list[int]]]],
) -> None:
    tensors, files, _ = case
    path = tmp_path_factory.mktemp("file") / "rank-00000.safetensors"
    for chunks in files:
        write_file(path, chunks, tensors)
        layout = read_layout(path)
        assert layout == lay_out(chunks) and layout.num_bytes == path.stat().st_size
        assert len(layout.header) % PAGE_BYTES == 0
        with safe_open(path, framework="numpy") as opened:
            assert sorted(opened.keys()) == sorted(chunk.label for chunk in chunks)
            for chunk in chunks:
                assert np.array_equal(opened.get_tensor(chunk.label), tensors[chunk.name][place_of(chunk)])
    assert incomplete([lay_out(chunks) for chunks in files]) is None


def test_reading_a_block_reads_only_the_rows_that_hold_it(tmp_path: Path) -> None:
    """The rest of the file may as well not be there."""
    rows = numbered(1000, 8)
    (tmp_path / "f").write_bytes(rows[:11].tobytes())
    with OpenFiles(tmp_path) as files:
        found = files.read(StoredChunk("f", 0, (1000, 8)), (9, 3), (2, 4))
        assert np.array_equal(found.numpy(), rows[9:11, 3:7])
        with pytest.raises(OSError, match="ends before byte"):
            files.read(StoredChunk("f", 0, (1000, 8)), (10, 0), (2, 8))


def test_an_empty_block_takes_no_place_and_can_be_read(tmp_path: Path) -> None:
    tensor = numbered(4, 2)
    empty, half, rest = (
        Chunk("master/w", (4, 2), offset, shape)
        for offset, shape in (((0, 0), (0, 2)), ((0, 0), (2, 2)), ((2, 0), (2, 2)))
    )
    checkpoint = write_checkpoint(tmp_path, 1, {"master/w": tensor}, [[half], [rest, empty]])
    assert np.array_equal(GlobalTensors(checkpoint)["w"].numpy(), tensor)
    with OpenFiles(checkpoint) as files:
        files.read_into(torch.empty(0, 2), "rank-00001.safetensors", PAGE_BYTES)


# ------------------------------------------------------------------------------------------------------ whole or not


def layouts(files: Sequence[Sequence[Chunk]]) -> list[FileLayout]:
    return [lay_out(chunks) for chunks in files]


@pytest.mark.parametrize("num_files", [1, 2, 5])
def test_a_missing_and_a_doubled_block_are_found_wherever_they_are(num_files: int) -> None:
    files = spread(TENSORS, num_files)
    assert incomplete(layouts(files)) is None
    for rank, chunks in enumerate(files):
        for number, chunk in enumerate(chunks):
            without = [*files[:rank], chunks[:number] + chunks[number + 1 :], *files[rank + 1 :]]
            lacking = incomplete(layouts(without))
            if chunk.shape != chunk.global_shape:  # else no trace of it is left
                total = np.prod(chunk.global_shape)
                assert lacking == f"{chunk.name} has {total - chunk.numel} of {total} elements"
            doubled = incomplete(layouts([*files, [chunk]]))
            assert doubled is not None and doubled.startswith(f"{chunk.name} has ")


def test_one_twice_and_another_of_its_size_missing_is_found() -> None:
    left, right = (Chunk("master/w", (4, 6), (0, start), (4, 3)) for start in (0, 3))
    assert incomplete(layouts([[left], [right]])) is None
    assert incomplete(layouts([[left], [left]])) == "master/w has some of its elements twice and lacks others"
    shifted = Chunk("master/w", (4, 6), (0, 2), (4, 3))
    assert incomplete(layouts([[left], [shifted]])) == "master/w has some of its elements twice and lacks others"


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 4), st.integers(0, 3)), max_size=7))
def test_whole_is_what_covers_every_element_once(cut: list[tuple[int, int, int, int]]) -> None:
    """Against counting how often each element is covered."""
    times = np.zeros((4, 3), dtype=int)
    chunks = []
    for first_row, first_column, rows, columns in cut:
        shape = min(rows, 4 - first_row), min(columns, 3 - first_column)
        chunks.append(Chunk("master/w", (4, 3), (first_row, first_column), shape))
        times[place_of(chunks[-1])] += 1
    for row, column in np.argwhere(times == 0)[: len(cut) * 2]:  # mend most, so that some are whole
        chunks.append(Chunk("master/w", (4, 3), (int(row), int(column)), (1, 1)))
        times[row, column] += 1
    found = incomplete(layouts([[chunk] for chunk in chunks]))
    assert (found is None) == bool((times == 1).all() or not chunks)


def test_copies_do_not_count_and_shapes_must_agree() -> None:
    whole, copy = Chunk("master/w", (4,), (0,), (4,)), Chunk("master/w", (4,), (0,), (4,), is_copy=True)
    assert incomplete(layouts([[whole], [copy], [copy]])) is None
    assert incomplete(layouts([[copy]])) == "master/w has 0 of 4 elements"
    other = Chunk("master/w", (5,), (4,), (1,))
    assert incomplete(layouts([[whole], [other]])) == "master/w has shape (4,) in one file and (5,) in another"


def test_a_weight_without_a_kind_that_others_have_is_found() -> None:
    names = ("master/w", "exp_avg/w", "master/norm")
    files = [[Chunk(name, (4,), (0,), (4,))] for name in names]
    assert incomplete(layouts(files)) == "exp_avg/norm has no elements"
    assert incomplete(layouts([[files[0][0], files[2][0]]])) is None


def test_an_index_of_files_that_are_not_whole_is_refused(tmp_path: Path) -> None:
    files = spread(TENSORS, 2)
    checkpoint = write_checkpoint(tmp_path, 1, TENSORS, [files[0]])
    assert f"{checkpoint} is damaged: master/embedding has" in refusal(lambda: read_index(checkpoint))
    checkpoint = write_checkpoint(tmp_path, 2, TENSORS, files)
    (checkpoint / "rank-00001.safetensors").unlink()
    assert "rank-00001.safetensors cannot be read (No such file" in refusal(lambda: read_index(checkpoint))


# ------------------------------------------------------------------------------------------------------------ damage

HALVES = [Chunk("master/w", (4, 2), (0, 0), (2, 2)), Chunk("master/w", (4, 2), (2, 0), (2, 2))]
LABELS = [chunk.label for chunk in HALVES]


def header(entries: dict[str, Any] | bytes) -> bytes:
    content = entries if isinstance(entries, bytes) else orjson.dumps(entries)
    return struct.pack("<Q", len(content)) + content


def entries_with(**changes: Any) -> dict[str, Any]:
    """Of a file with two blocks, the second of them changed."""
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]} | changes
    return {
        "__metadata__": {"master/w": "4,2"},
        LABELS[0]: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        LABELS[1]: entry,
    }


def relabelled(label: str, shape: str = "4,2") -> dict[str, Any]:
    entries = entries_with()
    entries[label] = entries.pop(LABELS[1])
    return entries | {"__metadata__": {"master/w": shape}}


def without(*keys: str) -> dict[str, Any]:
    entries = entries_with()
    if keys[0] == "":
        del entries[LABELS[1]][keys[1]]
    else:
        del entries[keys[0]]
    return entries


DEEP = b'{"a":' * 100_000
LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "unpack requires a buffer of 8 bytes"),
    "half a length": (b"\0\0\0", "unpack requires a buffer of 8 bytes"),
    "no header": (b"\0" * 8, ""),
    "a header longer than the file": (struct.pack("<Q", 33) + b" " * 32, "it has 40 bytes and says that 33 of them"),
    "the longest number": (b"\xff" * 8, "says that 18446744073709551615 of them are its header"),
    "another format": (b"PK\x03\x04" + b"\0" * 60, "are its header"),
    "no json": (header(b"{" + b" " * 40), ""),
    "not utf-8": (header(b'{"\xff": 1}'), ""),
    "a list": (header(b"[]"), ""),
    "a number": (header(b"7"), ""),
    "nested too deeply": (header(DEEP), ""),
    "no shapes": (header(without("__metadata__")), "it lacks '__metadata__'"),
    "shapes that are a list": (header({"__metadata__": []}), ""),
    "no shape of this one": (header(entries_with() | {"__metadata__": {}}), "it lacks 'master/w'"),
    "a shape of words": (header(relabelled(LABELS[1], "four,2")), ""),
    "an absurd shape": (header(relabelled(LABELS[1], f"{2**63},2")), "no tensor has the shape"),
    "a shape without elements": (header(relabelled(LABELS[1], "4,0")), "no tensor has the shape"),
    "a negative shape": (header(relabelled(LABELS[1], "-4,2")), "no tensor has the shape"),
    "very many axes": (header(relabelled(LABELS[1], ",".join(["9" * 4000] * 2000))), "no tensor has the shape"),
    "an entry that is a number": (header(entries_with() | {LABELS[1]: 7}), ""),
    "no dtype": (header(without("", "dtype")), "it lacks 'dtype'"),
    "no offsets": (header(without("", "data_offsets")), "it lacks 'data_offsets'"),
    "another dtype": (header(entries_with(dtype="F16")), "master/w[2:4,0:2] is F16, not F32"),
    "another shape": (header(entries_with(shape=[4, 1])), "master/w[2:4,0:2] has shape [4, 1]"),
    "a shape of text": (header(entries_with(shape="2,2")), "has shape 2,2"),
    "overlapping": (header(entries_with(data_offsets=[0, 16])), "should begin at 16 and have 16 bytes, not [0, 16]"),
    "half overlapping": (header(entries_with(data_offsets=[8, 24])), "should begin at 16"),
    "a gap": (header(entries_with(data_offsets=[20, 36])), "should begin at 16"),
    "backwards": (header(entries_with(data_offsets=[32, 16])), "should begin at 16"),
    "before the file": (header(entries_with(data_offsets=[-16, 0])), "should begin at 0"),
    "one offset": (header(entries_with(data_offsets=[16])), "should begin at 16"),
    "offsets of text": (header(entries_with(data_offsets="16")), ""),
    "absurd offsets": (header(entries_with(data_offsets=[2**62, 2**62 + 16])), "should begin at 16"),
    "outside": (header(relabelled("master/w[3:5,0:2]")), "master/w[3:5,0:2] lies outside of (4, 2)"),
    "before the tensor": (header(relabelled("master/w[-1:1,0:2]")), "lies outside of (4, 2)"),
    "a slice backwards": (header(relabelled("master/w[4:2,0:2]")), "lies outside of (4, 2)"),
    "an axis too few": (header(relabelled("master/w[0:4]")), "lies outside of (4, 2)"),
    "an axis too many": (header(relabelled("master/w[0:2,0:2,0:1]")), "lies outside of (4, 2)"),
    "no slice": (header(relabelled("master/w")), ""),
    "half a slice": (header(relabelled("master/w[2:4,0]")), ""),
    "three ends": (header(relabelled("master/w[2:4:6,0:2]")), ""),
    "words in a slice": (header(relabelled("master/w[a:b,0:2]")), ""),
    "a slice of an absurd number": (header(relabelled(f"master/w[{'9' * 5000}:4,0:2]")), ""),
    "the same block spelt otherwise": (header(relabelled("master/w[+0:0_2,0:2]")), "spelt otherwise than"),
    "no closing bracket": (header(relabelled("master/w[2:4,0:2")), "spelt otherwise than"),
    "lines in a name": (header(relabelled("master/w\n\n[2:4,0:2]")), ""),
    "the same name twice": (
        header(orjson.dumps(entries_with()).replace(LABELS[1].encode(), LABELS[0].encode())),
        "should begin at 0",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    content, reason = LIES[lie]
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(content + b"\0" * 32 * (len(content) > 64))
    message = refusal(lambda: read_layout(path))
    assert message.startswith(f"{path} is not part of a checkpoint: ") and reason in message


def test_the_entries_that_the_lies_are_made_of_are_true(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(header(entries_with()) + b"\0" * 32)
    assert read_layout(path).chunks == tuple(HALVES)


@pytest.mark.parametrize("length", [0, 7, 8, 100, PAGE_BYTES - 1, PAGE_BYTES, -1])
def test_a_file_cut_short_or_grown_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "rank-00000.safetensors"
    write_file(path, HALVES, {"master/w": numbered(4, 2)})
    content = path.read_bytes()
    path.write_bytes(content[:length])
    refusal(lambda: read_layout(path))
    path.write_bytes(content + b"\0")
    assert f"it has {len(content) + 1} bytes and says {len(content)}" in refusal(lambda: read_layout(path))


def test_any_flipped_bytes_of_a_header_are_refused_or_still_describe_the_file(tmp_path: Path) -> None:
    """A name may become another name, which the hash would tell; what is said of bytes and shapes stays true."""
    chunks = [chunk for file in spread(TENSORS, 1) for chunk in file]
    path = tmp_path / "rank-00000.safetensors"
    write_file(path, chunks, TENSORS)
    content = path.read_bytes()
    used = len(content[:PAGE_BYTES].rstrip(b" "))
    choose, refused = random.Random(5), 0
    for _ in range(3000):
        damaged = bytearray(content)
        for _ in range(choose.choice((1, 1, 1, 2, 8))):
            damaged[choose.randrange(used)] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        try:
            layout = read_layout(path)
        except UserError:
            refused += 1
            continue
        assert layout.num_bytes == len(content) and len(layout.chunks) == len(chunks)
        for chunk, start in zip(layout.chunks, layout.starts, strict=True):
            inside = all(
                first >= 0 and first + size <= whole
                for first, size, whole in zip(chunk.offset, chunk.shape, chunk.global_shape, strict=True)
            )
            assert inside and start >= PAGE_BYTES and start + chunk.num_bytes <= len(content)
    assert refused > 2000


def test_a_header_that_claims_much_costs_no_memory(tmp_path: Path) -> None:
    claims = {
        "header": struct.pack("<Q", 99_000_000) + b" " * 64,
        "shape": header({"__metadata__": {"master/w": f"{2**60},{2**60}"}, "master/w[0:1,0:1]": {}}),
        "block": header(
            {
                "__metadata__": {"master/w": str(2**60)},
                f"master/w[0:{2**60}]": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]},
            }
        ),
    }
    for name, content in claims.items():
        (tmp_path / name).write_bytes(content + b"\0" * 64)
        assert peak_growth_mb(lambda name=name: refusal(lambda: read_layout(tmp_path / name))) < 8
