"""export: a checkpoint that training wrote → <run>/hf/iter_NNNNNNN, a Hugging Face model, streamed on the CPU in one
step.

Config, tokenizer and generation config are those of the model that the run began with; Megatron's vocabulary padding is
cut off. The weights keep the dtype they were trained in, and config.json says which.
"""

import json
import shutil
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from cptain.architecture import Architecture, model_folder, read_architecture, read_config
from cptain.atomic import atomic_folder, remove_stale_partials
from cptain.checkpoint.legacy import LegacyReader, open_megatron
from cptain.checkpoint.mapping import Rule, Shape, model_order, rules
from cptain.checkpoint.rows import Run, row_runs, runs_of_part
from cptain.checkpoint.safetensors_folder import SafetensorsWriter
from cptain.checkpoint.streaming import Fill, write_files
from cptain.checkpoint.torch_dist import TorchDistReader, iteration_folder, read_tracker
from cptain.data.manifest import read_manifest
from cptain.data.steps import train_steps
from cptain.errors import CptainError
from cptain.progress import Progress, duration, human
from cptain.run_file import RunFile

# Weights, and what is about the base model alone.
_LEFT_BEHIND = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pth",
    ".gguf",
    ".md",
    ".gitattributes",
)


def check_checkpoint(reader: TorchDistReader | LegacyReader, architecture: Architecture) -> None:
    """Refuse a checkpoint whose tensors are not those of the architecture, before anything is written.

    Raises:
        CptainError: a tensor missing, unknown, or of another shape; fewer rows than the vocabulary; more than one
        dtype.
    """
    keys = set(reader.names())
    for rule in rules(architecture):
        if rule.key not in keys:
            raise CptainError(f"{reader.folder}: {rule.key}: missing, and config.json needs it")
        expected, found = rule.megatron_shape(architecture), reader.shape(rule.key)
        padded = rule.has_vocabulary_rows and found[0] >= expected[0] and found[1:] == expected[1:]
        if found != expected and not padded:
            raise CptainError(
                f"{reader.folder}: {rule.key}: shape {list(found)} where config.json needs {list(expected)}"
            )
    unknown = sorted(keys - {rule.key for rule in rules(architecture)} - {"output_layer.weight"})
    if unknown:
        raise CptainError(f"{reader.folder}: {unknown[0]}: a tensor that the Hugging Face model has no place for")
    if len(dtypes := {reader.dtype(rule.key) for rule in rules(architecture)}) != 1:
        raise CptainError(f"{reader.folder}: its tensors have several dtypes: {', '.join(sorted(map(str, dtypes)))}")


def fill_from_megatron(
    reader: TorchDistReader | LegacyReader, rule: Rule, layer: int, runs: list[Run], part: int, row_bytes: int
) -> Fill:
    """Where rows of a Hugging Face tensor, a part of a rule's layer, come from in the checkpoint."""
    runs = runs_of_part(runs, part)
    starts = [run.first for run in runs]

    def fill(first: int, stop: int, buffer: torch.Tensor) -> None:
        for run in runs[bisect_right(starts, first) - 1 :]:
            if run.first >= stop:
                return
            begin, end = max(first, run.first), min(stop, run.first + run.count)
            at, to = ((row - first) * row_bytes for row in (begin, end))
            source = run.row + begin - run.first
            reader.read(rule.key, layer if rule.layered else None, source, source + end - begin, buffer[at:to])

    return fill


def hf_tensors(reader: TorchDistReader | LegacyReader, architecture: Architecture) -> Iterator[tuple[str, Shape, Fill]]:
    """The Hugging Face tensors that a checkpoint holds, in the order of a forward pass: names, shapes, and rows."""
    runs = {rule.key: row_runs(rule, architecture) for rule in rules(architecture)}
    for rule, layer in model_order(architecture):
        itemsize = reader.dtype(rule.key).itemsize
        for part, (name, shape) in enumerate(zip(rule.hf_names(layer), rule.hf_shapes(architecture), strict=True)):
            row_bytes = prod(shape[1:]) * itemsize
            yield name, shape, fill_from_megatron(reader, rule, layer, runs[rule.key], part, row_bytes)


def _carry_over(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy everything but weights, and set the dtype in config.json."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_LEFT_BEHIND):
            shutil.copyfile(file, target / file.name)
    config = read_config(source)
    for key in ("torch_dtype", "dtype"):  # transformers 4 and 5
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def final_iteration(run: RunFile) -> int:
    """The last step that the run file asks for.

    Raises:
        CptainError: training has not come so far.
    """
    steps = train_steps(run, read_manifest(run.data_folder, run.data.input))
    saved = read_tracker(run.checkpoints_folder)
    if saved != steps:
        raise CptainError(
            f"export: {run.checkpoints_folder} is at step {saved}, and the run has {steps}: "
            f"train continues it, and --iteration {saved} exports what there is"
        )
    return steps


def export(run: RunFile, iteration: int | None = None, workers: int = 1, force: bool = False) -> Path:
    """Export an iteration of the run, unless that is done.

    Args:
        run: the run.
        iteration: which; None is the latest that training saved.
        workers: threads.
        force: export again.

    Returns:
        The Hugging Face model's folder.

    Raises:
        CptainError: no such checkpoint, an incomplete one, or one that is not of the run's model.
    """
    base = model_folder(run.model.hf)
    architecture = read_architecture(base)
    if iteration is None:
        iteration = read_tracker(run.checkpoints_folder)
    source = iteration_folder(run.checkpoints_folder, iteration)
    if not source.is_dir():
        saved = ", ".join(sorted(path.name for path in run.checkpoints_folder.glob("iter_*"))) or "none"
        raise CptainError(f"{source}: no such checkpoint (there: {saved})")
    target = run.hf_folder / source.name
    with open_megatron(source) as reader:
        check_checkpoint(reader, architecture)
        remove_stale_partials(target.parent)
        if not force and target.exists() and target.stat().st_mtime_ns > reader.saved_at:
            print(f"export: {target} is done and the checkpoint unchanged", file=sys.stderr)
            return target
        began = time.monotonic()
        dtype = reader.dtype(rules(architecture)[0].key)
        writer = SafetensorsWriter(hf_tensors(reader, architecture), dtype)
        with Progress("export", writer.bytes, "B") as progress, atomic_folder(target) as partial:
            write_files(partial, writer.files, workers, progress.advance)
            writer.finish(partial)
            _carry_over(base, partial, dtype)
        print(f"export: {human(writer.bytes)}B in {duration(time.monotonic() - began)} → {target}", file=sys.stderr)
    return target
