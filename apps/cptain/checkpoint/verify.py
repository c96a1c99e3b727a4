"""verify: two checkpoints of either format, tensor by tensor and, where asked, by their logits.

A Hugging Face folder and a torch_dist folder are compared under the Hugging Face names, through the same rules that
convert and export use; two of a kind under their own names. Equal means equal bits. Vocabulary padding, which is
Megatron's own, is left out.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import torch

from cptain import __version__, atomic
from cptain.architecture import Architecture, read_architecture, read_config
from cptain.checkpoint.export import check_checkpoint
from cptain.checkpoint.mapping import Rule, Shape, model_order, row_ranges
from cptain.checkpoint.safetensors_folder import SafetensorsReader
from cptain.checkpoint.torch_dist import TRACKER, TorchDistReader, iteration_folder, read_tracker
from cptain.errors import CptainError
from cptain.progress import Progress

LOGITS_TOLERANCE = 1e-5  # of the largest logit, or of 1 where that is smaller: fp32's rounding through a model
_EXPORT = re.compile(r"iter_\d{7}")


class _Tensors(Protocol):
    """What a comparison needs of a checkpoint."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> Shape: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str, first: int = 0, stop: int | None = None) -> torch.Tensor: ...


class _AsHuggingFace:
    """A torch_dist checkpoint under the Hugging Face names of an architecture."""

    def __init__(self, reader: TorchDistReader, architecture: Architecture) -> None:
        check_checkpoint(reader, architecture)
        self._reader, self._architecture = reader, architecture
        self._places: dict[str, tuple[Rule, int, int]] = {}
        for rule, layer in model_order(architecture):
            for part, name in enumerate(rule.hf_names(layer)):
                self._places[name] = (rule, layer, part)
        self._held: tuple[tuple[str, int], list[torch.Tensor]] | None = None  # one rule's layer: its parts come in turn

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> Shape:
        rule, _, part = self._places[name]
        return rule.hf_shapes(self._architecture)[part]

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(self._places[name][0].key)

    def read(self, name: str, first: int = 0, stop: int | None = None) -> torch.Tensor:
        rule, layer, part = self._places[name]
        if not rule.layered:
            return self._reader.read(rule.key, first, self.shape(name)[0] if stop is None else stop)
        if self._held is None or self._held[0] != (rule.key, layer):
            tensor = self._reader.read(rule.key, layer, layer + 1)[0]
            self._held = (
                (rule.key, layer),
                rule.layout.parts(tensor, rule.hf_shapes(self._architecture), self._architecture),
            )
        return self._held[1][part][first:stop]


@dataclass(frozen=True)
class Difference:
    """One row of the table: how a tensor of A differs from B's. `max_abs` is None where they cannot be subtracted."""

    name: str
    shape: str
    dtype: str
    max_abs: float | None
    equal: bool


def resolve(folder: Path) -> Path:
    """The folder that holds the tensors: a checkpoint's root stands for its latest iteration.

    Raises:
        CptainError: not a checkpoint of either format.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise CptainError(f"{folder}: no such folder")
    if (folder / TRACKER).is_file():
        return iteration_folder(folder, read_tracker(folder))
    if (folder / "config.json").is_file() or (folder / ".metadata").is_file() or (folder / "metadata.json").is_file():
        return folder
    raise CptainError(f"{folder}: neither a Hugging Face model (config.json) nor a torch_dist checkpoint (.metadata)")


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def compare_tensor(name: str, a: _Tensors, b: _Tensors) -> Difference:
    """Compare one tensor that both have, a piece at a time. A NaN on one side alone is an infinite difference."""
    shape_a, shape_b, dtype_a, dtype_b = a.shape(name), b.shape(name), a.dtype(name), b.dtype(name)
    shape = str(list(shape_a)) if shape_a == shape_b else f"{list(shape_a)} ≠ {list(shape_b)}"
    names = [str(dtype).removeprefix("torch.") for dtype in (dtype_a, dtype_b)]
    dtype = names[0] if dtype_a == dtype_b else f"{names[0]} ≠ {names[1]}"
    if shape_a != shape_b:
        return Difference(name, shape, dtype, None, False)
    equal, largest = dtype_a == dtype_b, 0.0
    for first, stop in row_ranges(shape_a, dtype_a):
        piece_a, piece_b = a.read(name, first, stop), b.read(name, first, stop)
        if dtype_a == dtype_b and torch.equal(_bits(piece_a), _bits(piece_b)):
            continue
        difference = (piece_a.double() - piece_b.double()).abs().nan_to_num(nan=float("inf"))
        if difference.numel():
            largest = max(largest, difference.max().item())
        equal = False
    return Difference(name, shape, dtype, largest, equal)


def compare_tensors(a: _Tensors, b: _Tensors) -> list[Difference]:
    """Compare every tensor of either side."""
    names_a, names_b = a.names(), set(b.names())
    both = [name for name in names_a if name in names_b]
    rows = []
    with Progress("verify", len(both), "tensor") as progress:
        for name in both:
            rows.append(compare_tensor(name, a, b))
            progress.advance(1, name)
    for side, names in (("A", set(names_a) - names_b), ("B", names_b - set(names_a))):
        rows += [Difference(name, f"only in {side}", "", None, False) for name in sorted(names)]
    return rows


def _compare_logits(folders: list[Path], architecture: Architecture) -> dict[str, Any]:
    """The largest difference of the two sides' logits over the fixed prompts."""
    from cptain.checkpoint.logits import hf_logits, megatron_logits, prompt_tokens

    prompts = prompt_tokens(next(folder for folder in folders if _is_hf(folder)), architecture.vocab_size)
    a, b = (
        hf_logits(folder, prompts) if _is_hf(folder) else megatron_logits(folder, architecture, prompts)
        for folder in folders
    )
    difference = max(float(abs(one - other).max()) for one, other in zip(a, b, strict=True))
    largest = max(float(abs(one).max()) for one in a)
    same = sum(int((one.argmax(1) == other.argmax(1)).sum()) for one, other in zip(a, b, strict=True))
    return {
        "tokens": sum(len(ids) for ids in prompts),
        "max_abs_difference": difference,
        "max_abs": largest,
        "same_argmax": same,
        "tolerance": LOGITS_TOLERANCE * max(1.0, largest),
        "equal": difference <= LOGITS_TOLERANCE * max(1.0, largest),
    }


def _print_table(rows: list[Difference]) -> None:
    header = ("tensor", "shape", "dtype", "max |A−B|")
    cells = [
        (row.name, row.shape, row.dtype, "0" if row.equal else "≠" if row.max_abs is None else f"{row.max_abs:.3g} ≠")
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(4)]
    for line in [header, *cells]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def verify(a: Path, b: Path, logits: bool = False) -> None:
    """Compare two checkpoints and print the table.

    Beside an export that is compared with the checkpoint it came from, verify.json records the result.

    Args:
        a: a Hugging Face model, or a torch_dist checkpoint or its root.
        b: likewise.
        logits: compare forward passes too.

    Raises:
        CptainError: a difference, or a side that cannot be read.
    """
    folders = [resolve(a), resolve(b)]
    readers = [SafetensorsReader(folder) if _is_hf(folder) else TorchDistReader(folder) for folder in folders]
    for folder in filter(_is_hf, folders):
        read_config(folder)
    architecture = next((read_architecture(folder) for folder in folders if _is_hf(folder)), None)
    if logits and architecture is None:
        raise CptainError(
            "--logits: one side must be a Hugging Face model, whose config.json describes the architecture"
        )
    sides: list[_Tensors] = list(readers)
    if architecture is not None and not all(map(_is_hf, folders)):
        sides = [
            _AsHuggingFace(reader, architecture) if isinstance(reader, TorchDistReader) else reader
            for reader in readers
        ]
    if logits:
        for reader in readers:
            if isinstance(reader, TorchDistReader):
                reader.check_objects()
    rows = compare_tensors(*sides)
    for reader in readers:
        reader.close()
    _print_table(rows)
    equal = sum(row.equal for row in rows)
    click.echo(f"\n{equal} of {len(rows)} tensors bit-equal")
    record: dict[str, Any] = {
        "cptain": __version__,
        "a": str(folders[0]),
        "b": str(folders[1]),
        "tensors": len(rows),
        "equal": equal,
        "different": [row.name for row in rows if not row.equal],
    }
    if logits and architecture is not None:
        record["logits"] = result = _compare_logits(folders, architecture)
        click.echo(
            f"logits of {result['tokens']} tokens, fp32: max |A−B| {result['max_abs_difference']:.2g} "
            f"where the largest is {result['max_abs']:.3g}; {result['same_argmax']} of {result['tokens']} argmax alike"
        )
    for folder, other in (folders, folders[::-1]):
        if _is_hf(folder) and _EXPORT.fullmatch(folder.name) and other.name == folder.name:
            atomic.write_json(folder / "verify.json", record)
    if equal != len(rows):
        raise CptainError(f"verify: {len(rows) - equal} of {len(rows)} tensors differ")
    if logits and not record["logits"]["equal"]:
        raise CptainError(
            f"verify: the logits differ by {record['logits']['max_abs_difference']:.2g}, "
            f"allowed {record['logits']['tolerance']:.2g}"
        )
    print("verify: equal", file=sys.stderr)
