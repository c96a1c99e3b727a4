"""A zip file's members and their CRC-32, checked while the bytes pass in pieces, in any order and through any thread.

The CRC-32 of two pieces follows from those of each and from the second's length, so no byte is read twice for it. The
arithmetic is that of polynomials over GF(2) modulo CRC-32's own, bit-reversed, as zlib's crc32_combine has it.
"""

import io
import os
import struct
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from isal import isal_zlib

from cptain.errors import one_line

_POLYNOMIAL = 0xEDB88320  # of CRC-32, whose x^0 is the highest bit
_LONGEST_READ = 64 << 20  # bytes of a directory or of a pickle: those of real checkpoints are far smaller
_ONE, _X8 = 1 << 31, 1 << 23  # x^0 and x^8, a byte's length


@dataclass(frozen=True)
class Member:
    """Bytes `begin` to `end` of a file, of which its zip directory says the CRC-32."""

    begin: int
    end: int
    crc: int


def _times(a: int, b: int) -> int:
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)  # most pieces are of a few lengths
def _shift(length: int) -> int:
    """x^(8 × length): what a CRC is multiplied with when `length` bytes follow."""
    power, square = _ONE, _X8
    while length:
        if length & 1:
            power = _times(power, square)
        square, length = _times(square, square), length >> 1
    return power


def combined(first: int, second: int, length: int) -> int:
    """The CRC-32 of two pieces of which the second has `length` bytes."""
    return _times(first, _shift(length)) ^ second


class Passing:
    """What has been seen of a member: runs of bytes, each with its CRC-32. Runs that touch become one.

    Args:
        member: the bytes of the file.
        tensor: whose values these are, for people.
    """

    def __init__(self, member: Member, tensor: str) -> None:
        self.member, self.tensor = member, tensor
        self._lock = threading.Lock()
        self._starts: dict[int, tuple[int, int]] = {}  # begin → end, CRC-32
        self._ends: dict[int, int] = {}  # end → begin

    def add(self, begin: int, content: Any) -> None:
        """Bytes of the member, from byte `begin` of the file. Those that have been seen count once."""
        end, crc = begin + len(content), isal_zlib.crc32(content)
        with self._lock:
            if begin in self._starts or begin == end:
                return
            if (before := self._ends.pop(begin, None)) is not None:
                crc = combined(self._starts.pop(before)[1], crc, end - begin)
                begin = before
            if (behind := self._starts.pop(end, None)) is not None:
                self._ends.pop(behind[0])
                crc = combined(crc, behind[1], behind[0] - end)
                end = behind[0]
            self._starts[begin], self._ends[end] = (end, crc), begin

    def is_whole(self, rest: Callable[[int, int], int]) -> bool:
        """Whether the member is what its CRC-32 says.

        Args:
            rest: gives the CRC-32 of bytes (begin, end) of the file, which have not been seen: padding, most often.
        """
        at, whole = self.member.begin, 0
        for begin, (end, crc) in sorted(self._starts.items()):
            if begin < at:  # pieces that overlap add up to nothing
                return rest(self.member.begin, self.member.end) == self.member.crc
            if begin > at:
                whole = combined(whole, rest(at, begin), begin - at)
            at, whole = end, combined(whole, crc, end - begin)
        if at < self.member.end:
            whole = combined(whole, rest(at, self.member.end), self.member.end - at)
        return whole == self.member.crc


class Window(io.RawIOBase):
    """Bytes `offset` to `offset + length` of a file, seekable, for zipfile; reads what it is asked for and no more."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._position = descriptor, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"it points to byte {base + offset}")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        room = max(0, self._length - self._position)
        wanted = room if size < 0 else min(size, room)
        if wanted > _LONGEST_READ:
            raise ValueError(f"it asks for {wanted} bytes at once")
        content = os.pread(self._descriptor, wanted, self._offset + self._position)
        self._position += len(content)
        return content


def check_stored(info: zipfile.ZipInfo) -> None:
    """Raise ValueError where a member is compressed: torch compresses none, and one could expand to any size."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ValueError(f"{ascii(info.filename.split('/', 1)[-1])[1:-1][:80]} is compressed")


def located(descriptor: int, offset: int, length: int, info: zipfile.ZipInfo) -> Member:
    """Where in its file the content of a member lies, of the zip file at bytes `offset` to `offset + length`.

    Raises:
        ValueError: it lies outside.
    """
    local = os.pread(descriptor, 30, offset + info.header_offset)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", local)
    begin = info.header_offset + 30 + name_length + extra_length
    if signature != b"PK\3\4" or begin + info.file_size > length:
        raise ValueError("a storage that lies outside its archive")
    return Member(offset + begin, offset + begin + info.file_size, info.CRC)


def zip_directory(descriptor: int, offset: int, length: int) -> tuple[bytes, list[Member]]:
    """The directory of the zip file at bytes `offset` to `offset + length` of a file, as it stands there and as the
    members that it names.

    Raises:
        ValueError: no zip file, or see `check_stored` and `located`.
    """
    try:
        with zipfile.ZipFile(Window(descriptor, offset, length)) as archive:
            raw = os.pread(descriptor, length - archive.start_dir, offset + archive.start_dir)
            for info in archive.infolist():
                check_stored(info)
            return raw, [located(descriptor, offset, length, info) for info in archive.infolist()]
    except Exception as error:  # zipfile says in many ways that it is none
        raise ValueError(one_line(error)) from error
