"""export: a checkpoint that training wrote → <run>/hf/iter_NNNNNNN, a Hugging Face model, streamed on the CPU in one
step.

Config, tokenizer and generation config are those of the model that the run began with; Megatron's vocabulary padding is
cut off. The weights keep the dtype they were trained in, and config.json says which.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from cptain.architecture import Architecture, model_folder, read_architecture, read_config
from cptain.atomic import atomic_folder, remove_stale_partials
from cptain.checkpoint.mapping import Rule, model_order, row_ranges, rules
from cptain.checkpoint.safetensors_folder import SafetensorsWriter
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


def check_checkpoint(reader: TorchDistReader, architecture: Architecture) -> None:
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


def hf_tensors(
    reader: TorchDistReader, architecture: Architecture, rule: Rule, layer: int
) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
    """The Hugging Face tensors of a rule's layer by name, each as consecutive rows."""
    if rule.layered:
        tensor = reader.read(rule.key, layer, layer + 1)[0]
        parts = rule.layout.parts(tensor, rule.hf_shapes(architecture), architecture)
        for name, part in zip(rule.hf_names(layer), parts, strict=True):
            yield name, iter([part])
        return
    ((name, shape),) = zip(rule.hf_names(0), rule.hf_shapes(architecture), strict=True)
    yield name, (reader.read(rule.key, *rows) for rows in row_ranges(shape, reader.dtype(rule.key)))


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


def export(run: RunFile, iteration: int | None = None, force: bool = False) -> Path:
    """Export an iteration of the run, unless that is done.

    Args:
        run: the run.
        iteration: which; None is the latest that training saved.
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
    with TorchDistReader(source) as reader:
        check_checkpoint(reader, architecture)
        remove_stale_partials(target.parent)
        if not force and target.exists() and target.stat().st_mtime_ns > (source / ".metadata").stat().st_mtime_ns:
            print(f"export: {target} is done and the checkpoint unchanged", file=sys.stderr)
            return target
        began = time.monotonic()
        dtype = reader.dtype(rules(architecture)[0].key)
        shapes = [
            tensor
            for rule, layer in model_order(architecture)
            for tensor in zip(rule.hf_names(layer), rule.hf_shapes(architecture), strict=True)
        ]
        total = sum(torch.Size(shape).numel() for _, shape in shapes) * dtype.itemsize
        with Progress("export", total, "B") as progress, atomic_folder(target) as partial:
            writer = SafetensorsWriter(partial, shapes, dtype)
            for rule, layer in model_order(architecture):
                for name, pieces in hf_tensors(reader, architecture, rule, layer):
                    writer.write(name, _counted(pieces, name, progress))
            writer.finish()
            _carry_over(base, partial, dtype)
        print(f"export: {human(total)}B in {duration(time.monotonic() - began)} → {target}", file=sys.stderr)
    return target


def _counted(pieces: Iterator[torch.Tensor], name: str, progress: Progress) -> Iterator[torch.Tensor]:
    for piece in pieces:
        yield piece
        progress.advance(piece.nbytes, name)
