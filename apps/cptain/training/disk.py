"""How much of a disk a run's checkpoints take, and how much is free where they land."""

import math
import shutil
from pathlib import Path

from cptain.checkpoint.tracker import iteration_folder, read_tracker
from cptain.errors import CptainError
from cptain.model.architecture import Architecture
from cptain.model.sizes import parameters
from cptain.run_file import RunFile


def is_here(path: Path) -> bool:
    """Whether the disk that a path is on is seen: its first two folders are there, such as /gs/bs or /home/me."""
    folder = Path(*path.parts[: min(3, len(path.parts) - 1)])
    return folder != Path("/") and folder.is_dir()


def free_bytes(path: Path) -> int | None:
    """What is free on the disk that a path is on, quotas apart; None where that disk is not seen from here."""
    if not is_here(path):
        return None
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(there).free


def checkpoint_bytes(run: RunFile, architecture: Architecture) -> int:
    """A checkpoint: as large as the last one saved, else what its tensors take.

    Those are the weights and, in fp32, the optimizer's own weights and Adam's two moments; where the weights are in
    fp32 themselves, the optimizer has none of its own.
    """
    try:
        if iteration := read_tracker(run.checkpoints_folder):
            folder = iteration_folder(run.checkpoints_folder, iteration)
            return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    except (CptainError, OSError):
        pass  # none yet, or one that is damaged
    weights, optimizer = (4, 8) if run.train.precision == "fp32" else (2, 12)
    return parameters(architecture) * (weights + (0 if "--no-save-optim" in run.train.megatron_args else optimizer))


def checkpoints_to_come(run: RunFile, steps: int) -> int:
    """How many more need room: one every train.save_interval steps, and the last, as far as train.keep lets them stay;
    one more is there until another is removed."""
    try:
        done = read_tracker(run.checkpoints_folder) or 0
    except (CptainError, OSError):
        done = 0
    train = run.train
    to_come = max(0, math.ceil(steps / train.save_interval) - done // train.save_interval)
    if train.keep == "all":
        return to_come
    there = sum(1 for _ in run.checkpoints_folder.glob("iter_*"))
    for_ever = steps // train.keep_every - done // train.keep_every if train.keep_every else 0
    return min(to_come, max(0, train.keep + 1 - there) + for_ever)
