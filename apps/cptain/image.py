"""What a command does because it runs inside the image: keep caches out of $HOME, and know which build it is.

The cache folders are set here and not in Singularity.def, whose %environment would beat the host's own HF_HOME and
could not name the run's folder.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

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
