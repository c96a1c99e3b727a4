"""convert: a Hugging Face model → <run>/megatron/release, streamed on the CPU, without Megatron.

Megatron loads a `release` at any tensor, pipeline and context parallel size, starts it at iteration 0, and takes no
optimizer, schedule or random state from it. The embedding is written unpadded: Megatron fills the rows that its padded
vocabulary adds with zeros.
"""

import argparse
import json
import time
from math import prod
from pathlib import Path
from typing import Any

import torch

from cptain import __version__
from cptain.atomic import atomic_folder, remove_stale_partials
from cptain.checkpoint.mapping import extra_states, model_order, row_ranges, rules
from cptain.checkpoint.new_rows import ExtendedReader
from cptain.checkpoint.release import SOURCE, is_converted, source_of
from cptain.checkpoint.rows import Run, chunk_rows, overlapping, row_runs
from cptain.checkpoint.safetensors_folder import SafetensorsReader
from cptain.checkpoint.saved_files import write_record
from cptain.checkpoint.streaming import Fill, write_files
from cptain.checkpoint.torch_dist import TorchDistWriter
from cptain.checkpoint.tracker import RELEASE, write_tracker
from cptain.data.vocabulary import Extension, extended, extension_of, tokenizer_folder, write_extension
from cptain.errors import CptainError
from cptain.model.architecture import Architecture, model_folder, read_architecture
from cptain.model.arguments import saved_arguments
from cptain.progress import Progress, duration, human
from cptain.run_file import RunFile
from cptain.summary import say

_IGNORED = ("rotary_emb.inv_freq",)  # a buffer that old Llama checkpoints carry; it is computed


def check_tensors(reader: SafetensorsReader, architecture: Architecture) -> None:
    """Refuse a model whose tensors are not those of its config.json, before anything is written.

    Raises:
        CptainError: a tensor missing, unknown, or of another shape; parts of one Megatron tensor that differ in dtype.
    """
    names = set(reader.names())
    known: set[str] = set()
    for rule in rules(architecture):
        shapes = rule.hf_shapes(architecture)
        dtype = None
        for index in rule.indices(architecture):
            for name, shape in zip(rule.hf_names(index), shapes, strict=True):
                known.add(name)
                if name not in names:
                    raise CptainError(f"{reader.folder}: {name}: missing, and config.json needs it")
                if reader.shape(name) != shape:
                    found = list(reader.shape(name))
                    raise CptainError(f"{reader.folder}: {name}: shape {found} where config.json needs {list(shape)}")
                dtype = dtype or reader.dtype(name)
                if reader.dtype(name) != dtype:
                    raise CptainError(f"{reader.folder}: {name}: {reader.dtype(name)} where its neighbours are {dtype}")
    if architecture.tied_embeddings:
        known.add("lm_head.weight")  # a copy of the embedding that some tools write
    unknown = sorted(name for name in names - known if not name.endswith(_IGNORED))
    if unknown:
        raise CptainError(f"{reader.folder}: {unknown[0]}: a tensor that {len(known)} known ones do not include")


def _megatron_args(architecture: Architecture) -> argparse.Namespace:
    """The args that Megatron compares with its own when it loads, and restores under --use-checkpoint-args."""
    return argparse.Namespace(
        **saved_arguments(architecture),
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_interleaved=False,
        squared_relu=False,
        apply_query_key_layer_scaling=False,
        vocab_size=architecture.vocab_size,
        padded_vocab_size=architecture.vocab_size,
        ckpt_format="torch_dist",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        data_parallel_random_init=False,
        no_save_optim=True,
        no_save_rng=True,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
        iteration=0,
    )


def fill_from_hf(reader: SafetensorsReader, names: list[str], runs: list[Run], first_row: int, row_bytes: int) -> Fill:
    """Where rows of one index of a Megatron tensor, counted from `first_row`, come from in the model."""

    def fill(first: int, stop: int, buffer: torch.Tensor) -> None:
        for run, begin, end in overlapping(runs, first_row + first, first_row + stop):
            at, to = ((row - first_row - first) * row_bytes for row in (begin, end))
            source = run.first + begin - run.row
            reader.read(names[run.part], source, source + end - begin, buffer[at:to])

    return fill


def plan(reader: SafetensorsReader, architecture: Architecture) -> TorchDistWriter:
    """Every chunk of the checkpoint: a layer's or an expert's part of a Megatron tensor, or 256 MB of a larger one."""
    writer = TorchDistWriter(reader.bytes)
    runs = {rule.key: row_runs(rule, architecture) for rule in rules(architecture)}
    for rule, index in model_order(architecture):
        shape, names = rule.megatron_shape(architecture), rule.hf_names(index)
        dtype, row_shape = reader.dtype(names[0]), shape[len(index) + 1 :]
        for begin, height in chunk_rows(runs[rule.key], rule, architecture):
            for first, stop in row_ranges((height, *row_shape), dtype):
                offset = (*index, begin + first, *(0,) * len(row_shape))
                chunk = (*(1,) * len(index), stop - first, *row_shape)
                fill = fill_from_hf(reader, names, runs[rule.key], begin + first, prod(row_shape) * dtype.itemsize)
                writer.add_chunk(rule.key, shape, offset, chunk, dtype, stop - first, fill)
    for key, index, shards in extra_states(architecture):
        writer.add_object(key, index, shards, None)
    return writer


def complete(folder: Path, writer: TorchDistWriter, source: dict[str, Any], architecture: Architecture) -> None:
    """Make a folder that holds the files of a plan a checkpoint, and record what it was made of."""
    record = {"cptain": __version__, "source": source}
    (folder / SOURCE).write_text(json.dumps(record, indent=2), encoding="utf-8")
    common = {
        "args": _megatron_args(architecture),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
    }
    writer.finish(folder, common)


def _open(folder: Path, architecture: Architecture, extension: Extension | None) -> SafetensorsReader:
    """The base model, whose tensors are those of its config.json; with the rows of new tokens, where there are any."""
    reader = SafetensorsReader(folder)
    check_tensors(reader, architecture)
    if extension is None:
        return reader
    reader.close()
    return ExtendedReader(folder, extension)


def convert(run: RunFile, workers: int = 1, force: bool = False) -> bool:
    """Convert the run's Hugging Face model, unless that is done.

    Args:
        run: the run.
        workers: threads.
        force: convert again.

    Returns:
        Whether anything was written.

    Raises:
        CptainError: the model is not supported, or its weights are missing, damaged or not those of its config.json; or
            see `cptain.data.vocabulary.extension_of`.
    """
    folder, root = model_folder(run.model.hf), run.megatron_folder
    release = root / RELEASE
    base = read_architecture(folder)
    if run.model.vocabulary:
        tokenizer_folder(run)  # a model alone needs none
    extension = extension_of(run)
    architecture = extended(base, extension)
    with _open(folder, base, extension) as reader:
        source = source_of(folder, reader, extension)
        remove_stale_partials(root)
        if not force and is_converted(root, source):
            say(f"convert: {release} is done and the model unchanged", folder=release, written=False)
            return False
        began = time.monotonic()
        writer = plan(reader, architecture)
        with Progress("convert", reader.bytes, "B") as progress, atomic_folder(release) as partial:
            write_files(partial, writer.files, workers, progress.advance)
            if extension:
                write_extension(partial, extension)
            complete(partial, writer, source, architecture)
            write_record(partial)
        write_tracker(root, None)
        line = f"convert: {human(reader.bytes)}B in {duration(time.monotonic() - began)} → {release}"
        say(line, folder=release, written=True, bytes=reader.bytes)
    return True
