"""What a command does because it runs inside the image: keep caches out of $HOME, and know which image it is.

The cache folders are set here and not in Singularity.def, whose %environment would beat the host's own HF_HOME and
could not name the run's folder.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

from cptain.processes import process_start, stat_fields

_LABELS = Path("/.singularity.d/labels.json")  # Apptainer writes it into every image
_COMMIT_LABEL = "org.opencontainers.image.revision"


def label(name: str) -> str | None:
    """One of the image's labels; None outside an image, and where it has no such label."""
    try:
        value = json.loads(_LABELS.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError):
        return None
    return None if value is None else str(value)


def commit() -> str | None:
    """The commit of cptain that the image was built from, with "+changes" where files differed from it."""
    return label(_COMMIT_LABEL)


# What Apptainer's variable names where the image was unpacked for this start, and is removed after it.
_UNPACKED = re.compile(r"/rootfs-\d+/root/?$")


def _container() -> str | None:
    return os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")


def image_here() -> Path | None:
    """The image that this process runs in, by its name on the host; None outside one, or where nothing says.

    make jobs and the job scripts set CPTAIN_IMAGE for an image that was unpacked.
    """
    container = _container()
    if container and _UNPACKED.search(container):
        container = os.environ.get("CPTAIN_IMAGE")
    return Path(container) if container else None


def was_unpacked() -> bool:
    """Whether the image was unpacked for this start, as it is for a plain user without FUSE."""
    return bool(_UNPACKED.search(_container() or ""))


def start_seconds() -> float | None:
    """How long Apptainer took from its own start to that of its first process here; None where that cannot be seen."""
    pid = os.getpid()
    try:
        while pid > 1:
            parent = int(stat_fields(Path(f"/proc/{pid}/stat").read_text())[1])
            if b"untime parent" in Path(f"/proc/{parent}/cmdline").read_bytes():  # "Apptainer runtime parent: a.sif"
                began, ended = process_start(parent), process_start(pid)
                return (int(ended or 0) - int(began or 0)) / os.sysconf("SC_CLK_TCK")
            pid = parent
    except (OSError, ValueError):
        pass  # of another PID namespace
    return None


def keep_caches_out_of_home(run_folder: Path) -> None:
    """Give every cache that is $HOME's by default another folder, unless the user did; only inside an image.

    On a cluster $HOME is small and shared by all nodes. What is downloaded goes into the run's folder; what is compiled
    goes to the node's own scratch, where ranks of other nodes do not race for it.
    """
    if not _LABELS.exists():
        return
    cache = run_folder / "cache"
    compiled = Path(tempfile.gettempdir()) / f"cptain-{os.getuid()}"
    for name, folder in (
        ("HF_HOME", cache / "huggingface"),
        ("XDG_CACHE_HOME", cache),
        ("WANDB_DIR", run_folder),
        ("WANDB_CACHE_DIR", cache / "wandb"),
        ("WANDB_CONFIG_DIR", cache / "wandb"),
        ("WANDB_DATA_DIR", cache / "wandb"),
        ("CUDA_CACHE_PATH", compiled / "cuda"),
        ("TORCHINDUCTOR_CACHE_DIR", compiled / "torchinductor"),
        ("TRITON_CACHE_DIR", compiled / "triton"),
    ):
        os.environ.setdefault(name, str(folder))


def warn_of_another_commit() -> None:
    """Say so where CPTAIN_EXPECT_COMMIT, which rendered job scripts may set, names another commit than the image's."""
    expected, here = os.environ.get("CPTAIN_EXPECT_COMMIT", "").removesuffix("+changes"), commit()
    if here and expected and not here.startswith(expected):
        print(
            f"cptain: warning: this image holds cptain {here}, and the jobs expect {expected}: "
            "build the image again, or render the jobs again",
            file=sys.stderr,
        )
