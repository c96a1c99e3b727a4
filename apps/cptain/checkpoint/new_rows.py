"""The rows of new tokens: a Hugging Face model read as if its vocabulary had been extended.

A new row is made when it is read, of rows that lie in the base's file: none is held. Sums are in fp64 and in a fixed
order, and rounded to the weights' dtype once: convert and verify make the same bits, in any number of threads.
"""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cptain.checkpoint.mapping import VOCABULARY_TENSORS
from cptain.checkpoint.safetensors_folder import SafetensorsReader
from cptain.checkpoint.streaming import Fill
from cptain.data.tokenizer import tokenizer_hash
from cptain.data.vocabulary import Extension
from cptain.errors import CptainError

_PIECE = 1 << 20  # bytes of an embedding that are summed at once


class ExtendedReader(SafetensorsReader):
    """A model's folder, with a row for every new token.

    Args:
        folder: the base model's, which has no such rows, or rows that no token used.
        extension: which are new, and how they begin.

    Raises:
        CptainError: see `SafetensorsReader`; a new token of which the base's tokenizer makes nothing.
    """

    def __init__(self, folder: Path, extension: Extension) -> None:
        super().__init__(folder)
        self._extension = extension
        self._means_lock = threading.Lock()
        self._means: dict[str, torch.Tensor] = {}
        if extension.initialise != "mean" and [] in extension.pieces:
            number = extension.first + extension.pieces.index([])
            raise CptainError(
                f"model.vocabulary: id {number}: the model's own tokenizer makes no piece of this token: use "
                'initialise = "mean", or leave the token out'
            )

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, new rows among them."""
        return super().bytes + sum(
            (self.shape(name)[0] - super(ExtendedReader, self).shape(name)[0]) * self._row_bytes(name)
            for name in VOCABULARY_TENSORS
            if name in self.names()
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, with its new rows."""
        shape = super().shape(name)
        return (self._extension.rows(shape[0]), *shape[1:]) if name in VOCABULARY_TENSORS else shape

    def read(self, name: str, first: int, stop: int, buffer: torch.Tensor) -> None:
        """As in `SafetensorsReader`; new rows are made."""
        if name not in VOCABULARY_TENSORS:
            super().read(name, first, stop, buffer)
            return
        row_bytes = self._row_bytes(name)
        for begin, end, new in kinds_of_rows(self._extension, first, stop):
            part = buffer[(begin - first) * row_bytes : (end - first) * row_bytes]
            if not new:
                super().read(name, begin, end, part)
                continue
            for number, row in zip(range(begin, end), part.view(self.dtype(name)).view(end - begin, -1), strict=True):
                row.copy_(self._made(name, number))

    def _row_bytes(self, name: str) -> int:
        return super().shape(name)[1] * int(self.dtype(name).itemsize)

    def _made(self, name: str, number: int) -> torch.Tensor:
        """The row of a new id, in fp64."""
        if self._extension.initialise == "mean":
            with self._means_lock:  # the first thread makes it for all
                if name not in self._means:
                    ids = range(self._extension.first)
                    step = max(1, _PIECE // self._row_bytes(name))
                    self._means[name] = self._mean(name, (ids[at : at + step] for at in ids[::step]))
                return self._means[name]
        pieces = self._extension.pieces[number - self._extension.first]
        if self._extension.initialise == "copy":
            pieces = pieces[:1]
        return self._mean(name, (range(piece, piece + 1) for piece in pieces))

    def _mean(self, name: str, ids: Iterator[range]) -> torch.Tensor:
        """The mean of the base's rows of `ids`, each as often as it is named; row after row, so that no number of
        threads or vector units changes a bit."""
        total, count = np.zeros(super().shape(name)[1]), 0
        for some in ids:
            rows = torch.empty(len(some) * self._row_bytes(name), dtype=torch.uint8)
            super().read(name, some.start, some.stop, rows)
            for row in rows.view(self.dtype(name)).view(len(some), -1).double().numpy():
                total += row
            count += len(some)
        return torch.from_numpy(total / count)


def kinds_of_rows(extension: Extension, first: int, stop: int) -> Iterator[tuple[int, int, bool]]:
    """Rows `first` to `stop` of the extended embedding, cut where new ones begin and end: each part, and whether it is
    new."""
    edges = [0, extension.first, extension.size, max(stop, extension.size)]
    for begin, end, new in zip(edges, edges[1:], (False, True, False), strict=False):
        if max(begin, first) < min(end, stop):
            yield max(begin, first), min(end, stop), new


def rows_apart(extension: Extension, name: str, rows: int, fill: Fill) -> Iterator[tuple[str, int, Fill]]:
    """A tensor as parts, each with a name, its rows and where they come from: where it has a row for every token, new
    rows apart from the base's."""
    if name not in VOCABULARY_TENSORS:
        yield name, rows, fill
        return

    def part(begin: int, first: int, stop: int, buffer: torch.Tensor) -> None:
        fill(begin + first, begin + stop, buffer)

    for begin, end, new in kinds_of_rows(extension, 0, rows):
        kind = " (new rows)" if new else " (spare rows)" if begin else ""
        yield name + kind, end - begin, partial(part, begin)


def told(extension: Extension) -> str:
    """Which rows of the vocabulary are new, and what they are compared with."""
    return (
        f"rows {extension.first} to {extension.size - 1} of the vocabulary are new, and compared with what "
        f'initialise = "{extension.initialise}" makes of the base model\'s'
    )


def open_hf(folder: Path, extension: Extension | None) -> SafetensorsReader:
    """A Hugging Face folder that is compared with an extended checkpoint: the base model as it was extended; as it is,
    the extended model, which has the extended tokenizer, or one that has too few rows to be the base."""
    reader = SafetensorsReader(folder)
    rows = reader.shape(VOCABULARY_TENSORS[0])[0] if VOCABULARY_TENSORS[0] in reader.names() else 0
    if extension is None or tokenizer_hash(folder) == extension.tokenizer or rows < extension.first:
        return reader
    reader.close()
    return ExtendedReader(folder, extension)
