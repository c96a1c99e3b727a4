"""Megatron's indexed dataset, written one document at a time.

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

import struct
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
    """Appends documents of one sequence each to a .bin file; `write_index` then writes the .idx file.

    Args:
        bin_file: the .bin file, created.
        dtype: see `token_dtype`.
    """

    def __init__(self, bin_file: Path, dtype: type[np.uint16] | type[np.int32]) -> None:
        self.dtype = dtype
        self._bin = open(bin_file, "wb", buffering=1 << 20)  # noqa: SIM115 closed by write_index or close
        self._lengths: list[int] = []
        self._sequences_before = [0]
        self.tokens = 0

    @property
    def documents(self) -> int:
        """Documents added, those without ids included."""
        return len(self._sequences_before) - 1

    def add(self, ids: npt.ArrayLike) -> None:
        """Append one document.

        One without ids keeps its place among the documents and adds no sequence, as in Megatron.
        """
        array = np.asarray(ids, dtype=self.dtype)
        if array.size:
            self._bin.write(array.tobytes())
            self._lengths.append(array.size)
            self.tokens += array.size
        self._sequences_before.append(len(self._lengths))

    def close(self) -> None:
        """Flush and close the .bin file."""
        self._bin.close()

    def write_index(self, idx_file: Path) -> None:
        """Close the .bin file and write the .idx file that belongs to it."""
        self.close()
        lengths = np.array(self._lengths, dtype="<i4")
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= np.dtype(self.dtype).itemsize
        with open(idx_file, "wb") as file:
            header = struct.pack("<QBQQ", 1, _DTYPE_CODES[self.dtype], len(lengths), len(self._sequences_before))
            file.write(MAGIC + header)
            file.write(lengths.tobytes())
            file.write(offsets.tobytes())
            file.write(np.array(self._sequences_before, dtype="<i8").tobytes())
