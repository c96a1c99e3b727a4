"""How submitted jobs are, from what the schedulers say of them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain
from cptain.errors import CptainError
from cptain.scheduling.state import read_states, table
from stand_ins import (
    Submission,
    apptainer_of,
    programs,
)

RECORDINGS = Path(__file__).parent / "recordings"


def state_words(text: str) -> list[tuple[str, str, str]]:
    return [(state.job, state.word, state.detail) for state in read_states(text)]


@pytest.mark.parametrize(
    ("recording", "states"),
    [
        ("qstat-done", [("0.pbs0", "done", "")]),
        ("qstat-running", [("5.pbs0", "running", "pbs0")]),
        ("qstat-deleted", [("5.pbs0", "ending", "pbs0")]),
        ("qstat-exit7", [("1.pbs0", "failed", "exit status 7")]),
        ("qstat-queued-too-big", [("6.pbs0", "queued", "Can Never Run: Not enough total nodes available")]),
        ("qstat-afterok-of-a-failed-job", [("2.pbs0", "never ran", "depends on afterok:1.pbs0")]),
        (
            "qstat-array-task3-exit7",
            [("3[].pbs0", "done", ""), ("3[].pbs0", "done", ""), ("3[].pbs0", "failed", "exit status 7")],
        ),
        (
            "qstat-chain",
            [
                ("68[].pbs0", "waiting", "held by qhold: qrls 68[].pbs0"),
                ("69.pbs0", "queued", "Can Never Run: Insufficient amount of resource: ncpus (R: 9 A: 4 T: 4)"),
                ("70.pbs0", "waiting", "afterany:68[].pbs0:69.pbs0"),
                ("71.pbs0", "waiting", "afterany:70.pbs0"),
            ],
        ),
        (
            "qstat-blocked",
            [
                ("69.pbs0", "never ran", "deleted before it began"),
                ("70.pbs0", "blocked", "69.pbs0 never began: qdel 70.pbs0, and submit again"),
                ("71.pbs0", "blocked", "70.pbs0 never began: qdel 71.pbs0, and submit again"),
            ],
        ),
        ("qstat-held", [("71.pbs0", "waiting", "afterany:70.pbs0, held by qhold: qrls 71.pbs0")]),
        (
            "qstat-deleted-waiting",
            [
                ("69.pbs0", "never ran", "deleted before it began"),
                ("70.pbs0", "never ran", "deleted before it began"),
                ("71.pbs0", "never ran", "depends on afterany:70.pbs0"),
            ],
        ),
    ],
)
def test_what_a_real_openpbs_said_is_understood(recording: str, states: list[tuple[str, str, str]]) -> None:
    assert state_words((RECORDINGS / "openpbs" / f"{recording}.json").read_text()) == states


@pytest.mark.parametrize(
    ("recording", "job", "row"),
    [
        ("qstat-array-mixed", "72", "4 running, 1 failed, 1 queued  task 2: exit status 7"),
        ("qstat-array-ending", "68", "2 ending  node0"),
        ("qstat-array-deleted", "68", "2 deleted  tasks 1, 2: by jobuser@pbs0"),
    ],
)
def test_an_array_of_a_real_openpbs_names_its_tasks(recording: str, job: str, row: str, tmp_path: Path) -> None:
    submitted = tmp_path / "submitted"
    submitted.write_text(f"preprocess {job}[].pbs0\n")
    said = (RECORDINGS / "openpbs" / f"{recording}.json").read_text()
    assert table(submitted, said) == [f"preprocess  {job}[].pbs0  {row}"]
    if recording == "qstat-array-mixed":
        before = said.replace('"job_state":\t"X"', '"job_state":\t"R"')  # of task 2, before it failed
        assert table(submitted, before) == ["preprocess  72[].pbs0  5 running, 1 queued  node0, node1"]


def test_jobs_that_stopped_with_work_left_are_told_from_failures() -> None:
    text = "\n".join(
        f"JobId={number} JobName=x JobState={state} Reason={reason} ExitCode={code} NodeList=n[1-2]"
        for number, state, reason, code in [
            (1, "FAILED", "NonZeroExitCode", "75:0"),
            (2, "FAILED", "NonZeroExitCode", "1:0"),
            (3, "PENDING", "Dependency", "0:0"),
            (4, "TIMEOUT", "TimeLimit", "0:15"),
        ]
    )
    assert state_words(text) == [
        ("1", "stopped", "work is left"),
        ("2", "failed", "exit status 1"),
        ("3", "waiting", "Dependency"),
        ("4", "timeout", "killed at its walltime: jobs.margin is too short"),
    ]
    with pytest.raises(CptainError, match="cannot be read"):
        read_states("{")


@pytest.mark.parametrize("site", ["pbs", "tsubame4", "slurm"])
def test_the_state_of_a_run_that_was_never_submitted_is_one_line(site: str, make_jobs_run: RunFileMaker) -> None:
    submit = Path(cptain("jobs", make_jobs_run(), "--site", site).stdout.strip())
    done = subprocess.run(["bash", submit, "--state"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"submit.sh: {submit.parent}: nothing was submitted from here yet\n"


def test_the_state_of_submitted_jobs_is_what_cptain_makes_of_the_scheduler_s_output(
    make_jobs_run: RunFileMaker, tmp_path: Path
) -> None:
    """qstat is played by a script that prints what a real OpenPBS said."""
    submit = Path(cptain("jobs", make_jobs_run()).stdout.strip())
    (submit.parent / "submitted").write_text("preprocess 3[].pbs0\nconvert 1.pbs0\n")
    environment = apptainer_of(tmp_path, f'shift 3\nexec "{sys.executable}" -m cptain "$@"\n')
    qstat = tmp_path / "bin" / "qstat"
    qstat.write_text(f"#!/bin/bash\ncat '{RECORDINGS}/openpbs/qstat-array-task3-exit7.json'\n")
    qstat.chmod(0o755)
    done = subprocess.run(["bash", submit, "--state"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "preprocess  3[].pbs0  2 done, 1 failed  task 3: exit status 7",
        "convert     1.pbs0    unknown",
    ]


def finished(job: str, status: int, comment: str, **more: Any) -> str:
    """What qstat of OpenPBS says of a job that has ended; the comments are those of a real one."""
    return json.dumps({"Jobs": {job: {"job_state": "F", "Exit_status": status, "comment": comment, **more}}})


PBS_SAYS = """#!/bin/bash
[ $# != 0 ] || exit "${SERVER-0}"
case ${@: -1} in 9.pbs0) echo "qstat: 9.pbs0 Unknown Job Id" >&2; exit 153 ;; *) cat "$KEPT/${@: -1}" ;; esac
"""


def test_every_moment_of_pbs_has_its_own_word(make_submission: Callable[..., Submission]) -> None:
    submission = make_submission(f'#!/bin/bash\nshift 3\nexec "{sys.executable}" -m cptain "$@"\n')
    programs(submission.folder / "bin", qstat=PBS_SAYS.replace("$KEPT", str(submission.folder)))
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


def test_a_task_that_is_not_in_grid_engine_s_accounts_yet_is_unknown_and_not_done(tmp_path: Path) -> None:
    submitted = tmp_path / "submitted"
    submitted.write_text("preprocess 5\n")
    (tmp_path / "preprocess.sh").write_text("#!/bin/bash\n#$ -cwd\n#$ -t 1-2\n")
    told = f"{'=' * 62}\njobnumber    5\ntaskid       1\nfailed       0\nexit_status  0\n"
    assert table(submitted, told) == ["preprocess  5  1 done, 1 unknown"]
    assert table(submitted, told + told.replace("taskid       1", "taskid       2")) == ["preprocess  5  2 done"]


def test_a_job_that_ended_while_grid_engine_was_asked_is_one_job() -> None:
    listed = "".join(
        f"<job_list state='running'><JB_job_number>{job}</JB_job_number><state>r</state>"
        f"<queue_name>all.q@node0</queue_name>{tasks}</job_list>"
        for job, tasks in (("5", "<tasks>1</tasks>"), ("5", "<tasks>2</tasks>"), ("6", ""), ("7", ""))
    )
    text = f"<?xml version='1.0'?>\n<job_info><queue_info>{listed}</queue_info></job_info>\n"
    for job, task in (("5", "2"), ("7", "undefined")):
        text += f"{'=' * 62}\njobnumber    {job}\ntaskid       {task}\nfailed       0\nexit_status  0\n"
    assert [(state.job, state.word) for state in read_states(text)] == [
        ("5", "running"),
        ("6", "running"),
        ("5", "done"),
        ("7", "done"),
    ]
