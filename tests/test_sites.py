"""jobs on the sites that there are: what reaches a job, what its scheduler is told, and what is refused before."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from conftest import RunFileMaker, cptain
from cptain.errors import CptainError
from cptain.run_file import load_run
from cptain.scheduling.state import read_states
from cptain.training.nodes import check_as_asked

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


# OpenPBS's qsub, as far as its rules were seen on a real one: a job gets no variable of the shell but those of -v, and
# -v takes the place of the script's own. The job runs at once, in $HOME.
QSUB = """#!/bin/bash
script=${@: -1} given=() number=$(($(cat "$KEPT/number" 2> /dev/null || echo 0) + 1))
echo $number > "$KEPT/number"
printf '%q ' "$@" >> "$KEPT/qsub"
echo >> "$KEPT/qsub"
while [ "$1" != -v ]; do shift; done
for word in ${2//,/ }; do case $word in *=*) given+=("$word") ;; *) given+=("$word=${!word}") ;; esac; done
printf 'node0\\nnode0\\nnode1\\nnode1\\n' > "$KEPT/nodefile"
env -i PATH="$PATH" HOME="$KEPT" HOSTNAME=node0 KEPT="$KEPT" PBS_JOBID=$number.pbs0 PBS_O_WORKDIR="$PWD" \\
  PBS_NODEFILE="$KEPT/nodefile" PBS_ARRAY_INDEX=1 "${given[@]}" bash "$script" >> "$KEPT/output" 2>&1
echo $number.pbs0
"""
TMRSH = """#!/bin/bash
printf '%s\\n' "$@" >> "$KEPT/commands"
shift
exec env -i PATH="$PATH" KEPT="$KEPT" "$@"
"""
KEEPS_ENVIRONMENT = """#!/bin/bash
while [ "$1" != --app ]; do shift; done
env -0 > "$KEPT/$2${CPTAIN_LINK-}.${CPTAIN_NODE-}"
"""


class Submission:
    """submit.sh, called where a stand-in plays PBS and another the image."""

    def __init__(self, submit: Path, folder: Path, apptainer: str = KEEPS_ENVIRONMENT) -> None:
        stand_ins = {"qsub": QSUB, "qstat": '#!/bin/bash\n[ "$#" = 0 ]\n', "pbs_tmrsh": TMRSH, "apptainer": apptainer}
        self.submit, self.folder = submit, folder
        self.programs = {**programs(folder / "bin", **stand_ins), "KEPT": str(folder)}

    def __call__(self, *stages: str, **variables: str) -> str:
        """Submit; what the jobs said."""
        command = ["bash", self.submit, *stages]
        done = subprocess.run(command, env=self.programs | variables, capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return (self.folder / "output").read_text()

    def qsub(self) -> list[str]:
        """The arguments of each qsub."""
        return (self.folder / "qsub").read_text().splitlines()

    def environment(self, job: str) -> dict[str, str]:
        """What a container of a job had in its environment: "train1.0" is the first train job's on its first node."""
        return dict(line.split("=", 1) for line in (self.folder / job).read_text().rstrip("\0").split("\0"))


@pytest.fixture
def make_submission(make_run: RunFileMaker, tmp_path: Path) -> Callable[..., Submission]:
    """Renders the jobs of a run of two nodes for a PBS site with these keys; __ for dots changes keys of the run."""

    def make(apptainer: str = KEEPS_ENVIRONMENT, site: dict[str, Any] | None = None, **changes: Any) -> Submission:
        image = tmp_path / "cptain.sif"
        image.touch()
        file = write_site(tmp_path / "here.toml", **{"launcher": "pbs_tmrsh", "train": ["-q gpu"], **(site or {})})
        jobs = {"image": str(image), "nodes": 2, "walltime": "01:00:00", "shards": 2, "chain": 1}
        run = make_run(**{f"jobs__{key}": value for key, value in jobs.items()} | changes)
        result = cptain("jobs", run, "--site", file)
        assert result.exit_code == 0, result.output
        return Submission(Path(result.stdout.strip()), tmp_path, apptainer)

    return make


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


# Variables


def test_a_site_s_own_variables_are_joined_with_those_of_submit(make_submission: Callable[..., Submission]) -> None:
    site = {"train": ["-q gpu", "-v USE_SSH=1", "-v A=2"], "cpu": ["-v A=3"]}
    submission = make_submission(site=site)
    submission("convert", "train")
    assert [line.split()[:2] for line in submission.qsub()] == [
        ["-v", "LINK=1\\,A=3"],
        ["-v", "LINK=1\\,LAST=1\\,USE_SSH=1\\,A=2"],
    ]
    script = (submission.submit.parent / "train.sh").read_text()
    assert script.count("#PBS -v ") == 1  # of two, PBS takes the last


def test_variables_of_the_user_reach_every_container_as_they_are(make_submission: Callable[..., Submission]) -> None:
    submission = make_submission(jobs__environment=["MY_*", "ONE"])
    odd = {
        "WANDB_MODE": "offline",
        "NCCL_DEBUG": "INFO",
        "https_proxy": "http://u:p@host:1/?a,b",
        "CPTAIN_ACCEPT": "data",
    }
    odd |= {"MY_OWN": "$(touch pwned) 'a' \"b\", 日本\n語", "ONE": "1"}
    assert submission(**odd, TWO="2", ONE_MORE="3") == ""
    for job in ("preprocess.", "convert.", "train1.0", "train1.1", "export."):
        assert odd.items() <= submission.environment(job).items()
        assert not {"TWO", "ONE_MORE"} & submission.environment(job).keys()
    assert not any("offline" in line for line in submission.qsub())  # qstat -f would show it to every user
    assert not list(submission.folder.rglob("pwned"))


KEEPS_MODES = KEEPS_ENVIRONMENT + 'stat -c "%a" "${4%/*}/environment" >> "$KEPT/modes"\n'


def test_tokens_reach_the_jobs_by_a_file_of_their_owner_s_that_the_last_job_removes(
    make_submission: Callable[..., Submission],
) -> None:
    submission = make_submission(KEEPS_MODES, site={"user_environment": []}, jobs__chain=2)
    tokens = {"HF_TOKEN": "hf_very_secret", "WANDB_API_KEY": "wandb_very_secret"}
    kept = submission.submit.parent / "environment"
    kept.write_text("of the last time")
    kept.chmod(0o644)
    submission("preprocess", "convert", **tokens)
    assert kept.stat().st_mode & 0o777 == 0o600
    submission("train", **tokens)
    assert not kept.exists()
    submission(**tokens)
    assert not kept.exists()
    assert set((submission.folder / "modes").read_text().split()) == {"600"}
    for job in ("preprocess.", "convert.", "train1.0", "train1.1", "train2.0", "train2.1", "export."):
        assert tokens.items() <= submission.environment(job).items()
        (submission.folder / job).unlink()
    for file in submission.folder.rglob("*"):  # the arguments of qsub and pbs_tmrsh, and all output, among them
        assert not file.is_file() or b"very_secret" not in file.read_bytes(), file
    assert not any("TOKEN" in line for line in submission.qsub())


def test_where_nodes_have_no_way_out_offline_is_the_default_and_said(
    make_submission: Callable[..., Submission], make_run: RunFileMaker, tmp_path: Path
) -> None:
    submission = make_submission(site={"offline": True})
    submission("convert", WANDB_MODE="disabled")
    environment = submission.environment("convert.")
    assert (environment["HF_HUB_OFFLINE"], environment["WANDB_MODE"]) == ("1", "disabled")
    file = make_run(jobs__image="/x.sif", jobs__walltime="01:00:00", wandb__project="p")
    said = cptain("jobs", file, "--site", tmp_path / "here.toml").output
    assert (
        "jobs: site here has no way out: the hub and Weights & Biases are offline in its jobs (wandb sync sends" in said
    )


# Reservations


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


# Nodes and GPUs as asked


def test_nodes_that_the_scheduler_packed_on_one_host_are_refused(
    make_ready_run: RunFileMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("pbs0\n" * 16)
    file = make_ready_run()
    monkeypatch.setenv("PBS_NODEFILE", str(hosts))
    monkeypatch.setenv("CPTAIN_NODES", "4")
    said = cptain("train", file, "--cpu", "--dry-run")
    assert said.exit_code == 1
    assert said.output.startswith("cptain: train: the job asked for 4 nodes, and the scheduler's list has 1 (")
    monkeypatch.setenv("CPTAIN_NODES", "1")
    assert cptain("train", file, "--cpu", "--dry-run").exit_code == 0


def test_a_node_of_another_number_of_gpus_than_the_site_says_is_refused() -> None:
    check_as_asked(None, 8, {"CPTAIN_NODES": "1", "CPTAIN_GPUS": "8"})
    check_as_asked(None, 0, {"CPTAIN_NODES": "1", "CPTAIN_GPUS": "8"})  # a dry run, elsewhere
    with pytest.raises(CptainError, match=r"the job has 4 GPUs of this node, and the site file says gpus = 8$"):
        check_as_asked(None, 4, {"CPTAIN_NODES": "1", "CPTAIN_GPUS": "8"})


def test_each_kind_of_pbs_gets_nodes_of_their_own(make_run: RunFileMaker) -> None:
    file = make_run(train__global_batch_size=64, jobs__nodes=4, jobs__walltime="01:00:00", jobs__image="/x.sif")
    assert cptain("jobs", file, "--site", "pbs").exit_code == 0
    assert "#PBS -l place=scatter\n" in (load_run(file).folder / "jobs" / "train.sh").read_text()


# States


def finished(job: str, status: int, comment: str, **more: Any) -> str:
    """What qstat of OpenPBS says of a job that has ended; the comments are those of a real one."""
    return json.dumps({"Jobs": {job: {"job_state": "F", "Exit_status": status, "comment": comment, **more}}})


PBS_SAYS = """#!/bin/bash
[ $# != 0 ] || exit "${SERVER-0}"
case ${@: -1} in 9.pbs0) echo "qstat: 9.pbs0 Unknown Job Id" >&2; exit 153 ;; *) cat "$KEPT/${@: -1}" ;; esac
"""


def test_every_moment_of_pbs_has_its_own_word(make_submission: Callable[..., Submission]) -> None:
    submission = make_submission(f'#!/bin/bash\nshift 3\nexec "{sys.executable}" -m cptain "$@"\n')
    programs(submission.folder / "bin", qstat=PBS_SAYS)
    command = ["bash", submission.submit, "--state"]

    def state(**environment: str) -> tuple[int, str]:
        done = subprocess.run(command, env=submission.programs | environment, capture_output=True, text=True)
        return done.returncode, done.stdout or done.stderr

    assert state() == (1, f"submit.sh: {submission.submit.parent}: nothing was submitted from here yet\n")
    ran = "Job run at Wed Nov 25 at 17:58 on (pbs0:ncpus=16)"
    says = {
        "1[].pbs0": finished("1[1].pbs0", 1, f"{ran} and terminated by me@pbs0", array_id="1[].pbs0"),
        "2.pbs0": finished("2.pbs0", -29, f"{ran} and exceeded resource walltime"),
        "3.pbs0": finished("3.pbs0", 75, f"{ran} and failed"),
    }
    for job, text in says.items():
        (submission.folder / job).write_text(text)
    jobs = {"preprocess": "1[].pbs0", "train.1": "2.pbs0", "train.2": "3.pbs0", "train.3": "9.pbs0"}
    submitted = "".join(f"{name} {job}\n" for name, job in jobs.items())
    (submission.submit.parent / "submitted").write_text(submitted)
    status, table = state()
    assert status == 0
    assert [re.split(r" {2,}", line)[::2] for line in table.splitlines()] == [
        ["preprocess", "deleted"],
        ["train.1", "timeout"],
        ["train.2", "stopped"],
        ["train.3", "purged"],
    ]
    down = state(SERVER="255")
    assert down == (69, "submit.sh: the scheduler does not answer: nothing is known of the jobs\n")


def test_jobs_that_slurm_has_forgotten_are_in_its_accounts() -> None:
    text = "JobID|State|ExitCode|NodeList\n7|TIMEOUT|0:0|n[1-2]\nJobID|State|ExitCode|NodeList\n"
    text += (
        "8_1|COMPLETED|0:0|n1\n8_2|FAILED|7:0|n2\nJobID|State|ExitCode|NodeList\n9|CANCELLED by 0|0:0|None assigned\n"
    )
    text += "JobId=10 JobState=RUNNING Reason=None ExitCode=0:0 NodeList=n1\n"
    words = [(state.job, state.word) for state in read_states(text)]
    assert words == [("7", "timeout"), ("8", "done"), ("8", "failed"), ("9", "never ran"), ("10", "running")]


@pytest.mark.parametrize(
    ("status", "failed", "seconds", "word"),
    [
        (137, "100 : assumedly after job", 601, "timeout"),
        (137, "100 : assumedly after job", 20, "deleted"),
        (137, "37  : qmaster enforced h_rt limit", 600, "timeout"),
        (0, "0", 600, "done"),
    ],
)
def test_grid_engine_s_walltime_is_told_from_qdel(status: int, failed: str, seconds: int, word: str) -> None:
    text = f"{'=' * 62}\njobnumber    5\nfailed       {failed}\nexit_status  {status}\nru_wallclock {seconds}s\n"
    text += "category     -u jobuser -l h_rt=600,node_f=1\n"
    assert [state.word for state in read_states(text)] == [word]


# Before the queue


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"jobs.nodes": 3}, "micro_batch_size × data-parallel size = 12 does not divide the 8 sequences of train.glo"),
        ({"parallel.tensor": 4}, "parallel.tensor = 4 does not divide the 2 key and value heads"),
        ({"jobs.image": "{here}/no.sif"}, "jobs.image = {here}/no.sif: no such image (make image builds it)"),
        ({"model.hf": "{here}/no"}, "model.hf = {here}/no: no such folder"),
        ({"model.tokenizer": "{here}/no"}, "model.tokenizer = {here}/no: no such folder"),
        ({"data.input": ["{here}/no/*.jsonl"]}, "data.input: {here}/no/*.jsonl matches no "),
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


def test_a_run_without_a_key_of_weights_and_biases_and_paths_of_another_machine_are_said(
    make_run: RunFileMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    file = make_run(jobs__image="/elsewhere/a.sif", jobs__walltime="01:00:00", wandb__project="p")
    command = ("jobs", file, "--site", write_site(tmp_path / "here.toml"))
    said = cptain(*command).output
    assert "jobs: jobs.image: on a disk that is not seen from here, and not checked\n" in said
    assert "jobs: [wandb] is asked for, and there is no WANDB_API_KEY: export it, or WANDB_MODE=offline\n" in said
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert "WANDB" not in cptain(*command).output


# Mail


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


# Logs


@pytest.mark.parametrize(("site", "threads"), [({}, "1"), ({"environment": {"OMP_NUM_THREADS": "8"}}, "8")])
def test_ranks_have_a_thread_each_and_mpirun_adds_no_words_unless_the_site_says(
    site: dict[str, Any], threads: str, make_submission: Callable[..., Submission]
) -> None:
    submission = make_submission(site={"launcher": "mpirun", **site})
    mpirun = '#!/bin/bash\nwhile [ "$1" != env ]; do shift; done\nexec "$@"\n'
    programs(submission.folder / "bin", mpirun=mpirun)
    submission("train")
    environment = submission.environment("train1.")
    assert environment["OMP_NUM_THREADS"] == threads
    assert environment["OMPI_MCA_orte_execute_quiet"] == "1"
