"""The jobs under OpenPBS's rules, which tests/openpbs.py plays: a chain, an array, deletions, and a node that fails."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROJECT, cptain
from cptain.run_file import load_run
from stand_ins import Submission, programs

RECORDINGS = PROJECT / "tests" / "recordings"

# The image of these tests: preprocess and status are cptain's own; the other stages end with the status that the file
# of their name and link has, as "train2".
STATUSES = f"""#!/bin/bash
export PYTHONPATH="{PROJECT}/apps"
if [ "$1" = exec ]; then shift 3; exec "{sys.executable}" -m cptain "$@"; fi
while [ "$1" != --app ]; do shift; done
[ "$2" != preprocess ] || exec "{sys.executable}" -m cptain preprocess "${{@:4}}"
echo "$2${{CPTAIN_LINK-}} on $(uname -n)" >> "$KEPT/stages"
exit "$(cat "$KEPT/$2${{CPTAIN_LINK-}}" 2> /dev/null || echo 0)"
"""
SLEEPS = """#!/bin/bash
while [ "$1" != --app ]; do shift; done
trap 'echo TERM >> "$KEPT/signals"' TERM
touch "$KEPT/$2${CPTAIN_LINK-}"
while :; do sleep 0.1 & wait $!; done
"""
# On the first node, until the second has ended, and the process that the job waits for, whose number is in that file.
FIRST_OF_TWO = """#!/bin/bash
touch "$KEPT/began"
until [ -s "$KEPT/ended" ]; do sleep 0.02; done
while kill -0 "$(cat "$KEPT/ended")" 2> /dev/null; do sleep 0.02; done
"""

MakeSubmission = Callable[..., Submission]


def states(submission: Submission) -> list[list[str]]:
    """The table of submit.sh --state, but for the ids."""
    done = submission.run("bash", submission.submit, "--state")
    assert done.returncode == 0, done.stderr
    return [[cell for n, cell in enumerate(re.split(r" {2,}", line)) if n != 1] for line in done.stdout.splitlines()]


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.02)


@pytest.mark.parametrize("prints", ["all", "first_only"])
def test_an_array_and_a_chain_of_two_links_run_and_submit_says_how_each_job_is(
    prints: str, make_submission: MakeSubmission
) -> None:
    submission = make_submission(STATUSES, jobs__chain=2)
    (submission.pbs / prints).touch()  # qstat's two ways of printing
    (submission.folder / "train1").write_text("75")
    said = submission()
    assert states(submission) == [
        ["preprocess", "2 done"],
        ["convert", "done"],
        ["train.1", "stopped", "work is left"],
        ["train.2", "done"],
        ["export", "done"],
    ]
    stages = (submission.folder / "stages").read_text().splitlines()
    assert (stages[0], stages[-1]) == ("convert on node0", "export on node0")
    assert sorted(stages[1:-1]) == [f"train{link} on node{host}" for link in (1, 2) for host in (0, 1)]
    run = load_run(submission.submit.parent / "run.toml")
    manifest = json.loads((run.data_folder / "manifest.json").read_text())
    assert manifest["files"] == 3
    assert "preprocess: part 1 of 2" in said
    assert not list(run.logs_folder.glob("hosts-*"))


def test_nodes_that_pbs_packs_on_one_host_reach_train_as_one(make_submission: MakeSubmission) -> None:
    submission = make_submission(STATUSES, site={"train": ["-l select={nodes}:mpiprocs=2"]})
    submission("train")
    assert (submission.folder / "stages").read_text().splitlines() == ["train1 on node0"]  # and there it is refused


def test_a_deleted_job_is_told_twice_and_followed_by_the_next_and_deleting_a_waiting_one_ends_the_chain(
    make_submission: MakeSubmission,
) -> None:
    submission = make_submission(SLEEPS, jobs__chain=3)
    (submission.pbs / "kill_delay").write_text("0.5")
    jobs = submission.submit_only("train", "export")
    wait_for(submission.folder / "train1")
    submission.run("qdel", jobs["train.1"])
    wait_for(submission.folder / "train2")
    assert (submission.folder / "signals").read_text().count("TERM") == 4  # twice on each of two nodes
    submission.run("qdel", jobs["train.3"])
    submission.run("qdel", jobs["train.2"])
    submission.wait()
    programs(submission.folder / "bin", apptainer=STATUSES)
    assert [row[:2] for row in states(submission)] == [
        ["train.1", "deleted"],
        ["train.2", "deleted"],
        ["train.3", "never ran"],
        ["export", "never ran"],
    ]


def test_what_waits_is_named_and_what_waits_for_a_job_deleted_in_the_queue_is_blocked(
    make_submission: MakeSubmission,
) -> None:
    submission = make_submission(STATUSES, jobs__chain=2)
    full = submission.pbs / "full"
    full.touch()
    jobs = submission.submit_only()
    assert states(submission) == [
        ["preprocess", "queued"],
        ["convert", "queued"],
        ["train.1", "waiting", f"afterany:{jobs['preprocess']}:{jobs['convert']}"],
        ["train.2", "waiting", f"afterany:{jobs['train.1']}"],
        ["export", "waiting", f"afterany:{jobs['train.2']}"],
    ]
    submission.run("qdel", jobs["convert"])
    while submission.job(jobs["convert"])["job_state"] != "F":
        time.sleep(0.02)
    full.unlink()
    while submission.job(jobs["preprocess"])["job_state"] != "F":
        time.sleep(0.02)
    blocked = "{} never began: qdel {}, and submit again"
    assert states(submission) == [
        ["preprocess", "2 done"],
        ["convert", "never ran", "deleted before it began"],
        ["train.1", "blocked", blocked.format(jobs["convert"], jobs["train.1"])],
        ["train.2", "blocked", blocked.format(jobs["train.1"], jobs["train.2"])],
        ["export", "blocked", blocked.format(jobs["train.2"], jobs["export"])],
    ]
    overview = cptain("status", submission.submit.parents[2]).stdout.splitlines()[1]
    assert f"  qdel {jobs['train.1']}, then bash {submission.submit}" in overview
    submission.run("qdel", jobs["train.1"])
    submission.wait()
    assert states(submission)[2:] == [
        ["train.1", "never ran", "deleted before it began"],
        ["train.2", "never ran", f"depends on afterany:{jobs['train.1']}"],
        ["export", "never ran", f"depends on afterany:{jobs['train.2']}"],
    ]


def test_a_pbs_that_keeps_no_history_tells_of_the_jobs_that_it_has(make_submission: MakeSubmission) -> None:
    submission = make_submission(STATUSES)
    for name in ("no_history", "full"):
        (submission.pbs / name).touch()
    jobs = submission.submit_only("convert", "train")
    assert states(submission) == [["convert", "queued"], ["train.1", "waiting", f"afterany:{jobs['convert']}"]]
    (submission.pbs / "full").unlink()
    submission.wait()
    assert states(submission) == [[name, "purged", "PBS has forgotten it"] for name in ("convert", "train.1")]


def test_an_array_that_was_deleted_in_the_queue_holds_nothing_back(make_submission: MakeSubmission) -> None:
    submission = make_submission(STATUSES)
    (submission.pbs / "full").touch()
    jobs = submission.submit_only("preprocess", "train")
    submission.run("qdel", jobs["preprocess"])
    while states(submission)[1] != ["train.1", "queued"]:
        time.sleep(0.02)
    (submission.pbs / "full").unlink()
    submission.wait()
    assert states(submission) == [["preprocess", "never ran", "deleted before it began"], ["train.1", "done"]]


def test_a_deleted_array_and_a_job_that_its_walltime_ended_are_told_apart(make_submission: MakeSubmission) -> None:
    submission = make_submission(SLEEPS, site={"cpu_walltime": "00:00:01"}, jobs__shards=2)
    (submission.pbs / "kill_delay").write_text("0.1")
    jobs = submission.submit_only("preprocess", "convert")
    wait_for(submission.folder / "preprocess", submission.folder / "convert")
    submission.run("qdel", jobs["preprocess"])
    submission.wait()
    programs(submission.folder / "bin", apptainer=STATUSES)
    (array, convert) = states(submission)
    assert array[1] == "deleted" or set(array[1].split(", ")) <= {"1 deleted", "1 timeout", "2 deleted"}
    assert convert[1:] == ["timeout", "killed at its walltime: jobs.margin is too short"]


@pytest.mark.parametrize("missing", ["apptainer", "cptain.sif"])
@pytest.mark.parametrize("launcher", ["pbs_tmrsh", "mpirun"])
def test_what_only_the_second_node_lacks_is_named_with_its_host(
    missing: str, launcher: str, make_submission: MakeSubmission
) -> None:
    submission = make_submission(FIRST_OF_TWO, site={"launcher": launcher})
    lacks = submission.folder / ("bin/apptainer" if missing == "apptainer" else missing)
    # Each launcher's way to the second host, where the file is not.
    second = f'until [ -e "{submission.folder}/began" ]; do sleep 0.02; done; rm "{lacks}"\nHOSTNAME=node1 "$@"\n'
    second += f'status=$?; echo "$number" > "{submission.folder}/ended"; exit $status\n'
    mpirun = 'while [ "$1" != env ]; do shift; done\n"$@" &\nnumber=none\n'
    start = {"mpirun": mpirun, "pbs_tmrsh": "number=$PPID\nshift\n"}[launcher]
    programs(submission.folder / "bin", **{launcher: f"#!/bin/bash\n{start}{second}"})
    said = submission("train")
    line = f"train.sh on node1: {lacks}: the first node of the job has it, and this one does not\n"
    assert said.count(line) == 1
    assert submission.job("1.pbs0")["Exit_status"] == 1


@pytest.mark.parametrize("version", ["4.1.4", "5.0.11"])
def test_mpirun_s_words_about_a_failed_node_do_not_follow_the_reason_and_its_other_errors_do(
    version: str, make_submission: MakeSubmission
) -> None:
    submission = make_submission(site={"launcher": "mpirun"})
    for recording, kept in (("node-failed", "cptain: train: node1: the reason\n"), ("too-few-slots", None)):
        text = (RECORDINGS / "openmpi" / f"{version}-{recording}.txt").read_text()
        said = submission.folder / "said"
        said.write_text(text)
        mpirun = f'#!/bin/bash\ncat "{said}" >&2\nexit 75\n'
        slow_sed = '#!/bin/bash\nsleep 0.3\nexec /usr/bin/sed "$@"\n'  # the job waits for its last lines
        programs(submission.folder / "bin", mpirun=mpirun, sed=slow_sed)
        before = submission.said()
        assert submission("train").removeprefix(before) == (text if kept is None else kept)
        assert submission.job(f"{len(submission.qsub())}.pbs0")["Exit_status"] == 75
