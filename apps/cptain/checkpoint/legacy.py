"""Megatron's legacy `torch` checkpoints, read without Megatron under the keys of a torch_dist checkpoint.

A folder mp_rank_TT or mp_rank_TT_PPP for every tensor- and pipeline-parallel rank, each with a model_optim_rng.pt: one
`torch.save` archive of a dict whose "model" maps names to that rank's tensors. Layers count from 0 on every pipeline
rank. Nothing says how a tensor was cut: that is Megatron's convention (`_CUT_COLUMNS`, `_WHOLE`), and a gated MLP's
linear_fc1 is a rank's gate rows, then its up rows.
"""

import os
import re
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch

from cptain.checkpoint.folder_files import FolderFiles
from cptain.checkpoint.mapping import Index, Shape
from cptain.checkpoint.rows import Run, overlapping
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.checkpoint.torch_save import SavedArchive, SavedTensor, Stub
from cptain.errors import CptainError, one_line

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_ANY_RANK = "mp_rank_*"
_LAYERS = "decoder.layers."
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

    Attributes:
        common: what a rank saved, see `common_state`.

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
        if not (self.folder / name).is_file():
            self.close()
            raise CptainError(f"{self.folder / name}: missing: the checkpoint is incomplete")
        try:
            descriptor = self.descriptor(name)
            archive = SavedArchive(descriptor, 0, os.fstat(descriptor).st_size)
            self.common = archive.content
            places = {key: archive.find(tensor) for key, tensor in _model(archive.content, sizes).items()}
        except (OSError, ValueError, RecursionError) as error:
            self.close()
            raise CptainError(f"{self.folder / name}: cannot be read: {one_line(error)}") from error
        for key, place in places.items():
            layer = 0
            if match := _LAYER.fullmatch(key):
                layer = begin + int(match[1])
                key = f"{_LAYERS}{_FUSED.get(match[2], match[2])}"
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
            count = self._layers if key.startswith(_LAYERS) else 1
            if (len(layers), max(layers)) != (count, count - 1):
                self._refuse(f"{key}: {len(layers)} of {count} layers have it")
            if {len(parts) for parts in layers.values()} != {ranks}:
                self._refuse(f"{key}: not every tensor-parallel rank has a part of it")
            kinds = {(place.shape, place.dtype) for parts in layers.values() for _, place in parts}
            if len(kinds) != 1:
                self._refuse(f"{key}: its parts differ in shape or dtype")
            shape = kinds.pop()[0]
            due = 2 if key.endswith((*_CUT_COLUMNS, _GATED)) else max(len(shape), 1)
            if len(shape) != due or 0 in shape or (key.endswith(_GATED) and shape[0] % 2):
                self._refuse(f"{key}: a part of shape {list(shape)}")

    def names(self) -> list[str]:
        """The keys of the model's tensors, as in a torch_dist checkpoint."""
        return list(self._parts)

    def shape(self, key: str) -> Shape:
        """A tensor's shape, its layers stacked and vocabulary padding included."""
        parts = self._parts[key][0]
        one = list(parts[0][1].shape)
        if not key.endswith(_WHOLE):
            one[1 if key.endswith(_CUT_COLUMNS) else 0] *= len(parts)
        return (self._layers, *one) if key.startswith(_LAYERS) else tuple(one)

    def dtype(self, key: str) -> torch.dtype:
        """A tensor's dtype."""
        return self._parts[key][0][0][1].dtype

    def read(self, key: str, index: Index, first: int, stop: int, buffer: torch.Tensor) -> None:
        """Rows `first` to `stop` of a tensor, put together from the tensor-parallel ranks' parts.

        Args:
            key: the tensor.
            index: where the tensor is stacked over layers, which; the rows are then those of dimension 1.
            first: the first row.
            stop: the row behind the last.
            buffer: a flat tensor of uint8, which they fill.

        Raises:
            CptainError: ranks that should have the same tensor and do not; a file that ends early.
        """
        if not index and key.startswith(_LAYERS):
            for number, one in zip(range(first, stop), buffer.view(stop - first, -1), strict=True):
                self.read(key, (number,), 0, self.shape(key)[1], one)
            return
        parts = self._parts[key][index[0] if index else 0]
        if key.endswith(_WHOLE):
            self._read_part(key, parts[0], first, buffer)
            for part in parts[1:]:
                other = torch.empty_like(buffer)
                self._read_part(key, part, first, other)
                if not torch.equal(buffer, other):
                    where = f" in layer {index[0]}" if index else ""
                    raise CptainError(f"{self.folder}: {key}: the tensor-parallel ranks differ{where}")
        elif key.endswith(_CUT_COLUMNS):
            columns = buffer.view(stop - first, len(parts), -1)
            for rank, part in enumerate(parts):
                rows = torch.empty_like(columns[:, rank], memory_format=torch.contiguous_format)
                self._read_part(key, part, first, rows.view(-1))
                columns[:, rank] = rows
        else:
            row_bytes = len(buffer) // (stop - first)
            for run, begin, end in overlapping(_row_cuts(key, len(parts), parts[0][1].shape[0]), first, stop):
                target = buffer[(begin - first) * row_bytes : (end - first) * row_bytes]
                self._read_part(key, parts[run.part], run.first + begin - run.row, target)

    def _read_part(self, key: str, part: tuple[str, SavedTensor], first: int, buffer: torch.Tensor) -> None:
        """Rows of one rank's part, from `first`, as many as the buffer holds."""
        name, place = part
        at = place.begin + first * prod(place.shape[1:]) * place.dtype.itemsize
        self.read_member(buffer, name, at, place.storage, key)


def _row_cuts(key: str, ranks: int, rows: int) -> list[Run]:
    """Where the ranks' rows, `rows` of each, lie in a tensor that is cut by rows."""
    halves = 2 if key.endswith(_GATED) else 1
    count = rows // halves
    return [
        Run((half * ranks + rank) * count, rank, half * count, count) for half in range(halves) for rank in range(ranks)
    ]


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
    if any(".experts." in str(name) for name in names):
        raise ValueError("a mixture of experts is read from torch_dist alone")
    for name in names:
        if not (isinstance(name, str) and name.isprintable() and isinstance(model[name], Stub)):
            raise ValueError(f"{ascii(name)[:80]}: not a tensor")
    return {name: model[name] for name in names}
