"""Site files: what is wrong in one, and what each site of the project asks its scheduler for."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from conftest import PROJECT, RunFileMaker, cptain, refused
from cptain.run_file import load_run
from cptain.scheduling.sites import load_site
from stand_ins import Submission, shellcheck, write_site

SITES = sorted(file.stem for file in (PROJECT / "jobs" / "sites").glob("*.toml"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scheduler": "lsf"}, 'scheduler = "lsf": input should be'),
        ({"launcher": "qrsh"}, 'launcher = "qrsh" with scheduler = "slurm": allowed: srun, mpirun'),
        ({"gpus": None}, "gpus: is missing"),
        ({"qeue": "x"}, 'qeue = "x": no such key (allowed: apptainer, '),
        ({"train": ["nodes=2"]}, "allowed: what follows #PBS"),
        ({"train": ["--x={gpus}"]}, "allowed in braces: {nodes}"),
        ({"train": ["--x\nrm"]}, "allowed: one line"),
        ({"max_walltime": "a day"}, 'max_walltime = "a day": allowed: HH:MM:SS'),
        ({"binds": ["/a b"]}, "binds[0]"),
        ({"environment": {"A B": "x"}}, "environment"),
        ({"modules": ["x; id"]}, "modules[0]"),
    ],
)
def test_a_wrong_site_file_is_told_key_by_key(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    site = {"scheduler": "slurm", "launcher": "srun", "gpus": 8} | change
    file = tmp_path / "my site.toml"
    file.write_text(tomli_w.dumps({key: value for key, value in site.items() if value is not None}))
    result = cptain("doctor", "--site", file)
    assert result.exit_code == 2, result.output
    assert result.output.startswith(f"cptain: {file}: ")
    assert says in result.output.splitlines()[-1]


def test_a_site_file_of_one_s_own_works_by_path(tmp_path: Path, make_jobs_run: RunFileMaker) -> None:
    site = tmp_path / "ours.toml"
    content = 'scheduler = "pbs"\ngpus = 2\nscratch = "$PBS_LOCALDIR/x"\ncache = "/c c"\n[environment]\n'
    content += 'A = "$(id) `id` \\"$HOME"'
    site.write_text(content + "\n")
    assert cptain("doctor", "--site", site).output == f"{site}: pbs, no launcher: one node a job, 2 GPUs a node\n"
    file = make_jobs_run()
    assert "jobs.nodes = 2: site ours has no launcher, and so one node a job" in refused(file, "--site", site)
    assert cptain("jobs", file, "--site", site, "--set", "jobs.nodes=1").exit_code == 0
    script = load_run(file).folder / "jobs" / "convert.sh"
    shellcheck(script)
    (line,) = [line for line in script.read_text().splitlines() if line.startswith("settings=")]
    shown = subprocess.run(
        ["bash", "-c", f'{line}\nprintf "%s\\n" "${{settings[@]}}"'],
        env={"HOME": "/home/me", "PBS_LOCALDIR": "/local", "IMAGE": "/an image.sif"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines() == [
        "CPTAIN_IMAGE=/an image.sif",
        'A=$(id) `id` "/home/me',
        "TMPDIR=/local/x",
        "HF_HOME=/c c/huggingface",
        "XDG_CACHE_HOME=/c c",
    ]


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("stage", ["convert", "train", "doctor"])
def test_a_site_s_folder_with_a_variable_that_the_job_has_not_is_one_line(
    value: str | None, stage: str, tmp_path: Path, make_jobs_run: RunFileMaker
) -> None:
    site = write_site(
        tmp_path / "ours.toml", scratch="${LOCAL_DISK}/x", cache="$HOME/$LOCAL_DISK/c", environment={"A": "$LOCAL_DISK"}
    )
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\ntouch "{tmp_path}/began"\n')
    program.chmod(0o755)
    image = tmp_path / "cptain.sif"
    image.touch()
    file = make_jobs_run(jobs__nodes=1, jobs__image=str(image))
    assert cptain("jobs", file, "--site", site).exit_code == 0
    script = load_run(file).folder / "jobs" / f"{stage}.sh"
    shellcheck(script)
    environment = {"HOME": "/home/me", "PATH": f"{program.parent}:/usr/bin:/bin", "HOSTNAME": "node0"}
    environment |= {} if value is None else {"LOCAL_DISK": value}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    why = "is not set in this job" if value is None else "is empty in this job"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f'{stage}.sh on node0: scratch = "${{LOCAL_DISK}}/x" of site ours: LOCAL_DISK {why}\n'
    assert not (tmp_path / "began").exists()


def test_a_variable_of_a_site_may_be_empty_or_have_a_default(make_submission: Callable[..., Submission]) -> None:
    values = {"A": "$EMPTY", "B": "${NONE:-no}", "C": "a$"}
    submission = make_submission(site={"scratch": "${NONE:-/tmp}/x", "environment": values})
    script = submission.submit.with_name("convert.sh")
    done = submission.run("bash", script, EMPTY="")
    assert (done.returncode, done.stderr) == (0, "")
    had = submission.environment("convert.")
    assert {name: had[name] for name in ("A", "B", "C", "TMPDIR")} == {
        "A": "",
        "B": "no",
        "C": "a$",
        "TMPDIR": "/tmp/x",
    }
    done = submission.run("bash", script, HOSTNAME="node0")
    assert done.returncode == 1
    assert done.stderr == 'convert.sh on node0: A = "$EMPTY" of site here: EMPTY is not set in this job\n'


def test_every_site_of_the_project_is_right() -> None:
    for name in SITES:
        site, file = load_site(name)
        assert cptain("doctor", "--site", name).output.startswith(f"{file}: {site.scheduler}, ")
        assert site.scheduler == "local" or site.launcher
    assert cptain("doctor", "--site", "abc3").exit_code == 2


def test_reserved_nodes_are_asked_for_as_the_site_says(make_run: RunFileMaker) -> None:
    jobs = {
        "site": "tsubame4",
        "image": "/x.sif",
        "group": "g",
        "nodes": 2,
        "walltime": "48:00:00",
        "reservation": "R123",
    }
    file = make_run(train__global_batch_size=64, **{f"jobs__{key}": value for key, value in jobs.items()})
    folder = load_run(file).folder / "jobs"
    assert cptain("jobs", file, "--site", "abci3").exit_code == 0
    train = (folder / "train.sh").read_text()
    assert "#PBS -q R123\n" in train
    assert "#PBS -v RTYPE=rt_HF\n" in train
    assert "#PBS -q rt_HF" not in train
    assert "#PBS -q rt_HC" in (folder / "convert.sh").read_text()
    command = ["bash", folder / "submit.sh", "--dry-run", "train"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "-v LINK=1\\,RTYPE=rt_HF" in shown
    assert cptain("jobs", file, "--site", "tsubame4").exit_code == 0
    assert "#$ -ar R123\n" in (folder / "train.sh").read_text()
    none = cptain("jobs", file, "--site", "pbs")
    assert none.output == "cptain: jobs.reservation = R123: site pbs does not say how one is used ([reservation])\n"
    unreserved = cptain("jobs", make_run(**{f"jobs__{key}": jobs[key] for key in jobs if key != "reservation"}))
    assert unreserved.output == (
        "cptain: jobs.walltime = 48:00:00: site tsubame4 allows at most 24:00:00 without jobs.reservation\n"
    )


def test_each_kind_of_pbs_gets_nodes_of_their_own(make_run: RunFileMaker) -> None:
    file = make_run(train__global_batch_size=64, jobs__nodes=4, jobs__walltime="01:00:00", jobs__image="/x.sif")
    assert cptain("jobs", file, "--site", "pbs").exit_code == 0
    assert "#PBS -l place=scatter\n" in (load_run(file).folder / "jobs" / "train.sh").read_text()


@pytest.mark.parametrize(
    ("site", "lines", "array"),
    [
        ("abci3", {"#PBS -m ae", "#PBS -M me@example.org"}, {"#PBS -m ae"}),
        ("tsubame4", {"#$ -m ae", "#$ -M me@example.org"}, {"#$ -m a"}),  # of an array, Grid Engine writes once a task
        ("slurm", {"#SBATCH --mail-type=END,FAIL", "#SBATCH --mail-user=me@example.org"}, set()),
    ],
)
def test_the_scheduler_writes_when_a_job_ends(
    site: str, lines: set[str], array: set[str], make_run: RunFileMaker
) -> None:
    jobs = {"group": "g", "walltime": "01:00:00", "image": "/x.sif", "mail": "me@example.org"}
    file = make_run(train__global_batch_size=64, **{f"jobs__{key}": value for key, value in jobs.items()})
    assert cptain("jobs", file, "--site", site).exit_code == 0
    folder = load_run(file).folder / "jobs"
    for script, wanted in (("train.sh", lines), ("preprocess.sh", array)):
        assert wanted <= set((folder / script).read_text().splitlines())
    refused = cptain("jobs", file, "--site", site, "--set", 'jobs.mail="x; id"')
    assert "jobs.mail" in refused.output
    assert refused.exit_code == 2
