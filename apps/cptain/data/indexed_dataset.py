"""Megatron's indexed dataset, written a block of documents at a time.

The .bin file is token ids and nothing else. The .idx file, little-endian (`megatron.core.datasets.indexed_dataset`):

    9 bytes   MMIDIDX\\0\\0
    u64       version, 1
    u8        dtype of the ids: 8 is uint16, 4 is int32
    u64       sequences S
    u64       documents D, plus one
    int32[S]  length of each sequence in ids
    int64[S]  byte offset of each sequence in .bin
    int64[D+1] sequence number at which each document begins, and S
"""

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES: dict[type[np.uint16] | type[np.int32], int] = {np.uint16: 8, np.int32: 4}
_UINT16_VOCABULARY = 65500  # Megatron's own threshold


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The dtype that Megatron gives to ids of a vocabulary of `vocab_size`."""
    return np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32


class IndexedDatasetWriter:
    """Appends documents to a .bin file; `write_index` then writes the .idx file.

    Args:
        bin_file: the .bin file, created.
        dtype: see `token_dtype`.
    """

    def __init__(self, bin_file: Path, dtype: type[np.uint16] | type[np.int32]) -> None:
        self.dtype = dtype
        self._bin = open(bin_file, "wb", buffering=0)  # noqa: SIM115 closed by write_index or close
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._counts: list[npt.NDArray[np.int64]] = []
        self.documents = self.tokens = 0

    def add(self, documents: "EncodedDocuments") -> None:
        """Append documents."""
        view = documents.ids.data.cast("B")
        size = len(view)
        while view:  # a raw file may take less than it is given
            view = view[self._bin.write(view) :]
        # Begin to write to disk now, so that the fsync at the end finds little left.
        os.posix_fadvise(self._bin.fileno(), self._bin.tell() - size, size, os.POSIX_FADV_DONTNEED)
        self._lengths.append(documents.lengths)
        self._counts.append(documents.sequences)
        self.documents += len(documents.sequences)
        self.tokens += len(documents.ids)

    def close(self) -> None:
        """Close the .bin file."""
        self._bin.close()

    def write_index(self, idx_file: Path) -> None:
        """Close the .bin file and write the .idx file that belongs to it."""
        self.close()
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, dtype="<i4")
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= np.dtype(self.dtype).itemsize
        before = np.zeros(self.documents + 1, dtype="<i8")
        if self._counts:
            np.cumsum(np.concatenate(self._counts), out=before[1:])
        with open(idx_file, "wb") as file:
            header = struct.pack("<QBQQ", 1, _DTYPE_CODES[self.dtype], len(lengths), len(before))
            file.write(MAGIC + header)
            file.write(lengths.tobytes())
            file.write(offsets.tobytes())
            file.write(before.tobytes())


Ids = npt.NDArray[np.uint16] | npt.NDArray[np.int32]


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents as they are written.

    Attributes:
        ids: of all sequences one after the other, EOD included, in the data set's dtype.
        lengths: ids of each sequence that has any.
        sequences: how many of those each document has; 0 for one without ids, which keeps its place all the same.
    """

    ids: Ids
    lengths: npt.NDArray[np.int32]
    sequences: npt.NDArray[np.int64]


def with_eod(
    ids: npt.NDArray[np.uint32],
    lengths: npt.NDArray[np.int64],
    sequences: list[int] | None,
    eod: int,
    dtype: type[np.uint16] | type[np.int32],
) -> EncodedDocuments:
    """Append EOD to the last sequence of every document that has ids.

    Args:
        ids: of all sequences one after the other.
        lengths: ids of each sequence.
        sequences: how many sequences each document has; None: one.
        eod: the id.
        dtype: of the data set.
    """
    kept = lengths > 0
    count = len(lengths) if sequences is None else len(sequences)
    document = np.arange(count) if sequences is None else np.repeat(np.arange(count), sequences)
    document = document[kept]
    last = np.ones(len(document), dtype=bool)
    last[:-1] = document[1:] != document[:-1]
    total = lengths[kept] + last
    ends = np.cumsum(total)
    out = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint32)
    is_text = np.ones(len(out), dtype=bool)
    is_text[ends[last] - 1] = False
    out[is_text] = ids
    out[~is_text] = eod
    return EncodedDocuments(
        out.astype(np.uint16) if dtype is np.uint16 else out.view(np.int32),
        total.astype("<i4"),
        np.bincount(document, minlength=count),
    )


_COUNTED = 16 << 20  # ids at once


def ids_over(pairs: Iterable[Path], limit: int, most: int) -> tuple[int, int]:
    """How many ids of some pairs are `limit` or over, and how many ids were looked at.

    Args:
        pairs: their paths without .bin and .idx.
        limit: the first id that counts.
        most: bytes of .bin files to look at, from the first on.
    """
    over = looked = 0
    for pair in pairs:
        with open(f"{pair}.idx", "rb") as index:
            code = index.read(len(MAGIC) + 9)[-1]
        dtype = np.dtype(next(kind for kind, number in _DTYPE_CODES.items() if number == code))
        with open(f"{pair}.bin", "rb") as file:
            while most > 0:
                ids = np.fromfile(file, dtype, min(_COUNTED, most // dtype.itemsize or 1))
                if not len(ids):
                    break
                over += int(np.count_nonzero(ids >= limit))
                looked += len(ids)
                most -= ids.nbytes
    return over, looked
