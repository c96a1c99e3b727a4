"""jobs on the sites that there are: what reaches a job, what its scheduler is told, and what is refused before."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomli_w
from conftest import RunFileMaker, cptain

APPTAINER = f"""#!/bin/bash
while [ "$1" != --app ]; do shift; done
app=$2; shift 3
exec "{sys.executable}" -m cptain "$app" "$@"
"""


def programs(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which these shell scripts are on PATH."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def write_site(file: Path, **keys: Any) -> Path:
    """A site file; PBS, with two GPUs a node, but for what `keys` say."""
    file.write_text(tomli_w.dumps({"scheduler": "pbs", "gpus": 2, **keys}))
    return file


# --out


def test_scripts_of_another_folder_train_what_set_says(make_ready_run: RunFileMaker, tmp_path: Path) -> None:
    image = tmp_path / "cptain.sif"
    image.touch()
    site = write_site(tmp_path / "here.toml", scheduler="local", gpus=0)
    file = make_ready_run(jobs__image=str(image))
    out = tmp_path / "scripts"
    result = cptain("jobs", file, "--site", site, "--out", out, "--set", "train.steps=2", "--set", "name=other")
    assert result.exit_code == 0, result.output
    environment = programs(tmp_path / "bin", apptainer=APPTAINER)
    done = subprocess.run(["bash", out / "train.sh"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 2 of 2" in done.stderr
    assert (tmp_path / "runs" / "other" / "checkpoints" / "iter_0000002").is_dir()


def test_a_copy_never_takes_the_place_of_the_run_file(make_run: RunFileMaker) -> None:
    file = make_run(jobs__image="/shared/cptain.sif")
    before = file.read_text()
    result = cptain("jobs", file, "--site", "local", "--out", file.parent)
    assert result.exit_code == 2
    assert result.output == (
        f"cptain: {file}: the jobs' copy of the run file would take its place: name another folder with --out\n"
    )
    assert file.read_text() == before
