"""The contents of a `.metadata` file of torch.distributed.checkpoint (DCP), pickled without that package.

Importing it takes half a second, a third of what a conversion of a small model takes to start. A pickle only names its
classes: those here have the names, the fields and the states of torch's own (torch/distributed/checkpoint/metadata.py
and filesystem.py, 2.6 to 2.13), and `dumps` writes them as if they were those.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"


@dataclass(frozen=True)
class MetadataIndex:
    """What is stored: an object's name; or a tensor's, and where in it a chunk begins."""

    __module__ = _METADATA
    fqn: str
    offset: torch.Size | None = None
    index: int | None = None


@dataclass
class ChunkStorageMetadata:
    """A box of a tensor."""

    __module__ = _METADATA
    offsets: torch.Size
    sizes: torch.Size


class _MemoryFormat:
    """torch.contiguous_format, which is member 0 of torch's enum."""

    def __reduce__(self) -> Any:
        return _MEM_FORMAT_ENCODING, (0,)


_MEM_FORMAT_ENCODING = type("_MEM_FORMAT_ENCODING", (), {"__module__": _METADATA})


@dataclass
class TensorProperties:
    """A contiguous tensor's dtype."""

    __module__ = _METADATA
    dtype: torch.dtype

    def __getstate__(self) -> Any:
        return self.dtype, torch.strided, False, _MemoryFormat(), False


@dataclass
class TensorStorageMetadata:
    """A tensor and its chunks."""

    __module__ = _METADATA
    properties: TensorProperties
    size: torch.Size
    chunks: list[ChunkStorageMetadata]


@dataclass
class BytesStorageMetadata:
    """An object."""

    __module__ = _METADATA


@dataclass
class _StorageInfo:
    """The bytes of a file."""

    __module__ = _FILESYSTEM
    relative_path: str
    offset: int
    length: int


@dataclass
class Metadata:
    """All tensors and objects, and where they are."""

    __module__ = _METADATA
    state_dict_metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata]
    planner_data: None
    storage_data: dict[MetadataIndex, _StorageInfo]
    storage_meta: None = None
    version: None = None


StorageInfo = _StorageInfo
_CLASSES: tuple[type, ...] = (
    MetadataIndex,
    ChunkStorageMetadata,
    _MEM_FORMAT_ENCODING,
    TensorProperties,
    TensorStorageMetadata,
    BytesStorageMetadata,
    StorageInfo,
    Metadata,
)


class _Pickler(pickle._Pickler):  # the one in Python, which can be told how to write a class
    def save_global(self: Any, obj: Any, name: str | None = None) -> None:
        if obj not in _CLASSES:
            super().save_global(obj, name)  # type: ignore[misc]
            return
        self.save(obj.__module__)
        self.save(obj.__name__)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)


def dumps(metadata: Metadata) -> bytes:
    """The content of a `.metadata` file."""
    content = io.BytesIO()
    _Pickler(content, protocol=4).dump(metadata)
    return content.getvalue()
