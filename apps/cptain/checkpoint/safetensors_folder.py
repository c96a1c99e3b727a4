"""safetensors files of a Hugging Face model's folder, read and written a few rows at a time.

The format: u64 length of a JSON header, the header {name: {dtype, shape, data_offsets: [begin, end]}}, then the data,
which the offsets count from. A memory map would count every page read as this process's memory; plain reads keep it at
the tensor in hand. Nothing a header says is believed before it is checked against the file's size.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from cptain.checkpoint.folder_files import FolderFiles
from cptain.checkpoint.mapping import row_ranges
from cptain.checkpoint.streaming import Buffers, FilePlan, Fill, Rows, in_threads, same_bits
from cptain.errors import CptainError, one_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class _Entry:
    file: Path
    offset: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no name may stand twice: of two tensors, readers would disagree which one it is."""
    if len(found := dict(pairs)) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{ascii(next(name for name in found if names.count(name) > 1))[:80]} twice")
    return found


def _read_entry(file: Path, name: str, value: dict[str, Any], data: int) -> _Entry:
    """One tensor of a header, whose data begins at byte `data` of the file."""
    if not name.isprintable():
        raise ValueError(f"{ascii(name)[:80]} is no name")
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{name} is {ascii(value['dtype'])[1:-1][:80]}, supported: {', '.join(DTYPES)}")
    dtype, shape, (begin, end) = DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"{name} has a shape or offsets that are no whole numbers")
    if end - begin != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has offsets {begin} to {end} for the shape {list(shape)}")
    return _Entry(file, data + begin, end - begin, dtype, shape)


def _read_header(file: Path) -> dict[str, _Entry]:
    """The tensors of one file. Raises CptainError where the header and the file do not agree."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as raw:
            if raw.read(19) == b"version https://git":
                raise ValueError("it is Git LFS's pointer to the weights: git lfs pull brings them")
            if size < 8:
                raise ValueError(f"truncated: {size} bytes")
            raw.seek(0)
            (length,) = struct.unpack("<Q", raw.read(8))
            if length > min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(raw.read(length).decode(), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        entries = {name: _read_entry(file, name, value, 8 + length) for name, value in header.items()}
        expected = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].bytes)):
            if entry.offset != expected:
                raise ValueError(f"{name} begins at byte {entry.offset} of the file, where {expected} was due")
            expected += entry.bytes
        if size < expected:
            raise ValueError(f"truncated: {size} bytes where its header needs {expected}")
        if size > expected:
            raise ValueError(f"{size} bytes where its header needs {expected}")
        return entries
    except FileNotFoundError:
        raise CptainError(f"{file}: missing") from None
    except OSError as error:
        raise CptainError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CptainError(f"{file}: not a valid safetensors file: {one_line(error)}") from error


class SafetensorsReader(FolderFiles):
    """The tensors of a folder with model.safetensors, or with an index and the shards that it names.

    Raises:
        CptainError: no weights, a shard missing or damaged, or a tensor not where the index has it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._entries: dict[str, _Entry] = {}
        index = folder / INDEX
        if index.is_file():
            try:
                weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)[
                    "weight_map"
                ]
                shards = sorted(set(weight_map.values()))
                if not all(shard.isprintable() for shard in shards):
                    raise ValueError("it names a file that cannot be printed")
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise CptainError(f"{index}: cannot be read: {one_line(error)}") from error
            for shard in shards:
                if Path(shard).name != shard or shard == "..":
                    raise CptainError(f"{index}: {shard}: a shard must lie beside its index")
                if not (folder / shard).is_file():
                    raise CptainError(f"{folder / shard}: missing, and {INDEX} names it")
                for name, entry in _read_header(folder / shard).items():
                    if weight_map.get(name, shard) != shard or name in self._entries:
                        raise CptainError(f"{folder / shard}: {name}: is in another file too, by {INDEX}")
                    self._entries[name] = entry
            if absent := sorted(set(weight_map) - set(self._entries)):
                raise CptainError(f"{index}: names {absent[0]}, which is not in {weight_map[absent[0]]}")
        elif (folder / SINGLE).is_file():
            self._entries = _read_header(folder / SINGLE)
        else:
            raise CptainError(f"{folder}: no {SINGLE} and no {INDEX} in it")

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted({entry.file for entry in self._entries.values()})

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self._entries.values())

    def names(self) -> list[str]:
        """All tensors' names."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype."""
        return self._entries[name].dtype

    def read(self, name: str, first: int, stop: int, buffer: torch.Tensor) -> None:
        """Rows `first` to `stop` of a tensor into `buffer`, a flat tensor of uint8 that they fill."""
        entry = self._entries[name]
        row_bytes = entry.bytes // max([1, *entry.shape[:1]])
        self.read_into(buffer, entry.file.name, entry.offset + first * row_bytes)


class SafetensorsWriter:
    """Plans a folder of shards; `finish` writes their index. Every tensor's shape is known ahead, so data streams.

    Args:
        tensors: names, shapes, and where their rows come from.
        dtype: of all of them.
        shard_bytes: a shard is closed before it grows over this.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, tuple[int, ...], Fill]],
        dtype: torch.dtype,
        shard_bytes: int,
    ) -> None:
        shards: list[list[tuple[str, tuple[int, ...], Fill]]] = [[]]
        self.bytes = filled = 0
        for name, shape, fill in tensors:
            size = prod(shape) * dtype.itemsize
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((name, shape, fill))
            filled += size
            self.bytes += size
        self.files: list[FilePlan] = []
        self._weight_map: dict[str, str] = {}
        for number, members in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._weight_map |= {name: file for name, _, _ in members}
            self.files.append(_plan_shard(file, members, dtype))

    def is_written(self, folder: Path, workers: int, advance: Callable[[int, str], None]) -> bool:
        """Whether `folder` has these shards and their index, byte for byte: nothing less tells a shard of an earlier
        checkpoint from this one's.

        Args:
            folder: an export.
            workers: threads.
            advance: told the bytes that were compared since it was last called, and of which tensor.

        Raises:
            OSError: a file that is not there.
            CptainError: rows that cannot be read where they come from.
        """
        for plan in self.files:
            ((_, header),) = plan.pieces
            with open(folder / plan.name, "rb") as raw:
                if os.fstat(raw.fileno()).st_size != plan.bytes or raw.read(len(header)) != header:
                    return False
        if (folder / INDEX).read_text(encoding="utf-8") != self._index():
            return False
        with FolderFiles(folder) as files:
            tasks = [partial(_is_there, files, plan.name, rows) for plan in self.files for rows in plan.rows]
            with in_threads(tasks, workers, buffers=2) as compared:
                for rows, same in compared:
                    if not same:
                        return False
                    advance((rows.stop - rows.first) * rows.row_bytes, rows.name)
        return True

    def finish(self, folder: Path) -> None:
        """Write the index, for a single shard too: a loader then finds one layout, not two."""
        (folder / INDEX).write_text(self._index(), encoding="utf-8")

    def _index(self) -> str:
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self._weight_map.items()))}
        return json.dumps(index, indent=2) + "\n"


def _is_there(files: FolderFiles, name: str, rows: Rows, buffers: Buffers) -> tuple[Rows, bool]:
    """Whether the rows stand where they would be written in the file `name`."""
    for first, stop, (due, found) in buffers.row_ranges(rows.first, rows.stop, rows.row_bytes):
        rows.fill(first, stop, due)
        files.read_into(found, name, rows.offset + (first - rows.first) * rows.row_bytes)
        if not same_bits(due, found):
            return rows, False
    return rows, True


def _plan_shard(file: str, members: list[tuple[str, tuple[int, ...], Fill]], dtype: torch.dtype) -> FilePlan:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, _ in members:
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begins at a multiple of 8 bytes
    plan = FilePlan(file, [(0, struct.pack("<Q", len(encoded)) + encoded)], bytes=8 + len(encoded) + offset)
    for name, shape, fill in members:
        row_bytes = prod(shape[1:]) * dtype.itemsize
        begin = 8 + len(encoded) + header[name]["data_offsets"][0]
        for first, stop in row_ranges(shape, dtype):
            plan.rows.append(Rows(name, begin + first * row_bytes, first, stop, row_bytes, fill))
    return plan
