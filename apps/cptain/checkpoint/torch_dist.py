"""Megatron's `torch_dist` checkpoints, written and read without Megatron, one tensor at a time.

A folder of torch.distributed.checkpoint (DCP) with Megatron's conventions:

- `.distcp` files are runs of `torch.save` archives, each found by (file, offset, length);
- `.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`: every tensor's shape, dtype and chunks,
  and where each chunk lies;
- `common.pt` (until 0.18) or the object `common_state/shard_0_1` holds everything that is no tensor: args, iteration;
- `metadata.json` names the backend. It is written last: a folder without it is not a checkpoint.

Megatron's own writer holds every tensor before it writes; this one knows every chunk's place ahead, and streams. What
is read runs nothing (see `torch_save`), and is checked before it is believed: a tensor's chunks must fill it exactly.
"""

import io
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from cptain.checkpoint.checksums import Member, zip_directory
from cptain.checkpoint.chunks import Chunk, Place, overlap
from cptain.checkpoint.folder_files import FolderFiles
from cptain.checkpoint.mapping import Index, Shape
from cptain.checkpoint.streaming import FilePlan, Fill, Rows
from cptain.checkpoint.torch_save import (
    SavedArchive,
    SavedTensor,
    Stub,
    TensorArchive,
    is_a,
    load_pickle,
    numbers,
    stubs,
)
from cptain.errors import CptainError, one_line

_CONFIG = "metadata.json"
_METADATA = ".metadata"
_COMMON_FILE = "common.pt"
_NOT_THE_MODEL = ("optimizer.", "chained_", "rng_state", "rerun_")
_FILES = 64  # .distcp files that a checkpoint is cut into, as far as their sizes allow
_SMALLEST_FILE, _LARGEST_FILE = 64 << 20, 2 << 30


@dataclass(frozen=True)
class _Tensor:
    shape: Shape
    dtype: torch.dtype
    chunks: list[Chunk]


def _pickled(tensors: dict[str, _Tensor], objects: dict[str, Place]) -> bytes:
    """The content of .metadata, in torch's own classes. Whoever only reads need not wait half a second for them."""
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries: dict[str, Any] = {name: dcp.BytesStorageMetadata() for name in objects}
    places = {dcp.MetadataIndex(name): place for name, place in objects.items()}
    for key, tensor in tensors.items():
        boxes = [dcp.ChunkStorageMetadata(torch.Size(one.offset), torch.Size(one.shape)) for one in tensor.chunks]
        properties = dcp.TensorProperties(dtype=tensor.dtype)
        entries[key] = dcp.TensorStorageMetadata(properties, torch.Size(tensor.shape), boxes)
        places |= {dcp.MetadataIndex(key, torch.Size(one.offset)): one.place for one in tensor.chunks}
    storage = {index: _StorageInfo(place.file, place.offset, place.length) for index, place in places.items()}
    return pickle.dumps(dcp.Metadata(entries, storage_data=storage))


class TorchDistWriter:
    """Plans the .distcp files of a checkpoint, chunk by chunk; `finish` makes the folder that holds them a checkpoint.

    Args:
        total: bytes of all chunks, for files of a handy size.
    """

    def __init__(self, total: int) -> None:
        self.files: list[FilePlan] = []
        self._file_bytes = min(max(total // _FILES, _SMALLEST_FILE), _LARGEST_FILE)
        self._tensors: dict[str, _Tensor] = {}
        self._objects: dict[str, Place] = {}

    def add_chunk(
        self, key: str, shape: Shape, offset: Shape, chunk: Shape, dtype: torch.dtype, rows: int, fill: Fill
    ) -> None:
        """Plan a chunk, which lies at `offset` in the tensor `key` of `shape`.

        Args:
            key: Megatron's.
            shape: of the whole tensor.
            offset: of the chunk.
            chunk: its shape.
            dtype: of the whole tensor.
            rows: what the chunk is read by: those of the first dimension behind the ones that are stacked.
            fill: where they come from, counted from the chunk's first.

        Raises:
            ValueError: chunks of one tensor that differ in dtype.
        """
        tensor = self._tensors.setdefault(key, _Tensor(shape, dtype, []))
        if tensor.dtype != dtype:
            raise ValueError(f"{key}: {dtype} after {tensor.dtype}")
        archive = TensorArchive(dtype, chunk)
        file, place = self._append(archive.length)
        tensor.chunks.append(Chunk(offset, chunk, place))

        def frame(checksum: int) -> list[tuple[int, bytes]]:
            return [(place.offset + at, content) for at, content in archive.frame(checksum)]

        row_bytes = prod(chunk) * dtype.itemsize // rows
        file.rows.append(Rows(key, place.offset + archive.begin, 0, rows, row_bytes, fill, frame))

    def add_object(self, key: str, index: Index, shards: Shape, value: Any) -> None:
        """Plan a Python object as Megatron's ShardedObject is written: a list of one, under key/shard_N_of, or of an
        expert N.M_of.of."""
        content = io.BytesIO()
        torch.save([value], content)
        file, place = self._append(len(content.getvalue()))
        file.pieces.append((place.offset, content.getvalue()))
        self._objects[f"{key}/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, shards))}"] = place

    def _append(self, length: int) -> tuple[FilePlan, Place]:
        if not self.files or self.files[-1].bytes >= self._file_bytes:
            self.files.append(FilePlan(f"__{len(self.files)}_0.distcp"))
        file = self.files[-1]
        place = Place(file.name, file.bytes, length)
        file.bytes += length
        return file, place

    def finish(self, folder: Path, common: dict[str, Any]) -> None:
        """Write the metadata, `common` (plain values and an argparse.Namespace of them) and, last, metadata.json."""
        torch.save(common, folder / _COMMON_FILE)
        (folder / _METADATA).write_bytes(_pickled(self._tensors, self._objects))
        backend = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (folder / _CONFIG).write_text(json.dumps(backend), encoding="utf-8")


def _printable(name: Any) -> str:
    if not isinstance(name, str) or not name.isprintable():
        raise ValueError(f"{ascii(name)[:80]} is no name")
    return name


def _read_place(info: Stub) -> Place:
    name = _printable(info.relative_path)
    if name in ("", ".", "..") or "/" in name:
        raise ValueError(f"{name}: a file must lie in the checkpoint's folder")
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"{name}: is compressed")
    offset, length = numbers((info.offset, info.length))
    return Place(name, offset, length)


def _read_tensor(key: str, entry: Stub, places: dict[tuple[str, Shape | None], Place]) -> _Tensor:
    """An entry of .metadata. Raises ValueError where its chunks do not fill it exactly, or their archives cannot."""
    dtype = entry.properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key}: {ascii(dtype)[:80]} where a dtype was due")
    shape, chunks = numbers(entry.size), []
    for box in stubs(entry.chunks):
        offset, extents = numbers(box.offsets), numbers(box.sizes)
        if not len(offset) == len(extents) == len(shape) or any(
            at + extent > whole for at, extent, whole in zip(offset, extents, shape, strict=True)
        ):
            raise ValueError(f"{key}: a chunk {list(extents)} at {list(offset)} lies outside {list(shape)}")
        if (key, offset) not in places:
            raise ValueError(f"{key}: its chunk at {list(offset)} lies nowhere")
        place = places[key, offset]
        if prod(extents) * dtype.itemsize > place.length:
            raise ValueError(f"{key}: a chunk {list(extents)} in {place.length} bytes")
        chunks.append(Chunk(offset, extents, place))
    if (held := sum(prod(chunk.shape) for chunk in chunks)) != prod(shape) or overlap(chunks):
        raise ValueError(f"{key}: its chunks hold {held} of {prod(shape)} values, or overlap")
    return _Tensor(shape, dtype, chunks)


class TorchDistReader(FolderFiles):
    """The tensors of one iteration's folder, whoever wrote it and however it is cut into chunks.

    Attributes:
        common: what the checkpoint holds beside tensors, see `common_state`.
        archives: every archive of the .distcp files, with the tensor or object that it holds a part of.

    Raises:
        CptainError: not a checkpoint, an incomplete one, one whose chunks do not make whole tensors, or one whose
        pickles ask for names that are not allowed.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if not (folder / _CONFIG).is_file():
            raise CptainError(f"{folder}: not a complete torch_dist checkpoint: it has no {_CONFIG}")
        if not (folder / _METADATA).is_file():
            raise CptainError(f"{folder}: not a complete torch_dist checkpoint: it has no {_METADATA}")
        try:
            backend = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CptainError(f"{folder / _CONFIG}: cannot be read: {one_line(error)}") from error
        if backend != "torch_dist":
            raise CptainError(f"{folder / _CONFIG}: sharded_backend is {ascii(backend)[:80]}, supported: torch_dist")
        try:
            self._read_metadata(load_pickle((folder / _METADATA).read_bytes()))
        except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
            raise CptainError(f"{folder / _METADATA}: cannot be read: {one_line(error)}") from error
        self._check_files()
        common = next((name for name in self._objects if name.startswith("common_state/")), _COMMON_FILE)
        if (folder / _COMMON_FILE).is_file():
            place = Place(_COMMON_FILE, 0, (folder / _COMMON_FILE).stat().st_size)
        elif common in self._objects:
            place = self._objects[common]
        else:
            raise CptainError(f"{folder}: not a complete torch_dist checkpoint: it has no {_COMMON_FILE}")
        self.common = self._object(common, place)

    def _read_metadata(self, metadata: Any) -> None:
        if not is_a(metadata, "Metadata"):
            raise ValueError("it holds no Metadata")
        places: dict[tuple[str, Shape | None], Place] = {}
        for index, info in metadata.storage_data.items():
            offset = getattr(index, "offset", None)  # an object's index has none
            offset = None if offset is None else numbers(offset)
            places[_printable(index.fqn), offset] = _read_place(info)
        if len(set(places.values())) < len(places):
            raise ValueError("two of its chunks or objects lie at one place")
        self.archives = {place: name for (name, _), place in places.items()}
        self._tensors: dict[str, _Tensor] = {}
        self._objects: dict[str, Place] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if is_a(entry, "BytesStorageMetadata"):
                if (place := places.get((_printable(key), None))) is None:
                    raise ValueError(f"{key}: lies nowhere")
                self._objects[key] = place
            elif not _printable(key).startswith(_NOT_THE_MODEL):
                self._tensors[key] = _read_tensor(key, entry, places)
        self._by_index: dict[str, dict[Index, list[Chunk]]] = {}
        self._found: dict[Place, SavedTensor] = {}
        self._sizes: dict[str, int] = {}
        for place in places.values():
            self._sizes[place.file] = max(self._sizes.get(place.file, 0), place.offset + place.length)

    def _check_files(self) -> None:
        for name, size in sorted(self._sizes.items()):
            file = self.folder / name
            try:
                if not file.is_file():
                    raise CptainError(f"{file}: missing, and {_METADATA} needs it: the checkpoint is incomplete")
                if file.stat().st_size < size:
                    raise CptainError(f"{file}: truncated: {file.stat().st_size} bytes where {_METADATA} needs {size}")
            except OSError as error:
                raise CptainError(f"{file}: cannot be read: {one_line(error)}") from error

    @contextmanager
    def _naming(self, place: Place, name: str) -> Iterator[None]:
        """Give an error of what is in an archive the file and the tensor or object."""
        try:
            yield
        except ValueError as error:
            raise CptainError(f"{self.folder / place.file}: {name}: {one_line(error)}") from error

    def _object(self, name: str, place: Place, whole: bool = False) -> Any:
        with self._naming(place, name):
            return SavedArchive(self.descriptor(place.file), place.offset, place.length, whole).content

    def check_objects(self) -> None:
        """Look through every pickle of the checkpoint, for Megatron itself will load them.

        Raises:
            CptainError: one asks for a name that is not allowed, or is damaged.
        """
        for name, place in self._objects.items():
            self._object(name, place, whole=True)
        for key, tensor in self._tensors.items():
            for chunk in tensor.chunks:
                self._find(key, tensor, chunk)

    def directory(self, place: Place) -> tuple[bytes, list[Member]]:
        """The directory of an archive, see `zip_directory`.

        Raises:
            CptainError: it has none.
        """
        with self._naming(place, self.archives[place]):
            return zip_directory(self.descriptor(place.file), place.offset, place.length)

    def names(self) -> list[str]:
        """The keys of the model's tensors: those of the optimizer, the schedule and the random states are left out."""
        return list(self._tensors)

    def shape(self, key: str) -> Shape:
        """A tensor's shape, vocabulary padding included."""
        return self._tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """A tensor's dtype."""
        return self._tensors[key].dtype

    def read(self, key: str, index: Index, first: int, stop: int, buffer: torch.Tensor) -> None:
        """Rows `first` to `stop` of a tensor, put together from its chunks. A single value is one row.

        Args:
            key: the tensor.
            index: where the tensor is stacked over layers, which, and over experts, which; the rows are those of the
                next dimension.
            first: the first row.
            stop: the row behind the last.
            buffer: a flat tensor of uint8, which they fill.

        Raises:
            CptainError: chunks that are not what the metadata says.
        """
        tensor, depth = self._tensors[key], len(index)
        target = buffer.view(tensor.dtype).reshape(stop - first, *tensor.shape[depth + 1 :])
        for chunk in self._chunks_of(key, index) if index else tensor.chunks:
            offset, shape = chunk.offset[depth:] or (0,), chunk.shape[depth:] or (1,)
            begin, end = max(first, offset[0]), min(stop, offset[0] + shape[0])
            if begin >= end or not prod(shape):
                continue
            box = (slice(at, at + extent) for at, extent in zip(offset[1:], shape[1:], strict=True))
            part = target[(slice(begin - first, end - first), *box)]
            before = 0
            for at, start, extent in zip(index, chunk.offset, chunk.shape, strict=False):
                before = before * extent + at - start
            rows = begin - offset[0] + before * shape[0]
            found = self._find(key, tensor, chunk)
            at = found.begin + rows * prod(shape[1:]) * tensor.dtype.itemsize
            whole = part if part.is_contiguous() else torch.empty(part.shape, dtype=part.dtype)
            self.read_member(whole.view(-1).view(torch.uint8), chunk.place.file, at, found.storage, key)
            if whole is not part:
                part.copy_(whole)

    def _chunks_of(self, key: str, index: Index) -> list[Chunk]:
        if key not in self._by_index:
            found: dict[Index, list[Chunk]] = {}
            for chunk in self._tensors[key].chunks:
                extents = list(zip(chunk.offset, chunk.shape, strict=True))[: len(index)]
                for one in product(*(range(at, at + extent) for at, extent in extents)):
                    found.setdefault(one, []).append(chunk)
            self._by_index[key] = found
        return self._by_index[key].get(index, [])

    def _find(self, key: str, tensor: _Tensor, chunk: Chunk) -> SavedTensor:
        """Where a chunk's values lie in its file."""
        place = chunk.place
        if (saved := self._found.get(place)) is not None:
            return saved
        with self._naming(place, key):
            archive = SavedArchive(self.descriptor(place.file), place.offset, place.length)
            saved = archive.find(archive.content)
            if (saved.shape, saved.dtype) != (chunk.shape, tensor.dtype):
                found = f"{list(saved.shape)} {saved.dtype}"
                raise ValueError(f"a chunk of {found} where {_METADATA} has {list(chunk.shape)} {tensor.dtype}")
        self._found[place] = saved
        return saved
