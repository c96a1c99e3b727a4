"""The files of a checkpoint's folder, read at given offsets, each opened once, by any thread.

What is read of a zip member is checked against the CRC-32 in its directory, once all that is wanted has been read.
"""

import os
import threading
from collections import deque
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from isal import isal_zlib

from cptain.checkpoint.checksums import Member, Passing
from cptain.checkpoint.streaming import Buffers, in_threads
from cptain.errors import CptainError

_READ = 64 << 20  # bytes asked of the kernel at once


class FolderFiles:
    """Base of the readers: `folder`, and its files open until `close` or the end of a with block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._passing: dict[tuple[str, Member], Passing] = {}

    def descriptor(self, name: str) -> int:
        """The open file `name` of the folder."""
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[name]

    def read_into(self, buffer: torch.Tensor, name: str, offset: int) -> None:
        """Fill `buffer`, a contiguous tensor of uint8, from `offset` of a file.

        Raises:
            CptainError: the file ends before the buffer is full.
        """
        view, done = memoryview(buffer.numpy()), 0
        while done < len(view):
            count = os.preadv(self.descriptor(name), [view[done : done + _READ]], offset + done)
            if not count:
                raise CptainError(f"{self.folder / name}: truncated at byte {offset + done}")
            done += count

    def read_member(self, buffer: torch.Tensor, name: str, offset: int, member: Member, tensor: str) -> None:
        """Like `read_into`, of values of `tensor` that lie in a zip member of the file; see `check_members`."""
        self.read_into(buffer, name, offset)
        self._passed(name, member, tensor).add(offset, buffer.numpy())

    def _passed(self, name: str, member: Member, tensor: str) -> Passing:
        found = self._passing.get((name, member))
        return found or self._passing.setdefault((name, member), Passing(member, tensor))

    def check_member(self, name: str, member: Member, tensor: str, buffers: Buffers) -> int:
        """Check one member, and read what has not been read of it.

        Args:
            name: the file.
            member: which.
            tensor: whose values it holds.
            buffers: one, of the thread that does it.

        Returns:
            Bytes of it.

        Raises:
            CptainError: it is not what its directory says.
        """

        def rest(begin: int, end: int) -> int:
            crc = 0
            for at, _, (piece,) in buffers.row_ranges(begin, end, 1):
                self.read_into(piece, name, at)
                crc = isal_zlib.crc32(piece.numpy(), crc)
            return crc

        if not self._passed(name, member, tensor).is_whole(rest):
            raise CptainError(
                f"{self.folder / name}: {tensor}: damaged: its bytes are not those of their checksum (CRC-32): bring "
                "the file again from where it was written, or take another checkpoint"
            )
        return member.end - member.begin

    def check_members(self, workers: int) -> None:
        """Check every member of which anything was read, in threads.

        Raises:
            CptainError: see `check_member`.
        """
        tasks = [partial(self.check_member, *key, passing.tensor) for key, passing in self._passing.items()]
        with in_threads(tasks, workers, buffers=1) as checked:
            deque(checked, maxlen=0)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
