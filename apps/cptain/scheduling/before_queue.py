"""What a stage would refuse after hours in a queue, refused before it is submitted.

Only what can be known where `cptain jobs` runs. A path whose disk is not seen here (another machine, an image that was
given no --bind) is a line for the user and no error.
"""

import math
import os
from pathlib import Path

from cptain.data.inputs import input_files
from cptain.errors import CptainError, bad_usage
from cptain.model.architecture import read_architecture
from cptain.run_file import RunFile
from cptain.scheduling.sites import Site
from cptain.training.flags import check_parallel


def _is_here(path: Path) -> bool:
    """Whether the disk that a path is on is seen: its first two folders are there, such as /gs/bs or /home/me."""
    folder = Path(*path.parts[: min(3, len(path.parts) - 1)])
    return folder != Path("/") and folder.is_dir()


def _processes(run: RunFile, site: Site) -> int:
    """Of all nodes together, as `train` starts them."""
    nodes = run.jobs.nodes
    return nodes * (site.gpus or math.ceil(run.parallel.model_size / nodes))


def _check_model(run: RunFile, site: Site) -> None:
    for key, folder in (("model.hf", run.model.hf), ("model.tokenizer", run.tokenizer)):
        if Path(folder).is_absolute() and _is_here(Path(folder)) and not Path(folder).is_dir():
            bad_usage(f"{key} = {folder}: no such folder")
    model = Path(run.model.hf)
    if not model.is_absolute() or not model.is_dir():
        return  # of the hub, or on another machine
    converted = (run.megatron_folder / "release").is_dir()
    if not converted and not any(model.glob("*.safetensors")):
        bad_usage(f"model.hf = {model}: no .safetensors file in it")
    check_parallel(run, read_architecture(model), _processes(run, site))


def _check_data(run: RunFile) -> None:
    patterns = [pattern for pattern in run.data.input if _is_here(Path(pattern))]
    if not patterns or (run.data_folder / "manifest.json").exists():
        return
    try:
        input_files(patterns)
    except CptainError as error:
        raise CptainError(str(error), 2) from error


def _has_wandb_key() -> bool:
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or "wandb" in netrc.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def check_before_queue(run: RunFile, site: Site, image: Path) -> list[str]:
    """Refuse a run that a job of it would refuse.

    Args:
        run: one run, none of a sweep.
        site: where it will run.
        image: the container's.

    Returns:
        What could not be looked at from here, or will be missed later; a line each.

    Raises:
        CptainError: exit status 2, names the key.
    """
    if _is_here(image) and not image.exists():
        bad_usage(f"jobs.image = {image}: no such image (make image builds it)")
    _check_model(run, site)
    _check_data(run)
    paths = [
        ("jobs.image", image),
        ("model.hf", Path(run.model.hf)),
        *(("data.input", Path(one)) for one in run.data.input),
    ]
    unseen = dict.fromkeys(key for key, path in paths if path.is_absolute() and not _is_here(path))
    lines = [f"{', '.join(unseen)}: on a disk that is not seen from here, and not checked"] if unseen else []
    mode = os.environ.get("WANDB_MODE", "offline" if site.offline else "online")
    if run.wandb and mode == "online" and not _has_wandb_key():
        lines.append("[wandb] is asked for, and there is no WANDB_API_KEY: export it, or WANDB_MODE=offline")
    return lines
