"""Where a training begins: at the last whole checkpoint of the run, or at another run's or the converted one.

Megatron begins where the tracker says, and with no tracker begins again at step 0 and writes over what is there. A
process that is killed while it saves leaves a folder half-written, or whole and not yet named by the tracker; so the
folders are looked at, and the tracker is a hint.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptain.checkpoint.common_state import saved_arguments
from cptain.checkpoint.release import check_converted_from
from cptain.checkpoint.saved_files import bytes_to_check, check_archives, check_record, forget_later
from cptain.checkpoint.tensors import check_checkpoint
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.checkpoint.tracker import TRACKER, iteration_folder, read_tracker, write_tracker
from cptain.data.vocabulary import extension_of
from cptain.errors import CptainError, bad_usage
from cptain.model.architecture import Architecture, model_folder
from cptain.progress import Progress
from cptain.run_file import CHECKPOINTS, RunFile
from cptain.run_train import Branch

_THREADS = 16  # a disk has no more to give


@dataclass(frozen=True)
class Beginning:
    """Where a training begins.

    Attributes:
        source: the folder that is loaded.
        iteration: steps done before; None: the converted checkpoint, or another run's weights alone, are begun with.
        lines: what was passed over, and why.
        repair_tracker: the tracker names another iteration, or there is none.
        same_layout: it was saved with the run's tensor, pipeline and expert parallel sizes.
    """

    source: Path
    iteration: int | None
    lines: list[str]
    repair_tracker: bool = False
    same_layout: bool = True

    @property
    def steps_done(self) -> int:
        """0 where a run begins anew."""
        return self.iteration or 0


def beginning(run: RunFile, architecture: Architecture) -> Beginning:
    """Find where a training of the run begins, and check that checkpoint.

    Raises:
        CptainError: there is none, or it is not of this model; the tracker names one that is damaged, and none before
            it is whole.
    """
    root = run.checkpoints_folder
    named, unreadable = _named(root)
    there = sorted((int(name) for path in root.glob("iter_*") if (name := path.name[5:]).isdigit()), reverse=True)
    passed: list[str] = []
    for iteration in there if named is None else [named, *(one for one in there if one < named)]:
        try:
            reader = TorchDistReader(iteration_folder(root, iteration))
        except CptainError as error:
            passed.append(str(error))
            continue
        with reader:
            check_checkpoint(reader, architecture)
            reader.check_objects()
            same_layout = _same_layout(run, saved_arguments(reader.common))
        if iteration == named:
            later = [one for one in reversed(there) if one > iteration]
            return Beginning(reader.folder, iteration, _left_out(root, later), same_layout=same_layout)
        why = passed if named is not None else [str(unreadable or f"{root / TRACKER}: missing"), *passed]
        lines = [*why, f"continuing from {reader.folder}, the last whole checkpoint"]
        return Beginning(reader.folder, iteration, lines, repair_tracker=True, same_layout=same_layout)
    if named is not None:
        raise CptainError(passed[0])
    if unreadable and not passed:
        raise unreadable
    lines = [*passed, "beginning again: nothing was saved before it"] if passed else []
    if run.train.from_:
        return _branching(run, run.train.from_, architecture, lines)
    return Beginning(_check_converted(run, architecture), None, lines)


def branched_from(branch: Branch) -> Path:
    """The checkpoint that a run branches off at."""
    return iteration_folder(branch.run / CHECKPOINTS, branch.iteration)


def _branching(run: RunFile, branch: Branch, architecture: Architecture, lines: list[str]) -> Beginning:
    source = branched_from(branch)
    if not source.is_dir():
        there = ", ".join(sorted(path.name for path in source.parent.glob("iter_*"))) or "none"
        bad_usage(f"train.from: {source}: no such checkpoint (there: {there})")
    with TorchDistReader(source) as reader:
        check_checkpoint(reader, architecture)
        reader.check_objects()
        same_layout = _same_layout(run, saved_arguments(reader.common))
    return Beginning(source, branch.iteration if branch.optimizer else None, lines, same_layout=same_layout)


def check_files(folder: Path, node: int, nodes: int) -> list[str]:
    """Read the checkpoint that a training begins with, the optimizer's state too, and check every bit of it.

    Each node reads its share: a checkpoint of 70B is 1 TB. What it has read, its ranks may find in the node's memory.

    Args:
        folder: an iteration's.
        node: which of the `nodes`, from 0.
        nodes: how many train.

    Returns:
        What the user should know.

    Raises:
        CptainError: a bit is not what was written, or a file is of another iteration.
    """
    with TorchDistReader(folder) as reader:
        lines = check_record(reader, (node, nodes))
        with Progress("check the checkpoint", bytes_to_check(reader, (node, nodes)), "B") as progress:
            threads = min(_THREADS, len(os.sched_getaffinity(0)))
            check_archives(reader, (node, nodes), threads, progress.advance)
    return lines


def begin_from(run: RunFile, iteration: int | None, repair_tracker: bool) -> None:
    """Let the checkpoints' folder say where training begins: what was saved later is written again."""
    forget_later(run.checkpoints_folder, iteration or 0)
    if repair_tracker:
        write_tracker(run.checkpoints_folder, iteration)


def _left_out(root: Path, iterations: list[int]) -> list[str]:
    """What a training that was killed amid a save has left: folders that the tracker never named."""
    lines = []
    for iteration in iterations:
        try:
            TorchDistReader(iteration_folder(root, iteration)).close()
            lines.append(f"{iteration_folder(root, iteration)}: not named by {TRACKER}: left out, and written again")
        except CptainError as error:
            lines.append(f"{error}: left out, and written again")
    return lines


def _same_layout(run: RunFile, arguments: dict[str, Any]) -> bool:
    """Whether a checkpoint with these arguments was saved with the run's sizes."""
    sizes = {"tensor": run.parallel.tensor, "pipeline": run.parallel.pipeline}
    alike = all(arguments.get(f"{kind}_model_parallel_size") == size for kind, size in sizes.items())
    return alike and arguments.get("expert_model_parallel_size", 1) == run.parallel.expert


def _named(root: Path) -> tuple[int | None, CptainError | None]:
    """The iteration that the tracker names, and what is wrong with the tracker."""
    if not (root / TRACKER).exists():
        return None, None
    try:
        return read_tracker(root), None
    except CptainError as error:
        return None, error


def _check_converted(run: RunFile, architecture: Architecture) -> Path:
    root = run.megatron_folder
    try:
        iteration = read_tracker(root)
    except CptainError as error:
        raise CptainError(f"{error} (run convert first)") from error
    check_converted_from(root, model_folder(run.model.hf), extension_of(run))
    with TorchDistReader(iteration_folder(root, iteration)) as reader:
        check_checkpoint(reader, architecture)
        reader.check_objects()
    return reader.folder
