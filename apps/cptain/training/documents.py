"""Many tokenized files as the one data set that Megatron's GPTDataset cuts sequences from.

Megatron makes a data set of every file, which holds some ten files open: at a few thousand input files a process runs
into its limit. Files that blend with the same weight a token (all of them, or a [[data.mix]] table's) are one data set
here, which is the same blend; files are opened as documents of theirs are read, and a few hundred stay open. GPTDataset
asks of what lies below it no more than `sequence_lengths`, `get` and `path_prefix`, in core 0.13 as in 0.20.
"""

import hashlib
import os
import struct
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from cptain.data.split import HEADER_BYTES, cut, read_lengths

_OPEN_FILES = 256


class File:
    """One pair, by its .idx file.

    Attributes:
        prefix: the pair's path without .bin and .idx.
        dtype: of its ids.
        lengths: of its sequences, in ids.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.dtype, self.lengths = read_lengths(prefix)

    @property
    def tokens(self) -> int:
        """Ids in the file."""
        return int(self.lengths.sum(dtype=np.int64))

    def part(self, bounds: tuple[float, float]) -> range:
        """The sequences between two fractions of the file, rounded as Megatron rounds --split."""
        return cut(bounds, len(self.lengths))

    def offset_in_idx(self, sequence: int) -> int:
        """Where the .idx file has the byte offset of a sequence."""
        return HEADER_BYTES + 4 * len(self.lengths) + 8 * sequence


class Documents:
    """The given sequences of several files, one after another, as GPTDataset's low-level data set.

    Args:
        parts: files with the range of their sequences that counts.
        numbers: of the domains of files, by prefix; 1 where it is not there.
    """

    def __init__(self, parts: list[tuple[File, range]], numbers: dict[str, int] | None = None) -> None:
        self._parts = parts
        self._numbers = np.array([(numbers or {}).get(file.prefix, 1) for file, _ in parts])
        self._starts = np.cumsum([0, *(len(part) for _, part in parts)])
        self.sequence_lengths: npt.NDArray[np.int32] = np.concatenate(
            [file.lengths[part.start : part.stop] for file, part in parts]
        ).astype(np.int32)
        self._open: OrderedDict[str, int] = OrderedDict()
        names = "".join(f"{file.prefix}\0{part.start}\0{part.stop}\0{file.tokens}\0" for file, part in parts)
        self.path_prefix = f"{len(parts)} files, sha256 {hashlib.sha256(names.encode()).hexdigest()}"  # keys the cache

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def numbers_of(self, sequences: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """The number of each sequence's domain."""
        found: npt.NDArray[np.int64] = self._numbers[np.searchsorted(self._starts, sequences, side="right") - 1]
        return found

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """Ids of sequence `idx`: `length` of them from `offset`, or all that follow."""
        number = int(np.searchsorted(self._starts, idx, side="right")) - 1
        file, part = self._parts[number]
        sequence = part.start + int(idx) - int(self._starts[number])
        if length is None:
            length = int(file.lengths[sequence]) - offset
        (begin,) = struct.unpack(
            "<q", os.pread(self._descriptor(f"{file.prefix}.idx"), 8, file.offset_in_idx(sequence))
        )
        size = file.dtype.itemsize
        raw = os.pread(self._descriptor(f"{file.prefix}.bin"), int(length) * size, begin + int(offset) * size)
        return np.frombuffer(raw, dtype=file.dtype)

    def _descriptor(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        if len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[name] = os.open(name, os.O_RDONLY)
        return self._open[name]


def same_blend(weighted: list[tuple[float, File]]) -> list[tuple[float, list[File]]]:
    """Put files of the same weight a token together, under the sum of their weights; the blend stays what it was."""
    groups: dict[str, tuple[float, list[File]]] = {}
    for weight, file in weighted:
        a_token = f"{weight / max(1, file.tokens):.6g}"
        total, files = groups.setdefault(a_token, (0.0, []))
        files.append(file)
        groups[a_token] = (total + weight, files)
    return list(groups.values())
