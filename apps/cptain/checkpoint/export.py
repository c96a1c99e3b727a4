"""export: a checkpoint that training wrote → <run>/hf/iter_NNNNNNN, a Hugging Face model, streamed on the CPU in one
step.

Config and generation config are those of the model that the run began with, tokenizer and chat template those that it
trained with; Megatron's vocabulary padding is cut off. The weights keep the dtype they were trained in unless another
is asked for, and config.json says which, in the words of transformers 4 and of 5.
"""

import filecmp
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cptain.atomic import atomic_folder, remove_stale_partials
from cptain.checkpoint.certificate import (
    FILE,
    checkpoint_source,
    file_source,
    has_certificate,
    model_source,
    write_certificate,
)
from cptain.checkpoint.in_use import being_read
from cptain.checkpoint.legacy import LegacyReader, is_legacy, open_megatron
from cptain.checkpoint.mapping import rules
from cptain.checkpoint.model_card import MODEL_CARD, model_card
from cptain.checkpoint.safetensors_folder import SafetensorsWriter
from cptain.checkpoint.saved_files import RECORD, compare_record
from cptain.checkpoint.streaming import Fill, write_files
from cptain.checkpoint.tensors import check_checkpoint, hf_tensors
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.checkpoint.tracker import RELEASE, iteration_folder, read_tracker
from cptain.data.check import check_tokenizer
from cptain.data.manifest import FILE_NAME as MANIFEST
from cptain.data.manifest import read_manifest
from cptain.data.steps import train_steps
from cptain.data.tokenizer import is_tokenizer_file
from cptain.data.vocabulary import extension_of, run_architecture
from cptain.errors import CptainError
from cptain.model.architecture import Architecture, model_folder, read_config
from cptain.model.families import FAMILIES
from cptain.progress import Progress, duration, human
from cptain.run_file import CHECKPOINTS, RunFile
from cptain.summary import say, tell, under

# What is carried over from the base model, its tokenizer aside: generation config, licences; never weights in any
# format, hidden files or what is about the base model alone.
_CARRIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", "LICENSE", "LICENCE", "NOTICE")
_LEFT_BEHIND = ("config.json", "trainer_state.json", FILE, MODEL_CARD)
_CHECKED = (
    "export",
    "the CRC-32 of all that was read of the checkpoint; its files with its checksums.json, where it has one",
)
SHARD_BYTES = 5 * 10**9  # as transformers has it


def _rounded(name: str, fill: Fill, before: torch.dtype, after: torch.dtype) -> Fill:
    """Rows of a tensor in another dtype."""

    def converted(first: int, stop: int, buffer: torch.Tensor) -> None:
        target = buffer.view(after)
        values = torch.empty(len(target) * before.itemsize, dtype=torch.uint8)
        fill(first, stop, values)
        target.copy_(values.view(before))
        if after == torch.float16 and not (target.isfinite() | ~values.view(before).isfinite()).all():
            raise CptainError(f"export: {name}: has values that float16 cannot hold: use --dtype bfloat16 or float32")

    return fill if before == after else converted


def config_json(base: Path, dtype: torch.dtype, architecture: Architecture) -> str:
    """The base's config.json with the model's vocab_size, and with dtype, rotation and number of experts in the words
    of transformers 4 and of 5: either would take its default, without a word, for a key that only the other has."""
    config = read_config(base)
    config["vocab_size"] = architecture.vocab_size
    if family := FAMILIES[config["architectures"][0]].experts:
        config |= dict.fromkeys(family.count, architecture.experts)
    config["torch_dtype"] = config["dtype"] = str(dtype).removeprefix("torch.")
    rope: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    theta = config.get("rope_theta") or rope.pop("rope_theta", architecture.rotary_base)
    rope.pop("rope_theta", None)
    config["rope_theta"] = theta
    config["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
    config["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **rope}
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def carried_files(base: Path, tokenizer: Path) -> list[Path]:
    """The files that an export has too: the tokenizer's of its folder, and others of the base model's."""
    others = [
        file
        for file in base.iterdir()
        if file.name.endswith(_CARRIED)
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")
        and file.name not in _LEFT_BEHIND
        and not is_tokenizer_file(file.name)
    ]
    return sorted(file for file in [*others, *_tokenizer_files(tokenizer)] if file.is_file())


def _tokenizer_files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if is_tokenizer_file(file.name)]


def iterations(run: RunFile, which: int | str) -> list[int | None]:
    """The iterations that `--iteration` means; None is a release.

    Args:
        run: the run.
        which: a number; "latest", the last that is complete; "final", the last step that the run file asks for, an
            error until training reaches it; "all", every one that is complete.

    Raises:
        CptainError: there is none.
    """
    root = run.checkpoints_folder
    if which == "latest":
        return [read_tracker(root)]
    if which == "final":
        return [_final_iteration(run)]
    if which != "all":
        return [int(which)]
    found: list[int | None] = []
    for folder in sorted(root.glob("iter_*")):
        if (folder / "metadata.json").is_file() or is_legacy(folder):
            found.append(int(folder.name.removeprefix("iter_")))
        else:
            print(f"export: {folder}: incomplete, left out", file=sys.stderr)
    if not found:
        raise CptainError(f"{root}: no complete checkpoint in it")
    return found


def _final_iteration(run: RunFile) -> int:
    steps = train_steps(run, read_manifest(run.data_folder, run.data.sources))
    saved = read_tracker(run.checkpoints_folder)
    if saved != steps:
        raise CptainError(
            f"export: {run.checkpoints_folder} is at step {saved}, and the run has {steps}: "
            f"train continues it, and --iteration {saved} exports what there is"
        )
    return steps


def export(
    run: RunFile,
    iteration: int | None,
    workers: int = 1,
    force: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> bool:
    """Export an iteration of the run, unless that is done.

    Args:
        run: the run.
        iteration: which; None is a release.
        workers: threads.
        force: export again.
        dtype: of the weights; None leaves them as they were trained.
        shard_bytes: no file of weights grows over this, unless by a single tensor.

    Returns:
        Whether anything was written.

    Raises:
        CptainError: no such checkpoint, an incomplete one, one that is not of the run's model, a larger tokenizer, or
            another vocabulary than it was trained with.
    """
    base = model_folder(run.model.hf)
    carried = carried_files(base, check_tokenizer(run))
    architecture = run_architecture(run)
    source = iteration_folder(run.checkpoints_folder, iteration)
    if not source.is_dir():
        saved = ", ".join(sorted(path.name for path in run.checkpoints_folder.glob("iter_*"))) or "none"
        raise CptainError(f"{source}: no such checkpoint (there: {saved})")
    target = run.hf_folder / source.name
    with being_read(source), open_megatron(source) as reader:
        check_checkpoint(reader, architecture)
        compare_record("export", reader)
        remove_stale_partials(target.parent)
        found = {reader.dtype(rule.key) for rule in rules(architecture)}
        if dtype is None and len(found) > 1:
            names = ", ".join(sorted(str(one).removeprefix("torch.") for one in found))
            raise CptainError(f"{source}: its tensors are {names}: choose one with --dtype")
        dtype = dtype or found.pop()
        tensors = hf_tensors(reader, architecture)
        writer = SafetensorsWriter(
            [(name, shape, _rounded(name, fill, before, dtype)) for name, shape, before, fill in tensors],
            dtype,
            shard_bytes,
        )
        config = config_json(base, dtype, architecture)
        if not force and is_done(target, carried, writer, config, workers):
            reader.check_members(workers)
            if not has_certificate(target):  # written by an earlier version
                write_certificate(target, target, *_CHECKED, _sources(run, base, reader, workers), workers)
            say(f"export: {target} is done: it is what would be written, bit for bit", folder=target, written=False)
            return False
        began = time.monotonic()
        card = (b"" if force else _card_there(target)) or model_card(run, base, iteration, extension_of(run)).encode()
        texts = {"config.json": config.encode(), MODEL_CARD: card}
        _write(target, reader, writer, workers, carried, texts, _sources(run, base, reader, workers))
        line = f"export: {human(writer.bytes)}B in {duration(time.monotonic() - began)} → {target}"
        say(line, folder=target, written=True, bytes=writer.bytes)
    return True


def _sources(run: RunFile, base: Path, reader: TorchDistReader | LegacyReader, workers: int) -> list[dict[str, Any]]:
    """What an export is made of: the base model, which is read whole once a command, the checkpoint, and, where they
    are still there, what training began with and the manifest of the data."""
    found = [model_source("base model", base, workers), checkpoint_source("checkpoint", reader, workers)]
    branch = run.train.from_
    root, iteration = (branch.run / CHECKPOINTS, branch.iteration) if branch else (run.megatron_folder, None)
    begun = iteration_folder(root, iteration)
    if (begun / RECORD).is_file():
        with TorchDistReader(begun) as beginning:
            found.append(checkpoint_source("begun with", beginning, workers))
    manifest = run.data_folder / MANIFEST
    return [*found, file_source("data", manifest)] if manifest.is_file() else found


def _card_there(target: Path) -> bytes:
    """The card of an earlier export, which may have been edited."""
    try:
        return (target / MODEL_CARD).read_bytes()
    except FileNotFoundError:
        return b""


def _write(
    target: Path,
    reader: TorchDistReader | LegacyReader,
    writer: SafetensorsWriter,
    workers: int,
    carried: list[Path],
    texts: dict[str, bytes],
    sources: list[dict[str, Any]],
) -> None:
    """Write an export whole: the weights, the files that are carried over, those of its own by name, and a certificate
    that it was made of `sources`."""
    with Progress("export", writer.bytes, "B") as progress, atomic_folder(target) as partial:
        write_files(partial, writer.files, workers, progress.advance)
        reader.check_members(workers)
        writer.finish(partial)
        for file in carried:
            shutil.copyfile(file, partial / file.name)
        for name, content in texts.items():
            (partial / name).write_bytes(content)
        write_certificate(partial, target, *_CHECKED, sources, workers)


def export_all(which: list[int | None], one: Callable[[int | None], bool]) -> bool:
    """Export several iterations; one that cannot be is named, and the others are exported all the same.

    Returns:
        Whether anything was written.

    Raises:
        CptainError: one could not be exported.
    """
    errors: list[CptainError] = []
    written = False
    for iteration in which:
        with under("iterations", RELEASE if iteration is None else str(iteration)):
            try:
                written |= one(iteration)
            except CptainError as error:
                errors.append(error)
                tell(error=str(error))
                if len(which) > 1:
                    print(f"export: {error}", file=sys.stderr)
    if errors:
        raise (
            errors[0]
            if len(which) == 1
            else CptainError(f"export: {len(errors)} of {len(which)} could not be exported")
        )
    return written


def is_done(target: Path, carried: list[Path], writer: SafetensorsWriter, config: str, workers: int) -> bool:
    """Whether what would be written is there. What does not differ at once is read whole."""
    try:
        unchanged = (target / "config.json").read_text(encoding="utf-8") == config and (target / MODEL_CARD).exists()
        unchanged &= all(filecmp.cmp(file, target / file.name, shallow=False) for file in carried)
        unchanged &= {file.name for file in _tokenizer_files(target)} <= {file.name for file in carried}
        if not unchanged:
            return False
        with Progress("is it done", writer.bytes, "B") as progress:
            return writer.is_written(target, workers, progress.advance)
    except OSError:
        return False
