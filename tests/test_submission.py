"""submit.sh and its jobs where a stand-in plays PBS: what reaches a job."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain
from stand_ins import KEEPS_ENVIRONMENT, TWO_NODES, Submission, write_site


def test_a_site_s_own_variables_are_joined_with_those_of_submit(make_submission: Callable[..., Submission]) -> None:
    site = {"train": [*TWO_NODES, "-v USE_SSH=1", "-v A=2"], "cpu": ["-v A=3"]}
    submission = make_submission(site=site)
    submission("convert", "train")
    assert [line.split()[:2] for line in submission.qsub()] == [
        ["-v", "LINK=1,A=3"],
        ["-v", "LINK=1,LAST=1,USE_SSH=1,A=2"],
    ]
    script = (submission.submit.parent / "train.sh").read_text()
    assert script.count("#PBS -v ") == 1  # of two, PBS takes the last
    assert "another run file: qsub -v RUN=FILE,IMAGE=FILE,USE_SSH=1,A=2 train.sh\n" in script


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_site_s_own_variables_may_be_quoted(by_hand: bool, make_submission: Callable[..., Submission]) -> None:
    """As a real qsub takes them: the quotes of a directive are dropped before it reads the value as an argument's."""
    submission = make_submission(site={"cpu": ['-vA="x y"', '-v "B=1 2"', "-v \"C='1,2'\",D=4"]})
    if by_hand:
        script = submission.submit.with_name("convert.sh")
        line = next(line for line in script.read_text().splitlines() if "another run file: " in line)
        command = line.partition("another run file: ")[2].replace("RUN=FILE,IMAGE=FILE,", "").replace("convert.sh", "")
        assert submission.run("bash", "-c", f'{command} "{script}"').returncode == 0
        submission.wait()
    else:
        submission("convert")
    had = submission.environment("convert.")
    assert [had[name] for name in "ABCD"] == ["x y", "1 2", "1,2", "4"]


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
    again = submission.run("bash", submission.submit.with_name("export.sh"), LAST="1").stderr  # as by qrerun
    assert f": {kept} is gone, as this job has run before: the variables of submit.sh's shell" in again
    by_hand = submission.run("bash", submission.submit.with_name("export.sh")).stderr
    assert "is gone" not in by_hand


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


@pytest.mark.parametrize(("site", "threads"), [({}, "1"), ({"environment": {"OMP_NUM_THREADS": "8"}}, "8")])
def test_ranks_have_a_thread_each_unless_the_site_says(
    site: dict[str, Any], threads: str, make_submission: Callable[..., Submission]
) -> None:
    submission = make_submission(site=site)
    submission("train")
    assert submission.environment("train1.0")["OMP_NUM_THREADS"] == threads


# Logs that the group may read


def group_and_others(file: Path) -> str:
    return f"{file.stat().st_mode & 0o077:02o}"


@pytest.mark.parametrize("asked", [True, False])
def test_the_group_reads_the_logs_where_the_site_asks_and_nobody_else_does(
    asked: bool, make_submission: Callable[..., Submission], tmp_path: Path
) -> None:
    writes = KEEPS_ENVIRONMENT + 'echo "$2" > "${4%/*}/../logs/$2.log"\n'
    before = os.umask(0o077)
    try:
        submission = make_submission(writes, site={"group_readable_logs": asked})
        submission()
    finally:
        os.umask(before)
    logs = submission.submit.parent.parent / "logs"
    files = [*logs.glob("*.o*"), *logs.glob("*.log")]
    assert len(files) == 5 + 4  # an array of two tasks and three jobs; a log a stage
    assert {group_and_others(file) for file in files} == ({"40"} if asked else {"00"})
    assert group_and_others(logs) == ("50" if asked else "00")
    assert group_and_others(logs.parent) == ("10" if asked else "00")


@pytest.mark.parametrize("site", ["gridengine", "slurm"])
def test_where_a_job_writes_straight_into_its_log_the_job_lets_the_group_read_it(
    site: str, make_jobs_run: RunFileMaker, tmp_path: Path
) -> None:
    file = write_site(tmp_path / "here.toml", scheduler=site, gpus=0, group_readable_logs=True)
    submit = Path(cptain("jobs", make_jobs_run(jobs__nodes=1), "--site", file).stdout.strip())
    log = tmp_path / "log"
    log.touch(mode=0o600)
    with open(log, "w") as output:
        subprocess.run(["bash", submit.with_name("convert.sh")], stdout=output, stderr=output, cwd=tmp_path)
    assert "no such image here" in log.read_text()
    assert group_and_others(log) == "40"
