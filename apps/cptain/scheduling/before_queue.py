"""What a stage would refuse after hours in a queue, refused before it is submitted.

Only what can be known where `cptain jobs` runs. A path whose disk is not seen here (another machine, an image that was
given no --bind) is a line for the user and no error. What only the jobs' image knows is looked at where this process
runs in that image, as with make jobs; else `train` says it before it starts a GPU.
"""

import os
from collections import Counter
from pathlib import Path

from cptain.data.inputs import input_files
from cptain.data.stages import spans
from cptain.data.steps import known_steps
from cptain.data.tokenized import find_pairs
from cptain.data.vocabulary import run_architecture
from cptain.errors import BAD_USAGE, CptainError, bad_usage
from cptain.image import image_here, start_seconds, was_unpacked
from cptain.progress import human
from cptain.run_file import RunFile
from cptain.scheduling.on_site import model_is_here, on_site
from cptain.scheduling.sites import Site
from cptain.training.disk import checkpoint_bytes, checkpoints_to_come, free_bytes, is_here
from cptain.training.metrics import check_wandb_is_installed, has_wandb_key


def _runs_in(image: Path) -> bool:
    """Whether this process runs in that image."""
    here = image_here()
    return here is not None and (here == image or (here.exists() and image.exists() and here.samefile(image)))


def _check_model(run: RunFile, site: Site) -> None:
    """Refuse a model that is not there or does not fit."""
    folders = {"model.hf": run.model.hf, "model.tokenizer": run.base_tokenizer}
    if run.model.vocabulary and run.model.vocabulary.tokenizer:
        folders["model.vocabulary.tokenizer"] = run.model.vocabulary.tokenizer
    for key, folder in folders.items():
        if Path(folder).is_absolute() and is_here(Path(folder)) and not Path(folder).is_dir():
            bad_usage(f"{key} = {folder}: no such folder")
    if not model_is_here(run):
        return
    model = Path(run.model.hf)
    converted = (run.megatron_folder / "release").is_dir()
    if not converted and not any(model.glob("*.safetensors")):
        bad_usage(f"model.hf = {model}: no .safetensors file in it")
    here = on_site(run, site, run_architecture(run))
    if here.refusal:
        bad_usage(f"{here.refusal}: take more nodes, or another layout (cptain plan proposes one)")


def _check_data(run: RunFile) -> None:
    text, pairs = (
        [pattern for pattern in patterns if is_here(Path(pattern))] for patterns in (run.data.input, run.data.tokenized)
    )
    if steps := known_steps(run):
        spans(run, steps)
    if (run.data_folder / "manifest.json").exists():
        return
    try:
        input_files(text)
        find_pairs(pairs)
    except CptainError as error:
        raise CptainError(str(error), BAD_USAGE) from error


def _check_wandb(run: RunFile, site: Site, image: Path) -> None:
    if run.wandb is None:
        return
    if _runs_in(image):
        check_wandb_is_installed(run)
    by_site = site.environment.get("WANDB_MODE", "offline" if site.offline else "online")
    if os.environ.get("WANDB_MODE", by_site) == "online" and not has_wandb_key():
        bad_usage(
            "[wandb] is asked for, and there is no key: export WANDB_API_KEY (or wandb login), or WANDB_MODE=offline"
        )


def check_disks(runs: list[RunFile]) -> None:
    """Refuse runs whose checkpoints to come are more than is free on the disk of their work_dir, all together.

    A disk that is not seen from here is not looked at, and what is free is no quota: a group's may be smaller.

    Raises:
        CptainError: exit status 2.
    """
    count: Counter[Path] = Counter()
    needed: Counter[Path] = Counter()
    for run in runs:
        # Of the optimizer's state that flag may save a half: how much is not known.
        if model_is_here(run) and "--use-precision-aware-optimizer" not in run.train.megatron_args:
            to_come = checkpoints_to_come(run, known_steps(run) or 1)
            count[run.work_dir] += to_come
            needed[run.work_dir] += to_come * checkpoint_bytes(run, run_architecture(run))
    for folder, size in needed.items():
        free = free_bytes(folder)
        if free is not None and size > free:
            bad_usage(
                f"work_dir = {folder}: {human(free)}B are free there, and the {count[folder]:,} checkpoints to come "
                f"need {human(size)}B: a longer train.save_interval saves fewer"
            )


def _offer_of_a_folder(image: Path, apptainer: str) -> str:
    """A line for users of an image that is unpacked at each start."""
    took = f" in {seconds:.0f} s" if (seconds := start_seconds()) else ""
    folder = image.with_suffix("")
    return (
        f"{image} was unpacked{took} to start here, as in every job whose node gives users no FUSE; a folder starts at "
        f'once: {apptainer} build --sandbox {folder} {image} (or make sandbox), and image = "{folder}" under [jobs]'
    )


def check_before_queue(run: RunFile, site: Site, image: Path) -> list[str]:
    """Refuse a run that a job of it would refuse.

    Args:
        run: one run, none of a sweep.
        site: where it will run.
        image: the container's.

    Returns:
        What could not be looked at from here, or costs time; a line each.

    Raises:
        CptainError: exit status 2, names the key.
    """
    if is_here(image) and not image.exists():
        bad_usage(f"jobs.image = {image}: no such image (make image builds it)")
    _check_model(run, site)
    _check_data(run)
    _check_wandb(run, site, image)
    paths = [
        ("jobs.image", image),
        ("model.hf", Path(run.model.hf)),
        *(("data.input", Path(one)) for one in run.data.input),
        *(("data.tokenized", Path(one)) for one in run.data.tokenized),
    ]
    unseen = dict.fromkeys(key for key, path in paths if path.is_absolute() and not is_here(path))
    lines = [f"{', '.join(unseen)}: on a disk that is not seen from here, and not checked"] if unseen else []
    if _runs_in(image) and was_unpacked():
        lines.append(_offer_of_a_folder(image, site.apptainer))
    return lines
