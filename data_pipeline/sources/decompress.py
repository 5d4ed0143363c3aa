"""Decompression in bounded memory, one member at a time, that goes on behind damage.

A .gz file is a sequence of members and a .zst file one of frames, each of which can be read alone; "member" means both.
Nothing here trusts a declared size: output comes in blocks of about a megabyte.
"""

import re
from collections.abc import Callable
from typing import Protocol, cast

import zstandard
from isal import igzip_lib

from data_pipeline.sources.split import Compression
from data_pipeline.tally import Tally

BLOCK_BYTES = 1 << 20  # of output at a time, at most
_FULL_BYTES = BLOCK_BYTES // 4  # less is put together: the members of a Common Crawl archive are small
MIN_INPUT_BYTES = 16 << 10  # small, as each member of a Common Crawl archive copies what is left of it
MAX_INPUT_BYTES = 256 << 10
MAX_WINDOW_BYTES = 1 << 27  # what `zstd -d` itself allows without --long
MAX_RATIO = 100  # text compresses 3 to 10 times, logs up to 50; deflate allows 1,032 (zlib's technical notes)
MAX_SUSPECT_BYTES = 1 << 30  # what a file may expand to whatever its ratio
_MAX_FALSE_STARTS = 1000  # of bytes that only look like a member


class Member(Protocol):
    """A member being decompressed; as `isal.igzip_lib.IgzipDecompressor` has it."""

    @property
    def needs_input(self) -> bool: ...
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes:
        """After `eof`: what follows in the input."""
        ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class ZstdMember:
    """One frame of Zstandard, decoded a block at a time: at most 128 KB come out (RFC 8878, 3.1.1.2.4)."""

    def __init__(self) -> None:
        self._decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
        self._input = b""
        self._piece = b""  # what is decoded right now
        self._checksum_bytes = -1  # -1: the frame's header has not come yet
        self._skip_bytes = 0  # of a skippable frame, still to come
        self.needs_input, self.eof = True, False

    @property
    def unused_data(self) -> bytes:
        return self._input

    @property
    def suspects(self) -> bytes:
        """After damage: input in which another frame may begin."""
        return self._piece[1:] + self._input

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if data:
            self._input += data
        if self._skip_bytes:
            return self._skip()
        num_bytes = self._header_bytes() if self._checksum_bytes < 0 else self._block_bytes()
        self.needs_input = num_bytes == 0 or num_bytes > len(self._input)
        if self.needs_input:
            return b""
        self._piece, self._input = self._input[:num_bytes], self._input[num_bytes:]
        if self._skip_bytes:
            return self._skip()
        output: bytes = self._decoder.decompress(self._piece)
        self.eof = bool(self._decoder.eof)
        return output

    def _skip(self) -> bytes:
        skipped = min(self._skip_bytes, len(self._input))
        self._input = self._input[skipped:]
        self._skip_bytes -= skipped
        self.eof = self._skip_bytes == 0
        self.needs_input = not self.eof
        return b""

    def _header_bytes(self) -> int:
        """Size of the frame's header; 0 if that is not known yet."""
        data = self._input
        if len(data) < 8:
            return 0
        if data[:4] in _SKIPPABLE:
            self._skip_bytes = int.from_bytes(data[4:8], "little")
            self.eof = self._skip_bytes == 0
            return 8
        num_bytes = zstandard.frame_header_size(data)
        if num_bytes > len(data):
            return 0
        parameters = zstandard.get_frame_parameters(data[:num_bytes])
        if parameters.window_size > MAX_WINDOW_BYTES:
            raise OSError(
                f"it needs a window of {parameters.window_size >> 20} MB to decompress, more than "
                f"{MAX_WINDOW_BYTES >> 20}; compress it again without --long"
            )
        self._checksum_bytes = 4 if parameters.has_checksum else 0
        return num_bytes

    def _block_bytes(self) -> int:
        """Size of a block, with the checksum behind the last; 0 if that is not known yet."""
        if len(self._input) < 3:
            return 0
        header = int.from_bytes(self._input[:3], "little")  # from the lowest bit: is it the last, type, size
        is_last, is_one_byte, size = header & 1, header >> 1 & 3 == 1, header >> 3
        if size > _MAX_ZSTD_BLOCK_BYTES and not is_one_byte:
            self._piece = b""
            raise zstandard.ZstdError(f"a block claims {size} bytes")
        return 3 + (1 if is_one_byte else size) + (self._checksum_bytes if is_last else 0)


_MAX_ZSTD_BLOCK_BYTES = 128 << 10
_SKIPPABLE = {bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16)}  # RFC 8878, 3.1.2

_NEW_MEMBER: dict[Compression, Callable[[], Member]] = {
    "gzip": lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP),
    "zstd": ZstdMember,
}
_DAMAGE = (cast(type[Exception], igzip_lib.error), zstandard.ZstdError)
_MEMBER_START: dict[Compression, re.Pattern[bytes]] = {
    # magic, deflate, no reserved flag, time, level, operating system (RFC 1952, 2.3.1)
    "gzip": re.compile(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", re.DOTALL),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
}
_START_BYTES = 10


class DecompressedStream:
    """What a compressed file holds.

    `read` ends at damage, which is counted; `resume` then says whether there is a member behind it to go on with.
    """

    def __init__(self, compression: Compression, read_input: Callable[[int], bytes], place: str, tally: Tally) -> None:
        self._read_input = read_input
        self._new_member = _NEW_MEMBER[compression]
        self._member_start = _MEMBER_START[compression]
        self._place, self._tally = place, tally
        self._member: Member | None = None
        self._input = b""  # read, and not given to a member yet
        self._member_bytes = 0  # of input, given to the present member
        self._suspects, self._first_suspect = b"", 0  # last given to it; from where another member may begin
        self._input_bytes = 0
        self._false_starts = 0
        self._ended = self._at_gap = False
        self.is_damaged = False
        self.offset = 0
        """Bytes given so far."""

    def read(self) -> bytes:
        """The next bytes, up to `BLOCK_BYTES`; none at the end or at damage."""
        outputs, start = [], self.offset
        while not self._ended and not self._at_gap and self.offset - start < _FULL_BYTES:
            try:
                output = self._step()
            except _DAMAGE:
                self._note_damage()
                break
            outputs.append(output)
            self.offset += len(output)
            self._give_up_on_a_bomb()
        return b"".join(outputs)

    def resume(self) -> bool:
        """Go on with the next member behind damage; False where there is none."""
        if not self._at_gap:
            return False
        data = self._find_suspects() + self._input
        while self._false_starts < _MAX_FALSE_STARTS:
            if found := self._member_start.search(data):
                self._input, self._member = data[found.start() :], None
                self._at_gap = False
                self._false_starts += 1
                return True
            more = self._fetch(MAX_INPUT_BYTES)
            if not more:
                break
            data = data[1 - _START_BYTES :] + more
        self._at_gap, self._ended = False, True
        return False

    def _find_suspects(self) -> bytes:
        """Input that the damaged member has swallowed and in which another one may begin."""
        if isinstance(self._member, ZstdMember):
            return self._member.suspects
        return self._suspects[self._first_suspect :]

    def _fetch(self, num_bytes: int) -> bytes:
        data = self._read_input(num_bytes)
        self._input_bytes += len(data)
        return data

    def _step(self) -> bytes:
        if self._member is None or self._member.needs_input:
            data = self._input or self._fetch(max(MIN_INPUT_BYTES, min(self._member_bytes, MAX_INPUT_BYTES)))
            self._input = b""
            if not data:
                self._ended = self._member is None
                if self._member is not None:  # it should have gone on
                    self._note_damage()
                return b""
            if self._member is None:
                return self._begin_member(data)
            self._suspects, self._first_suspect = data, 0
            self._member_bytes += len(data)
        else:
            data = b""
        return self._decode(self._member, data)

    def _begin_member(self, data: bytes) -> bytes:
        data = data.lstrip(b"\0")  # padding of tapes and blocks, which gzip ignores too
        if not data:
            return b""
        self._member = self._new_member()
        self._suspects, self._first_suspect = data, 1
        self._member_bytes = len(data)
        return self._decode(self._member, data)

    def _decode(self, member: Member, data: bytes) -> bytes:
        output = member.decompress(data, BLOCK_BYTES - _FULL_BYTES)
        if member.eof:
            self._input, self._member = member.unused_data, None
            self._false_starts = 0
        return output

    def _note_damage(self) -> None:
        self.is_damaged = self._at_gap = True
        if self._false_starts == 0:  # what follows damage and is no member either is the same damage
            self._tally.drop("truncated", f"{self._place}@{self.offset}")

    def _give_up_on_a_bomb(self) -> None:
        if self.offset > MAX_SUSPECT_BYTES and self.offset > MAX_RATIO * self._input_bytes:
            self._ended = self.is_damaged = True
            self._tally.drop("decompression_bomb", f"{self._place}@{self.offset}")
