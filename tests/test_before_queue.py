"""What a job would refuse is refused before it waits in a queue."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import RunFileMaker, cptain
from cptain.run_file import load_run
from cptain.training.metrics import check_wandb_is_installed
from stand_ins import (
    write_site,
)

STAGES: dict[str, Any] = {
    "data.mix": [{"name": "all", "input": "*.jsonl", "weight": 1}],
    "data.stage": [{"step": 5, "weight": {"all": 1}}, {"step": 3, "weight": {"all": 1}}],
    "train.steps": 10,
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"jobs.nodes": 3}, "micro_batch_size × data-parallel size = 12 does not divide the 8 sequences of train.glo"),
        ({"parallel.tensor": 4}, "parallel.tensor = 4 does not divide the 2 key and value heads"),
        ({"jobs.image": "{here}/no.sif"}, "jobs.image = {here}/no.sif: no such image (make image builds it)"),
        ({"model.hf": "{here}/no"}, "model.hf = {here}/no: no such folder"),
        ({"model.tokenizer": "{here}/no"}, "model.tokenizer = {here}/no: no such folder"),
        ({"data.input": ["{here}/no/*.jsonl"]}, "data.input: {here}/no/*.jsonl matches no "),
        (STAGES, "data.stage: one begins at step 5, and ends at step 3 of 10: stages must follow"),
    ],
)
def test_what_a_job_would_refuse_is_refused_before_it_waits(
    change: dict[str, Any], says: str, make_run: RunFileMaker, tmp_path: Path
) -> None:
    image = tmp_path / "cptain.sif"
    image.touch()
    site = write_site(tmp_path / "here.toml", launcher="mpirun")
    keys = {"jobs.image": str(image), "jobs.walltime": "01:00:00", "jobs.nodes": 2}
    change = json.loads(json.dumps(change).replace("{here}", str(tmp_path)))
    assert (
        cptain(
            "jobs", make_run(**{key.replace(".", "__"): value for key, value in keys.items()}), "--site", site
        ).exit_code
        == 0
    )
    file = make_run(**{key.replace(".", "__"): value for key, value in {**keys, **change}.items()})
    result = cptain("jobs", file, "--site", site)
    assert result.exit_code == 2
    assert result.output.startswith(f"cptain: {says.replace('{here}', str(tmp_path))}")


def test_paths_of_another_machine_are_said(make_run: RunFileMaker, tmp_path: Path) -> None:
    file = make_run(jobs__image="/elsewhere/a.sif", jobs__walltime="01:00:00")
    said = cptain("jobs", file, "--site", write_site(tmp_path / "here.toml")).output
    assert "jobs: jobs.image: on a disk that is not seen from here, and not checked\n" in said


# Weights & Biases


@pytest.fixture
def make_wandb_jobs(
    make_run: RunFileMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """`cptain jobs` of a run with [wandb], where no key is known: its exit status and output."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)

    def make(**site: Any) -> tuple[int, str]:
        file = make_run(jobs__image=str(tmp_path / "cptain.sif"), jobs__walltime="01:00:00", wandb__project="p")
        (tmp_path / "cptain.sif").touch()
        result = cptain("jobs", file, "--site", write_site(tmp_path / "here.toml", **site))
        return result.exit_code, result.output

    return make


def test_a_run_on_weights_and_biases_without_a_key_is_refused_unless_it_is_offline(
    make_wandb_jobs: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_wandb_jobs() == (
        2,
        "cptain: [wandb] is asked for, and there is no key: export WANDB_API_KEY (or wandb login), "
        "or WANDB_MODE=offline\n",
    )
    assert make_wandb_jobs(offline=True)[0] == 0
    assert make_wandb_jobs(environment={"WANDB_MODE": "offline"})[0] == 0
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    (tmp_path / "netrc").chmod(0o600)
    assert make_wandb_jobs()[0] == 0
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # of another server the key is no use
    assert make_wandb_jobs()[0] == 2
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert make_wandb_jobs()[0] == 0
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert make_wandb_jobs()[0] == 0


def test_a_run_on_weights_and_biases_is_refused_by_jobs_in_an_image_without_it_and_by_train(
    make_wandb_jobs: Callable[..., tuple[int, str]],
    make_ready_run: RunFileMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert make_wandb_jobs()[0] == 0  # of the jobs' image nothing is known here
    monkeypatch.setenv("APPTAINER_CONTAINER", str(tmp_path / "cptain.sif"))
    line = "cptain: [wandb] is asked for, and wandb cannot be imported here: pip install wandb ("
    status, said = make_wandb_jobs()
    assert (status, said[: len(line)]) == (2, line)
    file = make_ready_run(wandb__project="p")
    at_start = cptain("train", file, "--cpu")
    assert (at_start.exit_code, at_start.output[: len(line)]) == (2, line)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    check_wandb_is_installed(load_run(file))


# Disks


def test_checkpoints_that_the_disk_cannot_hold_are_refused_for_all_runs_of_a_sweep_together(
    make_run: RunFileMaker, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = load_run(trained_run).checkpoints_folder / "iter_0000008"
    size = sum(path.stat().st_size for path in saved.iterdir())
    keys = {"jobs__image": "/x.sif", "jobs__walltime": "01:00:00", "sweep": {"train.lr": [1e-3, 2e-3]}}
    free = [4 * size]  # of two runs, each with two checkpoints
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free[0]))
    site = write_site(tmp_path / "here.toml")
    assert cptain("jobs", make_run(**keys), "--site", site).exit_code == 0
    often = {"train__save_interval": 1}
    assert cptain("jobs", make_run(**keys, **often), "--site", site).exit_code == 2
    assert cptain("jobs", make_run(**keys, **often, train__keep=1), "--site", site).exit_code == 0
    free = [int(3.3 * size)]
    result = cptain("jobs", make_run(**keys, name="other"), "--site", site)
    assert result.exit_code == 2
    saves_less = {"train__megatron_args": ["--no-save-optim"]}
    assert cptain("jobs", make_run(**keys, **saves_less, name="less"), "--site", site).exit_code == 0
    assert re.fullmatch(
        rf"cptain: work_dir = {tmp_path}/runs: \S+B are free there, and the 4 checkpoints to come need \S+B: .*\n",
        result.output,
    )


# The image


def test_an_image_that_is_unpacked_at_each_start_is_said_with_its_seconds_and_a_way_out(
    make_run: RunFileMaker, tmp_path: Path
) -> None:
    """Apptainer's variables and its waiting process are as a plain user without FUSE was seen to have them."""
    image = tmp_path / "cptain.sif"
    image.touch()
    run, site = make_run(jobs__walltime="01:00:00"), write_site(tmp_path / "here.toml")
    unpacked = {"APPTAINER_CONTAINER": "/tmp/rootfs-3507520145/root", "CPTAIN_IMAGE": str(image)}
    command = [sys.executable, "-m", "cptain", "jobs", str(run), "--site", str(site)]
    waits = f"sleep 1.2; {shlex.join(command)}; exit $?"
    as_apptainer = ["bash", "-c", f"exec -a 'Apptainer runtime parent: cptain.sif' bash -c {shlex.quote(waits)}"]
    done = subprocess.run(as_apptainer, env=os.environ | unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = re.search(r"jobs: (\S+) was unpacked in (\d+) s to start here, .*", done.stderr)
    assert said
    assert said[1] == str(image)
    assert int(said[2]) >= 1
    folder = tmp_path / "cptain"
    assert f'apptainer build --sandbox {folder} {image} (or make sandbox), and image = "{folder}" under' in said[0]
    assert f"IMAGE=${{IMAGE:-{image}}}" in Path(done.stdout.strip()).with_name("train.sh").read_text()
    unknown = subprocess.run(command, env=os.environ | unpacked | {"CPTAIN_IMAGE": ""}, capture_output=True, text=True)
    assert unknown.stderr.startswith(
        "cptain: jobs.image: is missing (the one in use here was unpacked into a folder that is removed): allowed: "
    )
