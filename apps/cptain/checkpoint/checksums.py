"""CRC-32 of a zip file's member, checked while its bytes pass in pieces, in any order and through any thread.

The CRC-32 of two pieces follows from those of each and from the second's length, so no byte is read twice for it. The
arithmetic is that of polynomials over GF(2) modulo CRC-32's own, bit-reversed, as zlib's crc32_combine has it.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from isal import isal_zlib

_POLYNOMIAL = 0xEDB88320  # of CRC-32, whose x^0 is the highest bit
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
