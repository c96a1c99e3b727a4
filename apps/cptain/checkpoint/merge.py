"""merge: the weighted average of several models of one shape, a few rows at a time.

Of every value the sum of weight times value, in fp64 and in the order in which the models are named, divided by the sum
of the weights, rounded to fp32 and then to the dtype that all of them have. A thread holds 1 MB of each kind of number
(some 15 MB), or a row where that is longer, whatever the size and the number of the models. A model is a Hugging Face
folder, or a checkpoint of a run, which is read as `export` would export it, and never written in between.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cptain.atomic import atomic_folder
from cptain.checkpoint.certificate import checkpoint_source, digest_of, model_source, write_certificate
from cptain.checkpoint.export import carried_files, config_json, is_done
from cptain.checkpoint.in_use import being_read
from cptain.checkpoint.legacy import is_legacy, open_megatron
from cptain.checkpoint.mapping import Shape
from cptain.checkpoint.model_card import MODEL_CARD, merged_card
from cptain.checkpoint.model_files import differences
from cptain.checkpoint.safetensors_folder import SafetensorsReader, SafetensorsWriter
from cptain.checkpoint.saved_files import compare_record
from cptain.checkpoint.streaming import Fill, write_files
from cptain.checkpoint.tensors import check_checkpoint, hf_tensors
from cptain.data.check import check_tokenizer
from cptain.data.vocabulary import run_architecture
from cptain.errors import CptainError, bad_usage
from cptain.model.architecture import model_folder
from cptain.progress import Progress, human
from cptain.run_file import CHECKPOINTS, load_run
from cptain.summary import say

_Tensor = tuple[Shape, torch.dtype, Fill]


@dataclass(frozen=True)
class _Model:
    """A model to merge.

    Attributes:
        folder: as it was named.
        weight: as it was given.
        tensors: shape, dtype and rows of each.
        beside: a folder with config.json and what else stands beside the weights.
        carried: those of its files that the merged model has too, config.json aside.
        licence: the folder whose card says the licence.
        source: hashes its files; see `cptain.checkpoint.certificate`.
        check: to be called once all was read.
    """

    folder: Path
    weight: float
    tensors: dict[str, _Tensor]
    beside: Path
    carried: list[Path]
    licence: Path
    source: Callable[[], dict[str, Any]]
    check: Callable[[int], None]


def read_weight(text: str) -> tuple[Path, float]:
    """MODEL or MODEL=WEIGHT; a folder of that whole name is a model of weight 1.

    Raises:
        CptainError: exit status 2, a weight that is no number over 0.
    """
    name, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text).absolute(), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        bad_usage(f"{text}: allowed: MODEL=WEIGHT with a weight over 0, such as {name or 'MODEL'}=0.5")
    return Path(name).absolute(), value


def _marks(folder: Path) -> dict[str, tuple[int, int, int]]:
    """By what a file that was written meanwhile is known, though its name is the same."""
    found = {file.name: file.stat() for file in folder.iterdir() if file.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


@contextmanager
def _opened(folder: Path, weight: float, workers: int) -> Iterator[_Model]:
    """A model, whose `check` also refuses what changed meanwhile: else its hash would not be that of what was read."""
    before = _marks(folder) if folder.is_dir() else {}
    with _found(folder, weight, workers) as model:

        def check(workers: int) -> None:
            model.check(workers)
            if changed := sorted(name for name, _ in before.items() ^ _marks(folder).items()):
                raise CptainError(f"merge: {folder / changed[0]}: changed while it was read: run it again")

        yield replace(model, check=check)


@contextmanager
def _found(folder: Path, weight: float, workers: int) -> Iterator[_Model]:
    if (folder / "config.json").is_file():
        with SafetensorsReader(folder) as reader:
            tensors: dict[str, _Tensor] = {
                name: (reader.shape(name), reader.dtype(name), partial(reader.read, name)) for name in reader.names()
            }
            carried = carried_files(folder, folder)
            source = partial(model_source, "merged model", folder, workers)
            yield _Model(folder, weight, tensors, folder, carried, folder, source, reader.check_members)
    elif (folder / ".metadata").is_file() or is_legacy(folder):
        with _checkpoint(folder, weight, workers) as model:
            yield model
    else:
        what = "neither a Hugging Face model (config.json) nor a checkpoint (.metadata)"
        raise CptainError(f"merge: {folder}: {what if folder.is_dir() else 'no such folder'}")


@contextmanager
def _checkpoint(folder: Path, weight: float, workers: int) -> Iterator[_Model]:
    """A checkpoint of a run, as `export` would export it."""
    run_file = folder.parent.parent / "run.toml"
    if folder.parent.name != CHECKPOINTS or not run_file.is_file():
        raise CptainError(
            f"merge: {folder}: not in the {CHECKPOINTS} folder of a run with its run.toml, which says what its config "
            "and tokenizer are: export it, and merge the export"
        )
    run = load_run(run_file)
    base, architecture = model_folder(run.model.hf), run_architecture(run)
    with (
        being_read(folder),
        open_megatron(folder) as reader,
        tempfile.TemporaryDirectory() as made,
    ):
        check_checkpoint(reader, architecture)
        compare_record("merge", reader)
        tensors = {name: (shape, dtype, fill) for name, shape, dtype, fill in hf_tensors(reader, architecture)}
        beside = Path(made)
        dtype = next(iter(tensors.values()))[1]
        (beside / "config.json").write_text(config_json(base, dtype, architecture), encoding="utf-8")
        carried = [Path(shutil.copy(file, beside)) for file in carried_files(base, check_tokenizer(run))]
        source = partial(checkpoint_source, "merged checkpoint", reader, workers)
        yield _Model(folder, weight, tensors, beside, carried, base, source, reader.check_members)


def _refuse_unlike(models: list[_Model]) -> torch.dtype:
    """Refuse models that are not of one shape; gives the dtype of all weights."""
    first = models[0]
    for other in models[1:]:
        pair = f"merge: {first.folder} and {other.folder}"
        if odd := sorted(first.tensors.keys() ^ other.tensors.keys()):
            raise CptainError(f"{pair}: {odd[0]} is in one of them alone")
        for name, (shape, dtype, _) in first.tensors.items():
            found = other.tensors[name]
            if found[:2] != (shape, dtype):
                kinds = " and ".join(f"{str(one[1])[6:]} {list(one[0])}" for one in ((shape, dtype), found))
                raise CptainError(f"{pair}: {name}: {kinds}")
        if lines := differences(first.beside, other.beside):
            more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
            raise CptainError(f"{pair}: {lines[0]}{more}")
    dtypes = {dtype for _, dtype, _ in first.tensors.values()}
    if len(dtypes) > 1:
        kinds = " and ".join(sorted(str(dtype)[6:] for dtype in dtypes))
        raise CptainError(f"merge: {first.folder}: its tensors are {kinds}: allowed: one dtype")
    return dtypes.pop()


def _averaged(name: str, models: list[_Model], dtype: torch.dtype) -> Fill:
    """Rows of the average of a tensor."""
    whole = sum(model.weight for model in models)

    def fill(first: int, stop: int, buffer: torch.Tensor) -> None:
        read, total = torch.empty_like(buffer), None
        for model in models:
            model.tensors[name][2](first, stop, read)
            values = read.view(dtype).double()
            if not values.isfinite().all():
                raise CptainError(f"merge: {model.folder}: {name}: has a value that is no finite number")
            values.mul_(model.weight)  # apart from the sum: one operation for both would round otherwise
            total = values if total is None else total.add_(values)
        assert total is not None
        buffer.view(dtype).copy_(total.div_(whole).float())

    return fill


def _check_target(target: Path, models: list[Path]) -> None:
    """Refuse to replace what is no model, or is one of the models."""
    if len(models) < 2:
        bad_usage("merge: allowed: two models or more")
    resolved = [model.resolve() for model in models]
    for place, model in enumerate(resolved):
        if model in resolved[:place]:
            bad_usage(f"merge: {models[place]} is named twice: give it one weight")
        if target.resolve() == model or model in target.resolve().parents or target.resolve() in model.parents:
            bad_usage(f"merge: {target} is, holds or lies in {models[place]}, which is merged: take another folder")
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not empty and not (target / "config.json").is_file():
        bad_usage(f"merge: {target}: is there, and no model: take another folder")


def merge(target: Path, named: list[tuple[Path, float]], workers: int, force: bool, shard_bytes: int) -> bool:
    """Average models into `target`, unless that is done.

    Args:
        target: the folder of the merged model.
        named: folders and weights.
        workers: threads.
        force: replace a model that is there.
        shard_bytes: no file of weights grows over this, unless by a single tensor.

    Returns:
        Whether anything was written.

    Raises:
        CptainError: a model that cannot be read, or is unlike the first; another model under that name.
    """
    torch.set_num_threads(1)  # each of our own takes other rows
    target = target.absolute()
    _check_target(target, [folder for folder, _ in named])
    with ExitStack() as stack:
        models = [stack.enter_context(_opened(folder, weight, workers)) for folder, weight in named]
        dtype = _refuse_unlike(models)
        first = models[0]
        writer = SafetensorsWriter(
            [(name, shape, _averaged(name, models, dtype)) for name, (shape, _, _) in first.tensors.items()],
            dtype,
            shard_bytes,
        )
        config = (first.beside / "config.json").read_text(encoding="utf-8")
        if (target / "config.json").is_file() and not force:
            if not is_done(target, first.carried, writer, config, workers):
                raise CptainError(f"merge: {target}: is there, and not what would be written: --force replaces it")
            for model in models:
                model.check(workers)
            say(f"merge: {target} is done: it is what would be written, bit for bit", folder=target, written=False)
            return False
        _write(target, models, writer, config, workers)
    line = f"merge: {human(writer.bytes)}B of {len(models)} models → {target}"
    say(line, folder=target, written=True, bytes=writer.bytes, models=len(models))
    return True


def _write(target: Path, models: list[_Model], writer: SafetensorsWriter, config: str, workers: int) -> None:
    made_of = [{**model.source(), "weight": model.weight} for model in models]
    rows = [(model.folder, model.weight, digest_of(one)) for model, one in zip(models, made_of, strict=True)]
    with Progress("merge", writer.bytes, "B") as progress, atomic_folder(target) as made:
        write_files(made, writer.files, workers, progress.advance)
        for model in models:
            model.check(workers)
        writer.finish(made)
        for file in models[0].carried:
            shutil.copyfile(file, made / file.name)
        (made / "config.json").write_text(config, encoding="utf-8")
        (made / MODEL_CARD).write_text(merged_card(target.name, models[0].licence, rows), encoding="utf-8")
        how = "tensors, shapes, dtypes, config.json, generation_config.json and tokenizer of all models; finite values"
        write_certificate(made, target, "merge", how, made_of, workers)
