"""The image that tests run, the program that runs it, and a folder for them that every user can reach."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROJECT, make


@pytest.fixture(scope="session")
def image() -> Path:
    """The CPU image: the one that the last tests built, unless something that goes into it is newer."""
    file = PROJECT / ".apptainer" / "tests.sif"
    sources = [PROJECT / "Singularity.def", PROJECT / "pyproject.toml", PROJECT / "Makefile"]
    sources += (PROJECT / "apptainer").glob("*")
    sources += (PROJECT / "apps").rglob("*.py")
    sources += (PROJECT / "jobs").glob("*/*")
    file.parent.mkdir(exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of xdist's processes builds, and the others wait for it
        if not file.exists() or file.stat().st_mtime < max(source.stat().st_mtime for source in sources):
            built = make("-j2", "image-cpu", f"IMAGE_CPU={file}", "FORCE=1")
            assert built.returncode == 0, built.stdout[-4000:]
    return file


@pytest.fixture(scope="session")
def public() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are for their owner alone."""
    folder = Path(tempfile.mkdtemp(prefix="cptain-tests-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def apptainer(image: Path, public: Path) -> str:
    """The apptainer that built the image, where every user can reach it, as `singularity` too: so spython calls it."""
    found = shutil.which("apptainer")
    if found is None:
        shutil.copytree(PROJECT / ".apptainer" / "dist", public / "private" / "dist", symlinks=True)
        shutil.copytree(PROJECT / ".apptainer" / "bin", public / "private" / "bin", symlinks=True)
        found = str(public / "private" / "bin" / "apptainer")
    (public / "bin").mkdir()
    (public / "bin" / "singularity").symlink_to(found)
    return found
