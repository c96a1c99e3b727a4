"""verify: two checkpoints of any format, tensor by tensor and, where asked, by their logits.

A Hugging Face folder and a Megatron one (torch_dist, or the legacy torch) are compared under the Hugging Face names,
through the same rules that convert and export use; two of a kind under their own names. Equal means equal bits.
Vocabulary padding, which is Megatron's own, is left out.
"""

import os
import random
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import click
import torch

from cptain import __version__
from cptain.checkpoint.certificate import record_comparison
from cptain.checkpoint.legacy import LegacyReader, is_legacy, open_megatron
from cptain.checkpoint.mapping import Shape
from cptain.checkpoint.model_files import differences, dtype_differences
from cptain.checkpoint.new_rows import ExtendedReader, open_hf, rows_apart, told
from cptain.checkpoint.safetensors_folder import SafetensorsReader
from cptain.checkpoint.saved_files import compare_record
from cptain.checkpoint.streaming import Buffers, Fill, in_threads, same_bits
from cptain.checkpoint.tensors import check_checkpoint, hf_tensors
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.checkpoint.tracker import TRACKER, iteration_folder, read_tracker
from cptain.data.vocabulary import Extension, extended, read_extension
from cptain.errors import CptainError
from cptain.model.architecture import Architecture, read_architecture
from cptain.progress import Progress
from cptain.summary import tell

LOGITS_TOLERANCE = 1e-5  # of the largest logit, or of 1 where that is smaller: fp32's rounding through a model
_PIECE = 64 << 20  # bytes that a thread takes at once
_SAMPLE = 1 << 20
_SUBTRACTED = 1 << 20  # values subtracted at once, in fp64
_LAYER = re.compile(r"\.\d+\.")
_EXPORT = re.compile(r"iter_\d{7}")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of one side, as rows that can be read in any order."""

    shape: Shape
    dtype: torch.dtype
    rows: int
    fill: Fill


def _rows_of(reader: SafetensorsReader | TorchDistReader | LegacyReader, name: str) -> _Tensor:
    """A tensor under its own name; in a Megatron checkpoint, the first dimensions may be layers and experts."""
    shape, dtype = reader.shape(name), reader.dtype(name)
    if isinstance(reader, SafetensorsReader):
        return _Tensor(shape, dtype, prod(shape[:1]), partial(reader.read, name))
    if len(shape) < 3:
        return _Tensor(shape, dtype, prod(shape[:1]), partial(reader.read, name, ()))
    stacked, height, row_bytes = shape[:-2], shape[-2], shape[-1] * dtype.itemsize

    def fill(first: int, stop: int, buffer: torch.Tensor) -> None:
        for place in range(first // height, -(-stop // height)):
            begin, end = max(first, place * height), min(stop, (place + 1) * height)
            index = (place,) if len(stacked) == 1 else divmod(place, stacked[1])
            at, to = ((row - first) * row_bytes for row in (begin, end))
            reader.read(name, index, begin - place * height, end - place * height, buffer[at:to])

    return _Tensor(shape, dtype, prod(stacked) * height, fill)


def tensors(
    reader: SafetensorsReader | TorchDistReader | LegacyReader, architecture: Architecture | None = None
) -> dict[str, _Tensor]:
    """The tensors of a checkpoint by name: of a Megatron one by Hugging Face's, where the architecture is given.

    Raises:
        CptainError: a checkpoint that is not of the architecture.
    """
    if architecture is None or isinstance(reader, SafetensorsReader):
        return {name: _rows_of(reader, name) for name in reader.names()}
    check_checkpoint(reader, architecture)
    return {
        name: _Tensor(shape, dtype, shape[0], fill) for name, shape, dtype, fill in hf_tensors(reader, architecture)
    }


def _new_rows_apart(side: dict[str, _Tensor], extension: Extension | None) -> dict[str, _Tensor]:
    """The rows of new tokens as tensors of their own, where there are any: they differ, or the base's do."""
    if extension is None:
        return side
    return {
        apart: _Tensor((rows, *tensor.shape[1:]), tensor.dtype, rows, fill)
        for name, tensor in side.items()
        for apart, rows, fill in rows_apart(extension, name, tensor.rows, tensor.fill)
    }


@dataclass(frozen=True)
class Difference:
    """How a tensor of A differs from B's. `max_abs` and `mean_abs` are None where they cannot be subtracted."""

    name: str
    shape: str
    dtype: str
    max_abs: float | None
    mean_abs: float | None
    equal: bool


def resolve(folder: Path) -> Path:
    """The folder that holds the tensors: a checkpoint's root stands for its latest iteration.

    Raises:
        CptainError: not a checkpoint.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise CptainError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    if (folder / TRACKER).is_file():
        return iteration_folder(folder, read_tracker(folder))
    known = ("config.json", ".metadata", "metadata.json")
    if any((folder / name).is_file() for name in known) or is_legacy(folder):
        return folder
    raise CptainError(
        f"{folder}: neither a Hugging Face model (config.json) nor a torch_dist checkpoint (.metadata) "
        "nor a legacy one (mp_rank_*)"
    )


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _compare_rows(name: str, a: _Tensor, b: _Tensor, first: int, stop: int, buffers: Buffers) -> "_Part":
    """Compare rows that both have, a buffer's length at a time. A NaN on one side alone is an infinite difference."""
    sizes = [prod(side.shape) * side.dtype.itemsize // side.rows for side in (a, b)]
    part = _Part(name, bytes=(stop - first) * sum(sizes))
    for begin, end, pair in buffers.row_ranges(first, stop, max(sizes)):
        values = []
        for side, row_bytes, buffer in zip((a, b), sizes, pair, strict=True):
            values.append(buffer[: (end - begin) * row_bytes])
            side.fill(begin, end, values[-1])
        if a.dtype == b.dtype and same_bits(*values):
            continue
        part.equal = False
        for one, other in zip(
            values[0].view(a.dtype).split(_SUBTRACTED), values[1].view(b.dtype).split(_SUBTRACTED), strict=True
        ):
            difference = (one.double() - other.double()).abs().nan_to_num(nan=float("inf"))
            part.max_abs = max(part.max_abs, difference.max().item())
            part.sum_abs += difference.sum().item()
    return part


@dataclass
class _Part:
    """What was found in rows of a tensor."""

    name: str
    bytes: int
    equal: bool = True
    max_abs: float = 0.0
    sum_abs: float = 0.0


def _ranges(tensor: _Tensor, sample: bool) -> list[tuple[int, int]]:
    """The rows to compare: all, in pieces for several threads, or 1 MB at a place that is the same at every run."""
    row_bytes = max(1, prod(tensor.shape) * tensor.dtype.itemsize // max(1, tensor.rows))
    if not sample:
        step = max(1, _PIECE // row_bytes)
        return [(first, min(first + step, tensor.rows)) for first in range(0, tensor.rows, step)]
    count = min(tensor.rows, max(1, _SAMPLE // row_bytes))
    first = random.Random(str(tensor.shape)).randint(0, tensor.rows - count)
    return [(first, first + count)] if count else []


def compare_tensors(
    a: dict[str, _Tensor], b: dict[str, _Tensor], workers: int = 1, sample: bool = False
) -> list[Difference]:
    """Compare every tensor of either side, or 1 MB of each."""
    found: dict[str, _Part] = {}
    tasks, total = [], 0
    for name in a:
        if name in b and a[name].shape == b[name].shape and a[name].rows == b[name].rows:
            found[name] = _Part(name, 0, equal=a[name].dtype == b[name].dtype)
            for first, stop in _ranges(a[name], sample):
                tasks.append(partial(_compare_rows, name, a[name], b[name], first, stop))
                for side in (a[name], b[name]):
                    total += (stop - first) * (prod(side.shape) * side.dtype.itemsize // side.rows)
    with Progress("verify", total, "B") as progress, in_threads(tasks, workers, buffers=2) as parts:
        for part in parts:
            whole = found[part.name]
            whole.equal &= part.equal
            whole.max_abs, whole.sum_abs = max(whole.max_abs, part.max_abs), whole.sum_abs + part.sum_abs
            whole.bytes += part.bytes
            progress.advance(part.bytes, part.name)
    rows = [_difference(name, a[name], b[name], found.get(name)) for name in a if name in b]
    for letter, names in (("A", set(a) - set(b)), ("B", set(b) - set(a))):
        rows += [Difference(name, f"only in {letter}", "", None, None, False) for name in sorted(names)]
    return rows


def _difference(name: str, a: _Tensor, b: _Tensor, part: _Part | None) -> Difference:
    shape = str(list(a.shape)) if a.shape == b.shape else f"{list(a.shape)} ≠ {list(b.shape)}"
    names = [str(side.dtype).removeprefix("torch.") for side in (a, b)]
    dtype = names[0] if a.dtype == b.dtype else f"{names[0]} ≠ {names[1]}"
    if part is None:
        return Difference(name, shape, dtype, None, None, False)
    compared = part.bytes // (a.dtype.itemsize + b.dtype.itemsize)
    return Difference(name, shape, dtype, part.max_abs, part.sum_abs / max(1, compared), part.equal)


def _compare_logits(folders: list[Path], architecture: Architecture) -> dict[str, Any]:
    """The largest difference of the two sides' logits over the fixed prompts."""
    from cptain.checkpoint.logits import hf_logits, megatron_logits, prompt_tokens

    prompts = prompt_tokens(next(folder for folder in folders if _is_hf(folder)), architecture.vocab_size)
    a, b = ((hf_logits if _is_hf(folder) else megatron_logits)(folder, architecture, prompts) for folder in folders)
    columns = min(a[0].shape[1], b[0].shape[1])  # a base model has no logits of tokens that are new
    a, b = ([logits[:, :columns] for logits in side] for side in (a, b))
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


def _kinds(rows: list[Difference]) -> list[tuple[str, ...]]:
    """The table: one line for all layers' tensors of a kind; those that differ in shape or dtype have their own."""
    kinds: dict[tuple[str, str, str], list[Difference]] = {}
    for row in rows:
        kinds.setdefault((_LAYER.sub(".*.", row.name), row.shape, row.dtype), []).append(row)
    return [
        (name, shape, dtype, str(len(members)), *_figures(members, sum(member.equal for member in members)))
        for (name, shape, dtype), members in kinds.items()
    ]


def _figures(members: list[Difference], equal: int) -> tuple[str, str, str]:
    if equal == len(members):
        return "0", "0", str(equal)
    if any(member.max_abs is None for member in members):
        return "≠", "≠", str(equal)
    largest = max(member.max_abs or 0.0 for member in members)
    mean = sum(member.mean_abs or 0.0 for member in members) / len(members)
    return f"{largest:.3g}", f"{mean:.3g}", str(equal)


def _print_table(rows: list[Difference]) -> None:
    lines = [("tensor", "shape", "dtype", "tensors", "max |A−B|", "mean |A−B|", "equal"), *_kinds(rows)]
    different = [row for row in rows if not row.equal]
    if different:
        lines.append(("",) * 7)
        lines += [(row.name, row.shape, row.dtype, "1", *_figures([row], 0)[:2], "≠") for row in different]
    widths = [max(len(line[column]) for line in lines) for column in range(7)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _beside(folders: list[Path], sides: list[dict[str, _Tensor]]) -> list[str]:
    """How what stands beside the weights differs: of a Megatron checkpoint, the dtype alone is left to be compared."""
    if all(map(_is_hf, folders)):
        return differences(*folders)
    return [
        line
        for folder, side in zip(folders, sides, strict=True)
        if _is_hf(folder)
        for line in dtype_differences(folder, {tensor.dtype for tensor in side.values()})
    ]


def _open(
    folders: list[Path],
) -> tuple[list[SafetensorsReader | TorchDistReader | LegacyReader], Architecture | None, Extension | None]:
    """Both sides; the architecture that a Hugging Face one says; and which tokens are new, where a base model is
    compared with a checkpoint that was converted from it with new tokens: its side then has rows for them too."""
    found = next(filter(None, [read_extension(folder) for folder in folders if not _is_hf(folder)]), None)
    readers = [open_hf(folder, found) if _is_hf(folder) else open_megatron(folder) for folder in folders]
    for reader in readers:
        compare_record("verify", reader)
    architecture = next(iter([read_architecture(folder) for folder in folders if _is_hf(folder)]), None)
    extension = found if any(isinstance(reader, ExtendedReader) for reader in readers) else None
    return readers, extended(architecture, extension) if architecture else None, extension


def verify(a: Path, b: Path, logits: bool = False, workers: int = 1, sample: bool = False) -> None:
    """Compare two checkpoints and print the table.

    Beside an export that is compared with the checkpoint it came from, verify.json records the result.

    Args:
        a: a Hugging Face model, or a Megatron checkpoint or its root.
        b: likewise.
        logits: compare forward passes too.
        workers: threads.
        sample: compare 1 MB of each tensor; verify.json then says so.

    Raises:
        CptainError: a difference, or a side that cannot be read.
    """
    folders = [resolve(a), resolve(b)]
    readers, architecture, extension = _open(folders)
    if logits:
        _check_before_logits(readers, architecture)
    shared = None if all(map(_is_hf, folders)) else architecture
    began = time.monotonic()
    sides = [_new_rows_apart(tensors(reader, shared), extension) for reader in readers]
    rows = compare_tensors(sides[0], sides[1], workers, sample)
    for reader in readers:
        if not sample:  # which would read all of it
            reader.check_members(workers)
        reader.close()
    _print_table(rows)
    if extension:
        click.echo(f"\n{told(extension)}")
    beside = _beside(folders, sides)
    for line in ("", *beside) if beside else ():
        click.echo(line)
    equal = sum(row.equal for row in rows)
    click.echo(f"\n{equal} of {len(rows)} tensors bit-equal" + (", as far as 1 MB of each shows" if sample else ""))
    record: dict[str, Any] = {
        "cptain": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(time.monotonic() - began, 1),
        "sample": sample,
        "tensors": len(rows),
        "equal": equal,
        "different": [row.name for row in rows if not row.equal],
        "files": beside,
        "max_abs_difference": max((row.max_abs or 0.0 for row in rows), default=0.0),
    }
    if logits and architecture is not None:
        record["logits"] = result = _compare_logits(folders, architecture)
        click.echo(
            f"logits of {result['tokens']} tokens, fp32: max |A−B| {result['max_abs_difference']:.2g} "
            f"where the largest is {result['max_abs']:.3g}; {result['same_argmax']} of {result['tokens']} argmax alike"
        )
    for folder, other in (folders, folders[::-1]):
        if _is_hf(folder) and _EXPORT.fullmatch(folder.name) and other.name == folder.name:
            record_comparison(
                folder, {**record, "a": os.path.relpath(folders[0], folder), "b": os.path.relpath(folders[1], folder)}
            )
    tell(
        a=folders[0],
        b=folders[1],
        **{key: value for key, value in record.items() if key not in ("cptain", "time", "seconds")},
    )
    _verdict(len(rows) - equal, len(rows), beside, record.get("logits"))
    print(f"verify: equal{_not_compared(folders, sample)}", file=sys.stderr)


def _check_before_logits(
    readers: "list[SafetensorsReader | TorchDistReader | LegacyReader]", architecture: Architecture | None
) -> None:
    """Refuse what no logits can be computed of, and pickles that Megatron must not open."""
    if architecture is None:
        raise CptainError(
            "--logits: one side must be a Hugging Face model, whose config.json describes the architecture"
        )
    for reader in readers:
        if isinstance(reader, LegacyReader):
            raise CptainError(
                "--logits: not of a legacy torch checkpoint: its tensors can be compared, and its export's logits"
            )
        if isinstance(reader, TorchDistReader):
            reader.check_objects()


def _not_compared(folders: list[Path], sample: bool) -> str:
    """What "equal" does not say of two folders."""
    sampled = " as far as 1 MB of each tensor shows, of which no checksum was checked" if sample else ""
    one_is_hf = len({_is_hf(folder) for folder in folders}) == 2
    beside = "; a Megatron checkpoint holds no tokenizer and no generation_config.json: compare the export's with the "
    return sampled + (f"{beside}base model's" if one_is_hf else "")


def _verdict(different: int, tensors: int, beside: list[str], logits: dict[str, Any] | None) -> None:
    """Raise the first reason why two checkpoints are not equal."""
    if different:
        raise CptainError(f"verify: {different} of {tensors} tensors differ")
    if beside:
        more = f", and {len(beside) - 1} more" if len(beside) > 1 else ""
        raise CptainError(f"verify: the tensors are equal, and the files beside them are not: {beside[0]}{more}")
    if logits and not logits["equal"]:
        raise CptainError(
            f"verify: the logits differ by {logits['max_abs_difference']:.2g}, allowed {logits['tolerance']:.2g}"
        )
