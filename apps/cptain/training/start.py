"""Where a training begins: at the last whole checkpoint of the run, or at the converted one.

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
from cptain.checkpoint.tensors import check_checkpoint
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.checkpoint.tracker import TRACKER, iteration_folder, read_tracker
from cptain.errors import CptainError
from cptain.model.architecture import Architecture, model_folder
from cptain.progress import Progress
from cptain.run_file import RunFile

_THREADS = 16  # a disk has no more to give


@dataclass(frozen=True)
class Beginning:
    """Where a training begins.

    Attributes:
        iteration: steps done before; None: the converted checkpoint is begun with.
        lines: what was passed over, and why.
        repair_tracker: the tracker names another iteration, or there is none.
        same_layout: it was saved with the run's tensor and pipeline parallel sizes.
    """

    iteration: int | None
    lines: list[str]
    repair_tracker: bool = False
    same_layout: bool = True

    @property
    def steps_done(self) -> int:
        """0 with the converted checkpoint."""
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
            same_layout = _sizes(saved_arguments(reader.common)) == (run.parallel.tensor, run.parallel.pipeline)
        if iteration == named:
            later = [one for one in reversed(there) if one > iteration]
            return Beginning(iteration, _left_out(root, later), same_layout=same_layout)
        why = passed if named is not None else [str(unreadable or f"{root / TRACKER}: missing"), *passed]
        lines = [*why, f"continuing from {reader.folder}, the last whole checkpoint"]
        return Beginning(iteration, lines, repair_tracker=True, same_layout=same_layout)
    if named is not None:
        raise CptainError(passed[0])
    if unreadable and not passed:
        raise unreadable
    _check_converted(run, architecture)
    return Beginning(None, [*passed, "beginning again: nothing was saved before it"] if passed else [])


def check_weights(run: RunFile, iteration: int | None) -> None:
    """Read the model's weights of the checkpoint that a training begins with, and check them.

    Of the optimizer's state, six times as much, nothing is read.

    Raises:
        CptainError: a bit is not what was written.
    """
    root = run.megatron_folder if iteration is None else run.checkpoints_folder
    folder = iteration_folder(root, read_tracker(root) if iteration is None else iteration)
    with TorchDistReader(folder) as reader, Progress("check the weights", reader.bytes, "B") as progress:
        reader.check_tensors(min(_THREADS, len(os.sched_getaffinity(0))), progress.advance)


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


def _sizes(arguments: dict[str, Any]) -> tuple[Any, Any]:
    return arguments.get("tensor_model_parallel_size"), arguments.get("pipeline_model_parallel_size")


def _named(root: Path) -> tuple[int | None, CptainError | None]:
    """The iteration that the tracker names, and what is wrong with the tracker."""
    if not (root / TRACKER).exists():
        return None, None
    try:
        return read_tracker(root), None
    except CptainError as error:
        return None, error


def _check_converted(run: RunFile, architecture: Architecture) -> None:
    root = run.megatron_folder
    try:
        iteration = read_tracker(root)
    except CptainError as error:
        raise CptainError(f"{error} (run convert first)") from error
    with TorchDistReader(iteration_folder(root, iteration)) as reader:
        check_checkpoint(reader, architecture)
        reader.check_objects()
    check_converted_from(root, model_folder(run.model.hf))
