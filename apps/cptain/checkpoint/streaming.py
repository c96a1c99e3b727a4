"""Files whose every offset is known ahead, written by several threads at once.

Each thread has one buffer, which it fills from the source and writes where it belongs: memory is the buffers', however
large the model. Reading, writing and checksums all let other threads run. A file is flushed to disk by the thread that
writes its last part, while the others go on.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from isal import isal_zlib

Fill = Callable[[int, int, torch.Tensor], None]  # rows (first, stop) of a tensor into a flat tensor of uint8
_BUFFER = 1 << 20  # bytes: what is read is still in the processor's cache when it is written
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Rows:
    """Rows `first` to `stop` of a tensor, at byte `offset` of a file.

    Attributes:
        name: of the tensor, for people.
        row_bytes: bytes of one row.
        fill: where they come from.
        frame: what belongs before and behind them, given their CRC-32, as (offset, bytes).
    """

    name: str
    offset: int
    first: int
    stop: int
    row_bytes: int
    fill: Fill
    frame: Callable[[int], Iterable[tuple[int, bytes]]] | None = None


@dataclass
class FilePlan:
    """A file to be written: small pieces as (offset, bytes), and rows."""

    name: str
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    bytes: int = 0


class Stopped(Exception):
    """Another thread has failed, or the process was told to stop."""


class Buffers:
    """What a thread works with: `count` flat tensors of uint8, and whether it is to stop."""

    def __init__(self, count: int, stopping: threading.Event) -> None:
        self.stopping = stopping
        self._memory = [torch.empty(_BUFFER, dtype=torch.uint8) for _ in range(count)]

    def row_ranges(self, first: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """Rows (first, stop) in steps that fit, each with buffers of their length."""
        if row_bytes > len(self._memory[0]):
            self._memory = [torch.empty(row_bytes, dtype=torch.uint8) for _ in self._memory]
        step = max(1, len(self._memory[0]) // max(1, row_bytes))
        for begin in range(first, stop, step):
            if self.stopping.is_set():
                raise Stopped
            end = min(begin + step, stop)
            yield begin, end, [memory[: (end - begin) * row_bytes] for memory in self._memory]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two flat tensors of uint8 are equal."""
    whole = len(a) // 8 * 8
    wide = (tensor[:whole].numpy().view(np.int64) for tensor in (a, b))
    return np.array_equal(*wide) and np.array_equal(a[whole:].numpy(), b[whole:].numpy())


@contextmanager
def in_threads(
    tasks: Iterable[Callable[[Buffers], _Result]], workers: int, buffers: int
) -> Iterator[Iterator[_Result]]:
    """Do tasks in `workers` threads that have `buffers` buffers each; yields the results as they come.

    Raises:
        Exception: what a task raised; the others stop within a buffer's time.
    """
    stopping, local = threading.Event(), threading.local()

    def work(task: Callable[[Buffers], _Result]) -> _Result:
        if not hasattr(local, "buffers"):
            local.buffers = Buffers(buffers, stopping)
        return task(local.buffers)

    pool = ThreadPoolExecutor(workers)
    try:
        yield (future.result() for future in as_completed([pool.submit(work, task) for task in tasks]))
    finally:
        stopping.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _write(descriptor: int, content: Any, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


class _OpenFile:
    """A file under way; the thread that writes the last of its rows flushes and closes it."""

    def __init__(self, folder: Path, plan: FilePlan) -> None:
        self._path, self._plan, self._left = folder / plan.name, plan, len(plan.rows)
        self._lock, self._descriptor = threading.Lock(), -1

    def open(self) -> int:
        with self._lock:
            if self._descriptor < 0:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                for offset, content in self._plan.pieces:
                    _write(self._descriptor, content, offset)
            return self._descriptor

    def done(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left > 0:
                return
        os.fsync(self.open())
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


def _write_rows(file: _OpenFile, rows: Rows | None, buffers: Buffers) -> tuple[int, str]:
    if rows is None:
        file.done()
        return 0, ""
    descriptor, checksum = file.open(), 0
    for first, stop, (buffer,) in buffers.row_ranges(rows.first, rows.stop, rows.row_bytes):
        rows.fill(first, stop, buffer)
        content = buffer.numpy()
        if rows.frame:
            checksum = isal_zlib.crc32(content, checksum)
        _write(descriptor, content, rows.offset + (first - rows.first) * rows.row_bytes)
    for offset, piece in rows.frame(checksum) if rows.frame else ():
        _write(descriptor, piece, offset)
    file.done()
    return (rows.stop - rows.first) * rows.row_bytes, rows.name


def write_files(folder: Path, plans: Iterable[FilePlan], workers: int, advance: Callable[[int, str], None]) -> None:
    """Write files into an existing folder, and flush them to disk.

    Args:
        folder: where.
        plans: the files.
        workers: threads.
        advance: told the bytes that were written since it was last called, and of which tensor.
    """
    files = [(_OpenFile(folder, plan), plan) for plan in plans]
    tasks = [partial(_write_rows, file, rows) for file, plan in files for rows in plan.rows]
    tasks += [partial(_write_rows, file, None) for file, plan in files if not plan.rows]
    try:
        with in_threads(tasks, workers, buffers=1) as results:
            for count, name in results:
                advance(count, name)
    finally:
        for file, _ in files:
            file.close()
