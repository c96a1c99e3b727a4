"""A Megatron checkpoint seen as the Hugging Face model that it holds: for export, verify and train."""

import re
from bisect import bisect_right
from collections.abc import Iterator
from math import prod

import torch

from cptain.checkpoint.common_state import saved_arguments, saved_iteration
from cptain.checkpoint.legacy import LegacyReader
from cptain.checkpoint.mapping import Index, Rule, Shape, model_order, rules
from cptain.checkpoint.release import SOURCE
from cptain.checkpoint.rows import Run, row_runs, runs_of_part
from cptain.checkpoint.streaming import Fill
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.errors import CptainError
from cptain.model.architecture import Architecture
from cptain.model.arguments import difference

_ITERATION = re.compile(r"iter_(\d{7,})")


def check_checkpoint(reader: TorchDistReader | LegacyReader, architecture: Architecture) -> None:
    """Refuse a checkpoint whose tensors are not those of the architecture, before anything is written.

    Raises:
        CptainError: a tensor missing, unknown, or of another shape; fewer rows than the vocabulary; see also
            `check_trained_as`.
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
    check_trained_as(reader, architecture)
    unknown = sorted(keys - {rule.key for rule in rules(architecture)} - {"output_layer.weight"})
    if unknown:
        raise CptainError(f"{reader.folder}: {unknown[0]}: a tensor that the Hugging Face model has no place for")


def check_trained_as(reader: TorchDistReader | LegacyReader, architecture: Architecture) -> None:
    """Refuse a checkpoint that says of itself that it is of another model, or of another iteration than its folder: of
    rope theta, the norm's epsilon and the like nothing shows in a tensor's shape.

    Raises:
        CptainError: names the key of config.json and both values. What another tool converted is not asked: it holds
            the arguments of that tool, which need not be those of the model.
    """
    folder, iteration = reader.folder, saved_iteration(reader.common)
    match = _ITERATION.fullmatch(folder.name)
    if match and iteration not in (None, int(match[1])):
        raise CptainError(f"{folder}: holds iteration {iteration}, not the one that the folder's name says")
    arguments = saved_arguments(reader.common)
    trained = bool(arguments.get("consumed_train_samples"))
    if (trained or (folder / SOURCE).is_file()) and (found := difference(arguments, architecture)):
        how = "trained" if trained else "converted"
        raise CptainError(
            f"{folder}: {how} as a model with {found}: give model.hf the config.json that it was {how} with"
        )


def fill_from_megatron(
    reader: TorchDistReader | LegacyReader, rule: Rule, index: Index, runs: list[Run], part: int, row_bytes: int
) -> Fill:
    """Where rows of a Hugging Face tensor, a part of one index of a rule, come from in the checkpoint."""
    runs = runs_of_part(runs, part)
    starts = [run.first for run in runs]

    def fill(first: int, stop: int, buffer: torch.Tensor) -> None:
        for run in runs[bisect_right(starts, first) - 1 :]:
            if run.first >= stop:
                return
            begin, end = max(first, run.first), min(stop, run.first + run.count)
            at, to = ((row - first) * row_bytes for row in (begin, end))
            source = run.row + begin - run.first
            reader.read(rule.key, index, source, source + end - begin, buffer[at:to])

    return fill


def hf_tensors(
    reader: TorchDistReader | LegacyReader, architecture: Architecture
) -> Iterator[tuple[str, Shape, torch.dtype, Fill]]:
    """The Hugging Face tensors that a checkpoint holds, in the order of a forward pass: names, shapes, dtypes, rows."""
    runs = {rule.key: row_runs(rule, architecture) for rule in rules(architecture)}
    for rule, index in model_order(architecture):
        dtype = reader.dtype(rule.key)
        for part, (name, shape) in enumerate(zip(rule.hf_names(index), rule.hf_shapes(architecture), strict=True)):
            row_bytes = prod(shape[1:]) * dtype.itemsize
            yield name, shape, dtype, fill_from_megatron(reader, rule, index, runs[rule.key], part, row_bytes)
