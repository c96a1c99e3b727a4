"""Megatron's `torch_dist` checkpoints, written and read without Megatron, one tensor at a time.

A folder of torch.distributed.checkpoint (DCP) with Megatron's conventions:

- `.distcp` files are runs of `torch.save` archives, each found by (file, offset, length);
- `.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`: every tensor's shape, dtype and chunks,
  and where each chunk lies;
- `common.pt` (until 0.18) or the object `common_state/shard_0_1` holds everything that is no tensor: args, iteration;
- `metadata.json` names the backend. It is written last: a folder without it is not a checkpoint.

Megatron's own writer holds every tensor before it writes; this one appends chunks and keeps only their places. Pickles
run code when they are loaded, so `.metadata` is opened with an allow-list of names, and Megatron's
own classes become inert stubs.
"""

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cptain.atomic import write_text
from cptain.checkpoint.folder_files import FolderFiles
from cptain.checkpoint.mapping import Shape
from cptain.errors import CptainError, one_line

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_CONFIG = "metadata.json"
_COMMON_FILE = "common.pt"
_FILE_BYTES = 4 << 30  # a new .distcp file is begun over this


def iteration_folder(root: Path, iteration: int | None) -> Path:
    """The folder of an iteration, or of the release, under a checkpoint's root."""
    return root / (RELEASE if iteration is None else f"iter_{iteration:07d}")


def read_tracker(root: Path) -> int | None:
    """The latest iteration that a checkpoint's root says is complete; None for a release.

    Raises:
        CptainError: no tracker, or one that says neither.
    """
    file = root / TRACKER
    try:
        text = file.read_text(encoding="utf-8").strip()
        return None if text == RELEASE else int(text)
    except FileNotFoundError:
        raise CptainError(f"{file}: missing: there is no checkpoint in {root}") from None
    except (OSError, ValueError) as error:
        raise CptainError(f'{file}: must hold "{RELEASE}" or an iteration: {one_line(error)}') from error


def write_tracker(root: Path, iteration: int | None) -> None:
    """Say which iteration, or that the release, is complete."""
    write_text(root / TRACKER, RELEASE if iteration is None else str(iteration))


class TorchDistWriter:
    """Appends chunks of tensors to .distcp files in an existing folder; `finish` makes it a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, Any] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: Any = None
        self._files = 0

    def write_chunk(self, key: str, shape: Shape, offset: Shape, chunk: torch.Tensor) -> None:
        """Write `chunk`, which lies at `offset` in the tensor `key` of `shape`.

        Raises:
            ValueError: chunks of one tensor that differ in dtype.
        """
        if chunk.untyped_storage().nbytes() != chunk.numel() * chunk.element_size() or not chunk.is_contiguous():
            chunk = chunk.clone(memory_format=torch.contiguous_format)  # torch.save writes a view's whole storage
        entry = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(shape), [])
        )
        if entry.properties.dtype != chunk.dtype:
            raise ValueError(f"{key}: {chunk.dtype} after {entry.properties.dtype}")
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(chunk.shape)))
        self._append(MetadataIndex(key, torch.Size(offset)), chunk)

    def write_object(self, key: str, shard: int, shards: int, value: Any) -> None:
        """Write a Python object as Megatron's ShardedObject does: a list of one, under key/shard_N_of."""
        name = f"{key}/shard_{shard}_{shards}"
        self._tensors[name] = BytesStorageMetadata()
        self._append(MetadataIndex(name), [value])

    def _append(self, index: MetadataIndex, value: Any) -> None:
        if self._file is None or self._file.tell() >= _FILE_BYTES:
            self._close()
            self._file = open(self.folder / f"__0_{self._files}.distcp", "wb", buffering=1 << 20)  # noqa: SIM115
            self._files += 1
        begin = self._file.tell()
        torch.save(value, self._file)
        self._places[index] = _StorageInfo(Path(self._file.name).name, begin, self._file.tell() - begin)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, common: dict[str, Any]) -> None:
        """Write the metadata, `common` (plain values and an argparse.Namespace of them) and, last, metadata.json."""
        self._close()
        torch.save(common, self.folder / _COMMON_FILE)
        metadata = Metadata(state_dict_metadata=self._tensors, planner_data=None, storage_data=self._places)
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))
        backend = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (self.folder / _CONFIG).write_text(json.dumps(backend), encoding="utf-8")


class _Stub:
    """Stands in for a class of Megatron's in a pickle: keeps the state, has no behaviour."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __hash__(self) -> int:
        return id(self)


_DCP_METADATA = "torch.distributed.checkpoint.metadata"
_DCP_CLASSES = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
    _MEM_FORMAT_ENCODING,
)


def _enum_member(kind: Any, name: str) -> Any:
    """What `getattr` may do in a checkpoint's pickle: before 3.11.4, Python 3.11 pickles members of enums that way."""
    if isinstance(kind, type) and issubclass(kind, _Stub):
        return kind(name)
    if kind is _MEM_FORMAT_ENCODING:
        return _MEM_FORMAT_ENCODING[name]
    raise pickle.UnpicklingError(f"it asks for {name} of {kind}, which a checkpoint has no need of")


_ALLOWED: dict[tuple[str, str], Any] = {
    **{(_DCP_METADATA, kind.__name__): kind for kind in _DCP_CLASSES},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "getattr"): _enum_member,
    ("builtins", "set"): set,
}
_STUBBED = ("megatron.", "nvidia_resiliency_ext.", "transformer_engine.", "torch.distributed.checkpoint.")


class _SafeUnpickler(pickle.Unpickler):
    """Loads a checkpoint's pickles: `_ALLOWED` names, stubs for classes of `_STUBBED` packages, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith(_STUBBED):
            return type(name, (_Stub,), {"__module__": module})
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a checkpoint has no need of")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _torch_save_record(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A member of a `torch.save` archive, whose names all begin with a folder of their own."""
    for info in archive.infolist():
        if info.filename.split("/", 1)[-1] == name:
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            return info
    raise ValueError(f"it has no {name}")


class _TensorUnpickler(pickle.Unpickler):
    """The data.pkl of a `torch.save`d tensor, as (storage, offset, size, stride) with no tensor made."""

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name  # names the dtype; never called
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a tensor has no need of")


class _Window(io.RawIOBase):
    """Bytes `offset` to `offset + length` of a file, seekable, for zipfile; reads what it is asked for and no more."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._position = descriptor, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        room = max(0, min(len(buffer), self._length - self._position))
        count = os.preadv(self._descriptor, [memoryview(buffer)[:room]], self._offset + self._position) if room else 0
        self._position += count
        return count


_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
}


class TorchDistReader(FolderFiles):
    """The tensors of one iteration's folder, whoever wrote it and however it is cut into chunks.

    Raises:
        CptainError: not a checkpoint, an incomplete one, or one whose pickles ask for names that are not allowed.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if not (folder / _CONFIG).is_file():
            raise CptainError(f"{folder}: not a complete torch_dist checkpoint: it has no {_CONFIG}")
        try:
            self._metadata: Metadata = _SafeUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
            self._places: dict[MetadataIndex, _StorageInfo] = dict(self._metadata.storage_data)
            self._entries: dict[str, Any] = dict(self._metadata.state_dict_metadata)
            self._chunks: dict[str, list[tuple[Shape, Shape, _StorageInfo]]] = {}
            for key, entry in self._entries.items():
                if isinstance(entry, TensorStorageMetadata):
                    self._chunks[key] = [
                        (
                            tuple(chunk.offsets),
                            tuple(chunk.sizes),
                            self._places[MetadataIndex(key, torch.Size(chunk.offsets))],
                        )
                        for chunk in entry.chunks
                    ]
            files = self._file_sizes()
        except FileNotFoundError:
            raise CptainError(f"{folder}: not a complete torch_dist checkpoint: it has no .metadata") from None
        except (OSError, pickle.UnpicklingError, ValueError, KeyError, AttributeError, TypeError, EOFError) as error:
            raise CptainError(f"{folder}/.metadata: cannot be read: {one_line(error)}") from error
        for name, size in sorted(files.items()):
            file = folder / name
            if not file.is_file():
                raise CptainError(f"{file}: missing, and .metadata needs it: the checkpoint is incomplete")
            if file.stat().st_size < size:
                raise CptainError(f"{file}: truncated: {file.stat().st_size} bytes where .metadata needs {size}")

    def _file_sizes(self) -> dict[str, int]:
        """The bytes that each .distcp file must at least have."""
        sizes: dict[str, int] = {}
        for place in self._places.values():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"{place.relative_path}: a file must lie in the checkpoint's folder")
            if place.offset < 0 or place.length < 0:
                raise ValueError(f"{place.relative_path}: a negative offset or length")
            if getattr(place, "transform_descriptors", None):
                raise ValueError(f"{place.relative_path}: is compressed ({place.transform_descriptors})")
            sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
        return sizes

    @property
    def saved_at(self) -> int:
        """When the checkpoint was complete, in nanoseconds since the epoch."""
        return (self.folder / ".metadata").stat().st_mtime_ns

    def names(self) -> list[str]:
        """The keys of the model's tensors: those of the optimizer, the schedule and the random states are left out."""
        return [key for key in self._chunks if not key.startswith(("optimizer.", "chained_", "rng_state", "rerun_"))]

    def shape(self, key: str) -> Shape:
        """A tensor's shape, vocabulary padding included."""
        return tuple(self._entries[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """A tensor's dtype."""
        dtype: torch.dtype = self._entries[key].properties.dtype
        return dtype

    def read(self, key: str, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `first` to `stop` along dimension 0 of a tensor, put together from its chunks.

        Raises:
            CptainError: chunks that leave a hole, overlap or are not what the metadata says.
        """
        shape = self.shape(key)
        stop = shape[0] if stop is None else stop
        result = torch.empty((stop - first, *shape[1:]), dtype=self.dtype(key))
        filled = 0
        for offset, size, place in self._chunks[key]:
            begin, end = max(first, offset[0]), min(stop, offset[0] + size[0])
            if begin >= end:
                continue
            target = result[
                (
                    slice(begin - first, end - first),
                    *(slice(at, at + extent) for at, extent in zip(offset[1:], size[1:], strict=True)),
                )
            ]
            self._read_chunk(key, place, size, begin - offset[0], target)
            filled += target.numel()
        if filled != result.numel():
            raise CptainError(f"{self.folder}: {key}: its chunks hold {filled} of {result.numel()} values")
        return result

    def _read_chunk(self, key: str, place: _StorageInfo, size: Shape, first: int, target: torch.Tensor) -> None:
        """Rows from `first` of a chunk of `size` into `target`."""
        descriptor = self.descriptor(place.relative_path)
        file = self.folder / place.relative_path
        try:
            with zipfile.ZipFile(_Window(descriptor, place.offset, place.length)) as archive:
                pickled = archive.read(_torch_save_record(archive, "data.pkl"))
                storage, begin, saved_size, stride = _TensorUnpickler(io.BytesIO(pickled)).load()
                _, storage_type, name, _, _ = storage
                member = _torch_save_record(archive, f"data/{name}")
            if tuple(saved_size) != size or _STORAGES.get(storage_type) != target.dtype:
                raise ValueError(f"a chunk of {saved_size} {storage_type} where .metadata has {size} {target.dtype}")
            if tuple(stride) != torch.empty(size, device="meta").stride():
                raise ValueError("a chunk that is not contiguous")
            (name_length, extra_length) = struct.unpack(
                "<HH", os.pread(descriptor, 4, place.offset + member.header_offset + 26)
            )
            row = torch.Size(size[1:]).numel()
            element = target.element_size()
            offset = (begin + first * row) * element
            if offset + target.numel() * element > member.file_size:
                raise ValueError("a storage that is smaller than its tensor")
            start = place.offset + member.header_offset + 30 + name_length + extra_length + offset
            if start + target.numel() * element > place.offset + place.length:
                raise ValueError("a storage that lies outside its archive")
        except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, TypeError, struct.error, EOFError) as error:
            raise CptainError(f"{file}: {key}: {one_line(error)}") from error
        contiguous = (
            target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        )
        self.read_into(contiguous.view(torch.uint8).flatten(), place.relative_path, start)
        if contiguous is not target:
            target.copy_(contiguous)
