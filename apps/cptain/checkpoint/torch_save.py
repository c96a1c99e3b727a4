"""Pickles and `torch.save` archives of a checkpoint, opened without running anything that they ask for.

A pickle runs code when it is loaded. Here every class and function that one names must be on a list, and all but plain
containers become inert stubs: a stub keeps what it was called with, and has no behaviour. What a pickle says is
therefore a tree of stubs, tuples, lists, dicts and plain values, which the caller checks before it believes it.

A `torch.save` archive is a zip file without compression: `<name>/data.pkl` is the pickle, in which a tensor names its
storage, and `<name>/data/<storage>` holds the storage's bytes.
"""

import io
import pickle
import pickletools
import signal
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from cptain.checkpoint.checksums import Member, Window, check_stored, located
from cptain.errors import one_line

_PIECE = 1 << 20  # bytes of a member that are checked at once


class Stub:
    """Stands in for what a pickle names: keeps its arguments and state, has no behaviour."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Stub":
        stub = super().__new__(cls)
        stub.__dict__.update(arguments=arguments, state=None)
        return stub

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __hash__(self) -> int:
        return id(self)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a {type(self).__name__} without {name}")


def is_a(value: Any, name: str) -> bool:
    """Whether a pickle called its value by this name; a class of Megatron's that derives from it has a longer one."""
    return isinstance(value, Stub) and type(value).__name__.endswith(name)


# Packages whose classes may be named. Functions would do things when Megatron itself loads the checkpoint.
_PACKAGES = ("megatron.", "nvidia_resiliency_ext.", "transformer_engine.", "torch.distributed.checkpoint.")


class _Getattr:
    """Stands in for getattr(class, name), as Python 3.11 before 3.11.4 pickles a member of an enum.

    What getattr really gives could lead to anything, so here it leads nowhere: it takes public names of Megatron's
    classes, and gives the name, which cannot be called, asked for more or given a state.
    """

    __slots__ = ()

    def __call__(self, owner: Any, name: Any) -> str:
        is_class = isinstance(owner, type) and f"{owner.__module__}.".startswith(_PACKAGES)
        if not is_class or not isinstance(name, str) or not name[:1].isalpha():
            raise pickle.UnpicklingError(f"it asks for {ascii(name)[1:-1][:80]} of {ascii(owner)[:80]}")
        return name

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it changes getattr")


# What runs nothing. These outlive the pickle, which may give a state to whatever it is handed: none can be changed.
_PLAIN: dict[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "getattr"): _Getattr(),
}
# Protocol 2, which torch.save uses, has Python 2's names.
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# What else torch, numpy and Megatron's saved arguments name.
_NAMES = {
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
    ("builtins", "bytearray"),
    ("builtins", "complex"),
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("signal", "Signals"),
    ("datetime", "datetime"),
    ("datetime", "timedelta"),
    ("_io", "BytesIO"),
    ("io", "BytesIO"),
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
}


class _Unpickler(pickle.Unpickler):
    """Hands out what nobody can change (builtin types, numbers, dtypes, `_Getattr`) or what is made for this call."""

    def find_class(self, module: str, name: str) -> Any:
        module = _PYTHON_2.get(module, module)
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(torch.__dict__.get(name), torch.dtype):
            return torch.__dict__[name]
        if module == "signal" and name in signal.Signals.__members__:
            return int(signal.Signals[name])  # how Python before 3.11.4 pickles them
        is_storage = module in ("torch", "torch.storage") and name.endswith("Storage") and name.isidentifier()
        is_class = all(part.lstrip("_")[:1].isupper() for part in name.split("."))
        if (module, name) in _NAMES or is_storage or (module.startswith(_PACKAGES) and is_class):
            return type(name, (Stub,), {"__module__": module})
        raise pickle.UnpicklingError(
            f"it asks for {ascii(module + '.' + name)[1:-1]}, which a checkpoint does not need"
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid


def load_pickle(data: bytes) -> Any:
    """What a pickle holds, as stubs, containers and plain values.

    Raises:
        ValueError: it asks for a name that is not on the list, or is no pickle. Whatever an unpickler can raise is in
        it.
    """
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # The unpickler allocates as much room as the highest place in its memo.
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
                raise ValueError(f"a pickle of {len(data)} bytes that asks for {argument} places")
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:
        raise ValueError(one_line(error)) from error


def numbers(values: Any) -> tuple[int, ...]:
    """Values that a file claims to be sizes, as a tuple of whole numbers from 0."""
    if not isinstance(values, tuple) or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError(f"{ascii(values)[:80]} where sizes were due")
    return values


def stubs(value: Any) -> Iterator[Stub]:
    """The stubs among the values of a list or tuple that a pickle holds; anything else there is refused.

    Raises:
        ValueError: not a list or tuple of stubs.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(one, Stub) for one in value):
        raise ValueError(f"{ascii(value)[:80]} where objects were due")
    yield from value


_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
}


@dataclass(frozen=True)
class SavedTensor:
    """A contiguous tensor in a `torch.save` archive: what it is, the byte of the file at which its values begin, and
    the storage that holds them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    storage: Member


class SavedArchive:
    """A `torch.save` archive at `offset` of a file, of `length` bytes, its storages left where they are.

    Args:
        whole: check the storages' checksums too, and not only those of the small members.

    Attributes:
        content: what its pickle holds, see `load_pickle`.

    Raises:
        ValueError: no such archive, or see `load_pickle`.
    """

    def __init__(self, descriptor: int, offset: int, length: int, whole: bool = False) -> None:
        self._descriptor, self._offset, self._length = descriptor, offset, length
        try:
            with zipfile.ZipFile(Window(descriptor, offset, length)) as archive:
                self._members: dict[str, list[zipfile.ZipInfo]] = {}
                for info in archive.infolist():  # whose names all begin with a folder of the archive's own
                    self._members.setdefault(info.filename.split("/", 1)[-1], []).append(info)
                for name in self._members:
                    if whole or not name.startswith("data/"):
                        self._check(archive, self._member(name))
                self.content = load_pickle(archive.read(self._member("data.pkl")))
        except Exception as error:
            raise ValueError(one_line(error)) from error

    def _member(self, name: str) -> zipfile.ZipInfo:
        found = self._members.get(name, [])
        if len(found) != 1:
            raise ValueError(f"it has {len(found)} members {ascii(name)[1:-1][:80]}")
        check_stored(found[0])
        return found[0]

    @staticmethod
    def _check(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        """Raise zipfile.BadZipFile where a member is not that of its CRC-32."""
        with archive.open(member) as content:
            while content.read(_PIECE):
                pass

    def find(self, tensor: Any) -> SavedTensor:
        """Where the values of a tensor of the content lie, without their being read.

        Raises:
            ValueError: not a tensor, or one that is not contiguous or lies outside the archive.
        """
        try:
            return self._find(tensor)
        except Exception as error:
            raise ValueError(one_line(error)) from error

    def _find(self, tensor: Any) -> SavedTensor:
        if is_a(tensor, "_rebuild_parameter"):
            tensor = tensor.arguments[0]
        if not is_a(tensor, "_rebuild_tensor_v2"):
            raise ValueError("it holds no tensor")
        (_, storage_type, name, *_), first, shape, stride = tensor.arguments[:4]
        storage = located(self._descriptor, self._offset, self._length, self._member(f"data/{name}"))
        dtype = _STORAGES.get(getattr(storage_type, "__name__", ""))
        if dtype is None:
            raise ValueError(f"a tensor of {ascii(storage_type)[:80]}")
        (first,), shape, stride = numbers((first,)), numbers(shape), numbers(stride)
        if any(
            extent > 1 and step != prod(shape[place + 1 :])
            for place, (extent, step) in enumerate(zip(shape, stride, strict=True))
        ):
            raise ValueError(f"a tensor of {list(shape)} that is not contiguous")
        if (first + prod(shape)) * dtype.itemsize > storage.end - storage.begin:
            raise ValueError("a storage that is smaller than its tensor")
        return SavedTensor(dtype, shape, storage.begin + first * dtype.itemsize, storage)


class _Storage:
    """Stands for a storage in a pickle that is written."""


class _SavedTensor:
    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        stride = tuple(prod(shape[place + 1 :]) for place in range(len(shape)))
        self._arguments: tuple[Any, ...] = (storage, 0, shape, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self._arguments


class _TensorPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, dtype: torch.dtype, values: int) -> None:
        super().__init__(file, protocol=2)
        storage = next(name for name, one in _STORAGES.items() if one == dtype)
        self._place = ("storage", getattr(torch, storage), "0", "cpu", values)

    def persistent_id(self, value: Any) -> Any:
        return self._place if isinstance(value, _Storage) else None


_ALIGNMENT = 64  # of a storage in its file, as torch.save has it


class TensorArchive:
    """The `torch.save` archive of a contiguous tensor around values that are written later.

    Format: PKWARE's APPNOTE.TXT 4.3, without 64-bit records; torch's are the members and their names.

    Attributes:
        begin: the byte of the archive at which the values begin.
        length: bytes of the archive, values included.

    Raises:
        ValueError: 2 GiB of values or more.
    """

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        pickled = io.BytesIO()
        _TensorPickler(pickled, dtype, prod(shape)).dump(_SavedTensor(_Storage(), shape))
        self._bytes = prod(shape) * dtype.itemsize
        if self._bytes >= 1 << 31:
            raise ValueError(f"{list(shape)} {dtype} is too much for one archive")
        self._small = {"data.pkl": pickled.getvalue(), "byteorder": b"little", "version": b"3\n"}
        local, _ = self._entries(0)
        self.begin = len(local)
        self.length = len(b"".join(content for _, content in self.frame(0))) + self._bytes

    def frame(self, checksum: int) -> list[tuple[int, bytes]]:
        """What stands before and behind values of this CRC-32, as (byte of the archive, content)."""
        local, directory = self._entries(checksum)
        behind = self.begin + self._bytes
        count = len(self._small) + 1
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), behind, 0)
        return [(0, local), (behind, directory + end)]

    def _entries(self, checksum: int) -> tuple[bytes, bytes]:
        """The members up to the values, which come last, and the directory of all."""
        local, directory = b"", b""
        members = [(name, content, zlib.crc32(content), len(content)) for name, content in self._small.items()]
        for name, content, crc, size in [*members, ("data/0", b"", checksum, self._bytes)]:
            encoded, extra = f"archive/{name}".encode(), b""
            if name == "data/0":
                gap = -(len(local) + 30 + len(encoded) + 4) % _ALIGNMENT
                extra = struct.pack("<2sH", b"FB", gap) + bytes(gap)
            common = struct.pack("<5H3I2H", 10, 0, 0, 0, 33, crc, size, size, len(encoded), len(extra))
            directory += (
                struct.pack("<4sH", b"PK\1\2", 10) + common[:-2] + struct.pack("<4H2I", 0, 0, 0, 0, 0, len(local))
            )
            directory += encoded
            local += b"PK\3\4" + common + encoded + extra + content
        return local, directory
