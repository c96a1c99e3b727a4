"""Megatron's legacy `torch` checkpoints, read without Megatron under the keys of a torch_dist checkpoint.

A folder mp_rank_TT or mp_rank_TT_PPP for every tensor- and pipeline-parallel rank, each with a model_optim_rng.pt: one
`torch.save` archive of a dict whose "model" maps names to that rank's tensors. Layers count from 0 on every pipeline
rank. Nothing says how a tensor was cut: that is Megatron's convention (`_CUT_COLUMNS`, `_WHOLE`), and a gated MLP's
linear_fc1 is a rank's gate rows, then its up rows.
"""

import os
import re
import zipfile
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch

from cptain.checkpoint.folder_files import FolderFiles
from cptain.checkpoint.mapping import Shape
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.checkpoint.torch_save import _STORAGES, SavedTensor, Stub, _member, _Window, is_a, load_pickle, numbers
from cptain.errors import CptainError, one_line

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_ANY_RANK = "mp_rank_*"
_FILE = "model_optim_rng.pt"
_LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)")
# The local layer spec's names for the norms that Transformer Engine fuses with what follows them.
_FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_CUT_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
_GATED = "linear_fc1.weight"
_WHOLE = ("norm.weight", "norm_weight")  # every rank has all of it; everything else is cut by rows


def is_legacy(folder: Path) -> bool:
    """Whether a folder holds a legacy checkpoint's iteration, complete or not."""
    return any(folder.glob(_ANY_RANK))


def open_megatron(folder: Path) -> "TorchDistReader | LegacyReader":
    """The reader of a Megatron checkpoint's iteration, of either format.

    Raises:
        CptainError: see the readers.
    """
    return LegacyReader(folder) if is_legacy(folder) else TorchDistReader(folder)


class LegacyReader(FolderFiles):
    """The model's tensors of one iteration, its ranks' parts put together and its layers stacked.

    Raises:
        CptainError: a rank's file missing, damaged or of another model than the rest; pickles that ask for names that
            are not allowed; what is not the state of a megatron.core GPT model with a gated MLP.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        names: dict[tuple[int, int], str] = {}
        for path in sorted(folder.glob(_ANY_RANK)):
            match = _RANK.fullmatch(path.name)
            if match is None:
                self._refuse(f"{path.name}: not mp_rank_TT or mp_rank_TT_PPP: expert parallel checkpoints are not read")
            names[int(match[2] or 0), int(match[1])] = f"{path.name}/{_FILE}"
        stages, ranks = (1 + max((place[axis] for place in names), default=0) for axis in (0, 1))
        # key → layers, or one → tensor-parallel ranks: (file, where in it)
        self._parts: dict[str, dict[int, list[tuple[str, SavedTensor]]]] = {}
        self._layers = 0
        for stage in range(stages):
            begin = self._layers
            for rank in range(ranks):
                if (stage, rank) not in names:
                    self._refuse(f"it has no mp_rank of tensor rank {rank}, pipeline rank {stage}: incomplete")
                self._add(names[stage, rank], rank, begin, (ranks, stages))
        self._check(ranks)

    def _refuse(self, what: str) -> NoReturn:
        self.close()
        raise CptainError(f"{self.folder}: not a legacy torch checkpoint that can be read: {what}")

    def _add(self, name: str, rank: int, begin: int, sizes: tuple[int, int]) -> None:
        """Add the tensors of one rank, whose first layer is the model's `begin`th."""
        try:
            descriptor = self.descriptor(name)
            with zipfile.ZipFile(_Window(descriptor, 0, os.fstat(descriptor).st_size)) as archive:
                saved = load_pickle(archive.read(_member(archive, "data.pkl")))
                tensors = _model(saved, sizes)
                places = {key: _place(archive, descriptor, tensor) for key, tensor in tensors.items()}
        except FileNotFoundError:
            self.close()
            raise CptainError(f"{self.folder / name}: missing: the checkpoint is incomplete") from None
        except Exception as error:  # whatever a hostile file makes zipfile raise is in it
            self.close()
            raise CptainError(f"{self.folder / name}: cannot be read: {one_line(error)}") from error
        for key, place in places.items():
            layer = 0
            if match := _LAYER.fullmatch(key):
                layer = begin + int(match[1])
                key = f"decoder.layers.{_FUSED.get(match[2], match[2])}"
                self._layers = max(self._layers, layer + 1)
            parts = self._parts.setdefault(key, {}).setdefault(layer, [])
            if len(parts) != rank:
                self._refuse(f"{key}: rank {rank} has a part, and {len(parts)} ranks before it")
            parts.append((name, place))

    def _check(self, ranks: int) -> None:
        """Every layer and rank must have a part of each tensor, of one shape and dtype."""
        if not self._parts:
            self._refuse("it holds no tensors of a model")
        for key, layers in self._parts.items():
            count = self._layers if key.startswith("decoder.layers.") else 1
            if (len(layers), max(layers)) != (count, count - 1):
                self._refuse(f"{key}: {len(layers)} of {count} layers have it")
            if {len(parts) for parts in layers.values()} != {ranks}:
                self._refuse(f"{key}: not every tensor-parallel rank has a part of it")
            kinds = {(place.shape, place.dtype) for parts in layers.values() for _, place in parts}
            if len(kinds) != 1:
                self._refuse(f"{key}: its parts differ in shape or dtype")
            shape = kinds.pop()[0]
            if (len(shape) != 2 and key.endswith((*_CUT_COLUMNS, _GATED))) or (key.endswith(_GATED) and shape[0] % 2):
                self._refuse(f"{key}: a part of shape {list(shape)}")

    @property
    def saved_at(self) -> int:
        """When the checkpoint was complete, in nanoseconds since the epoch."""
        return max(file.stat().st_mtime_ns for file in self.folder.glob(f"{_ANY_RANK}/{_FILE}"))

    def names(self) -> list[str]:
        """The keys of the model's tensors, as in a torch_dist checkpoint."""
        return list(self._parts)

    def shape(self, key: str) -> Shape:
        """A tensor's shape, its layers stacked and vocabulary padding included."""
        parts = self._parts[key][0]
        one = list(parts[0][1].shape)
        if not key.endswith(_WHOLE):
            one[1 if key.endswith(_CUT_COLUMNS) else 0] *= len(parts)
        return (self._layers, *one) if key.startswith("decoder.layers.") else tuple(one)

    def dtype(self, key: str) -> torch.dtype:
        """A tensor's dtype."""
        return self._parts[key][0][0][1].dtype

    def read(self, key: str, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `first` to `stop` along dimension 0 of a tensor: layers where they are stacked.

        Raises:
            CptainError: ranks that should have the same tensor and do not; a file that ends early.
        """
        stop = self.shape(key)[0] if stop is None else stop
        if key.startswith("decoder.layers."):
            return torch.stack([self._whole(key, layer) for layer in range(first, stop)])
        parts = self._parts[key][0]
        if key.endswith(_WHOLE):
            return self._whole(key, 0)[first:stop]
        rows = parts[0][1].shape[0]
        return torch.cat(
            [
                self._rows(*part, max(first - rank * rows, 0), min(stop - rank * rows, rows))
                for rank, part in enumerate(parts)
                if first < (rank + 1) * rows and stop > rank * rows
            ]
        )

    def _whole(self, key: str, layer: int) -> torch.Tensor:
        """One layer's tensor, put together from the tensor-parallel ranks' parts."""
        tensors = [self._rows(name, place, 0, place.shape[0]) for name, place in self._parts[key][layer]]
        if key.endswith(_WHOLE):
            if not all(torch.equal(tensors[0], tensor) for tensor in tensors):
                self._refuse(f"{key}: the tensor-parallel ranks differ in layer {layer}")
            return tensors[0]
        if key.endswith(_GATED):
            return torch.cat([half for place in (0, 1) for half in (tensor.chunk(2)[place] for tensor in tensors)])
        return torch.cat(tensors, dim=1 if key.endswith(_CUT_COLUMNS) else 0)

    def _rows(self, name: str, place: SavedTensor, first: int, stop: int) -> torch.Tensor:
        """Rows of one rank's part."""
        result = torch.empty((stop - first, *place.shape[1:]), dtype=place.dtype)
        offset = place.begin + first * prod(place.shape[1:]) * place.dtype.itemsize
        self.read_into(result.view(torch.uint8).flatten(), name, offset)
        return result


def _model(saved: Any, sizes: tuple[int, int]) -> dict[str, Any]:
    """The model's tensors in what a rank saved, by name. Raises ValueError where it is not a model that can be read."""
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        virtual = isinstance(saved, dict) and "model0" in saved
        raise ValueError("virtual pipeline stages are not read" if virtual else 'it has no "model"')
    model = saved["model"]
    if "language_model" in model:
        raise ValueError("it is of a model from before megatron.core (language_model), which is not read")
    args = saved.get("args")
    for kind, size in zip(("tensor", "pipeline"), sizes, strict=True):
        if (found := getattr(args, f"{kind}_model_parallel_size", size)) != size:
            raise ValueError(f"{kind} parallel size {ascii(found)[:80]}, where there are folders for {size}")
    if getattr(args, "swiglu", True) is not True:
        raise ValueError("its MLP is not gated")
    names = [name for name in model if not str(name).endswith("_extra_state")]
    if wrong := [name for name in names if not isinstance(name, str) or not isinstance(model[name], Stub)]:
        raise ValueError(f"{ascii(wrong[0])[:80]}: not a tensor")
    return {name: model[name] for name in names}


def _place(archive: zipfile.ZipFile, descriptor: int, tensor: Stub) -> SavedTensor:
    """Where the values of a tensor lie in the file, which is one archive. Raises ValueError where they do not."""
    if is_a(tensor, "_rebuild_parameter"):
        tensor = tensor.arguments[0]
    if not is_a(tensor, "_rebuild_tensor_v2"):
        raise ValueError(f"a {type(tensor).__name__} where a tensor was due")
    (_, storage_type, storage, *_), first, shape, stride = tensor.arguments[:4]
    dtype = _STORAGES.get(getattr(storage_type, "__name__", ""))
    if dtype is None:
        raise ValueError(f"a tensor of {ascii(storage_type)[:80]}")
    (first,), shape, stride = numbers((first,)), numbers(shape), numbers(stride)
    if not shape or stride != torch.empty(shape, device="meta").stride():
        raise ValueError(f"a tensor of {list(shape)} that is not contiguous")
    member = _member(archive, f"data/{storage}")
    if (first + prod(shape)) * dtype.itemsize > member.file_size:
        raise ValueError("a storage that is smaller than its tensor")
    header = os.pread(descriptor, 30, member.header_offset)
    if len(header) != 30 or header[:4] != b"PK\3\4":
        raise ValueError("a storage that lies outside its archive")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return SavedTensor(dtype, shape, member.header_offset + 30 + lengths + first * dtype.itemsize)
