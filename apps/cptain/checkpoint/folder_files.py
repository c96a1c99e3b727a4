"""The files of a checkpoint's folder, read at given offsets, each opened once, by any thread."""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from cptain.errors import CptainError

_READ = 64 << 20  # bytes asked of the kernel at once


class FolderFiles:
    """Base of the readers: `folder`, and its files open until `close` or the end of a with block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

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
