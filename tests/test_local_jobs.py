"""submit.sh without a scheduler: the stages one after the other, here and now."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import RunFileMaker, cptain
from stand_ins import apptainer_of


def local_run(make_jobs_run: RunFileMaker, tmp_path: Path) -> Path:
    """submit.sh of a run of the local site, three train jobs long."""
    (tmp_path / "cptain.sif").touch()
    file = make_jobs_run(jobs__site="local", jobs__nodes=1, jobs__chain=3, jobs__image=str(tmp_path / "cptain.sif"))
    result = cptain("jobs", file)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip())


# Keeps the stage and its link, and ends with the status that the file of that name holds.
STATUSES = """while [ "$1" != --app ]; do shift; done
echo "$2$CPTAIN_LINK" >> "$KEPT/stages"
exit "$(cat "$KEPT/$2$CPTAIN_LINK" 2> /dev/null || echo 0)"
"""


@pytest.mark.parametrize(
    ("statuses", "stages", "status", "says"),
    [
        ({"train1": 75, "train2": 75}, "preprocess convert train1 train2 train3 export", 0, ""),
        (
            {"train1": 75, "train2": 75, "train3": 75},
            "preprocess convert train1 train2 train3",
            75,
            "submit.sh: train.3: stopped with work left; the same command continues\n",
        ),
        ({"train1": 75, "train2": 1}, "preprocess convert train1 train2", 1, "submit.sh: train.2: exit status 1\n"),
        (
            {"convert": 75},
            "preprocess convert",
            75,
            "submit.sh: convert: stopped with work left; the same command continues\n",
        ),
    ],
)
def test_without_a_scheduler_a_train_job_that_stops_with_work_left_is_followed_by_the_next(
    statuses: dict[str, int], stages: str, status: int, says: str, make_jobs_run: RunFileMaker, tmp_path: Path
) -> None:
    submit = local_run(make_jobs_run, tmp_path)
    for stage, code in statuses.items():
        (tmp_path / stage).write_text(str(code))
    environment = apptainer_of(tmp_path, STATUSES)
    done = subprocess.run(["bash", submit], env=environment, capture_output=True, text=True)
    assert (tmp_path / "stages").read_text().split() == stages.split()
    assert (done.returncode, done.stderr) == (status, says)


def test_without_a_scheduler_ctrl_c_ends_the_stage_in_hand_and_starts_no_other(
    make_jobs_run: RunFileMaker, tmp_path: Path
) -> None:
    submit = local_run(make_jobs_run, tmp_path)
    environment = apptainer_of(
        tmp_path,
        'while [ "$1" != --app ]; do shift; done\necho "$2" >> "$KEPT/stages"\n[ "$2" = train ] || exit 0\n'
        'trap "exit 75" INT\ntouch "$KEPT/training"\nwhile :; do sleep 0.05; done\n',
    )
    process = subprocess.Popen(
        ["bash", submit], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "training").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (tmp_path / "stages").read_text().split() == ["preprocess", "convert", "train"]
    assert (process.returncode, said) == (
        75,
        "submit.sh: train.1: stopped with work left; the same command continues\n",
    )
