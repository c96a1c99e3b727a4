"""cptain status: every run under a work_dir, and where the time of one went, from what the stages left."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain
from cptain.history import KILLED, RUNNING, Start, read_history, write_history
from cptain.run_file import RunFile, load_run
from cptain.scheduling.chain import spent
from cptain.training.attempt import Attempt
from cptain.training.metrics import metrics_file
from test_openpbs import STATUSES, MakeSubmission


def start(began: int, first: int, last: int, outcome: str, ended: int | None = None, saved: int = 0) -> Start:
    """One that began and ended at these seconds of a day."""

    def clock(seconds: int) -> str:
        return time.strftime("2026-11-25T%H:%M:%S+0000", time.gmtime(seconds))

    begin = Start(clock(began), first - 1, 100, {}, {}, {"processes": 4}, {}, last=last, saved=saved, outcome=outcome)
    return dataclasses.replace(begin, ended=clock(ended) if ended else "")


DAY = 1795564800.0  # 2026-11-25 00:00 UTC


def line(step: int, at: float, **values: float) -> dict[str, Any]:
    return {"step": step, "time": DAY + at, **values}


def steps(first: int, last: int, begin: float, seconds: float = 2.0) -> list[dict[str, Any]]:
    count = range(last - first + 1)
    return [line(first + n, begin + seconds * (n + 1), loss=2.0, step_seconds=seconds) for n in count]


def test_all_time_of_a_chain_is_trained_validated_saved_lost_or_waited() -> None:
    starts = [
        start(100, 1, 20, KILLED),
        start(400, 11, 20, "stopped at the job's deadline", ended=440, saved=20),
        start(500, 21, 25, RUNNING),
    ]
    lines = [
        *steps(1, 10, 130),  # 30 s to start, 20 s that count
        line(10, 155, validation_loss=3.0),  # 5 s
        *steps(11, 20, 165),  # 10 s to save before them; done again
        *steps(11, 20, 410),
        *steps(21, 25, 503),
    ]
    times = spent(starts, lines, saved=20, submitted=DAY + 40)
    assert dataclasses.asdict(times) == {
        "trained": 20 + 20 + 10,
        "lost": 20,
        "validated": 5,
        "saved": 10 + 10,  # the second: from its last step to its end
        "started": 30 + 10 + 3,
        "waited": 60 + (400 - 185) + 60,
    }
    assert times.whole == 513 - 40


def test_steps_that_a_failed_start_did_not_save_are_lost_and_those_of_a_running_one_are_not() -> None:
    lines = steps(1, 10, 0)
    assert spent([start(0, 1, 10, "failed: x", ended=20)], lines, saved=4, submitted=None).lost == 12
    assert spent([start(0, 1, 10, RUNNING)], lines, saved=4, submitted=None).lost == 0
    assert spent([], [], saved=0, submitted=None).whole == 0


def test_of_a_real_training_the_parts_make_the_whole(trained_run: Path) -> None:
    run = load_run(trained_run)
    result = json.loads(cptain("status", trained_run, "--json").stdout)
    (one,) = read_history(run.folder)
    whole = time.mktime(time.strptime(one.ended[:19], "%Y-%m-%dT%H:%M:%S")) - time.mktime(
        time.strptime(one.began[:19], "%Y-%m-%dT%H:%M:%S")
    )
    assert sum(result["times"].values()) == pytest.approx(whole, abs=2)  # the history has whole seconds
    assert result["times"]["lost"] == result["times"]["waited"] == 0
    assert (result["step"], result["steps"], result["checkpoint"], result["exported"]) == (8, 8, 8, None)
    lines = cptain("status", run.folder).stdout.splitlines()
    assert lines[0].split() == ["run", "run"]
    assert any(text.startswith("start 1: 20") and text.endswith(": steps 1 to 8, saved at 8: done") for text in lines)
    assert lines[-1].startswith("in all")


@pytest.fixture
def own_run(own_trained_run: Path) -> RunFile:
    """Trained, in a folder of this test's own."""
    return load_run(own_trained_run)


def next_of(run: RunFile) -> str:
    content: dict[str, Any] = json.loads(cptain("status", run.folder, "--json").stdout)
    return str(content["next"])


def test_every_stage_of_a_run_says_what_to_do_next(
    own_run: RunFile, make_run: RunFileMaker, tmp_path: Path, ready_run: Path
) -> None:
    assert next_of(own_run) == f"cptain export {own_run.folder}/run.toml"
    (own_run.hf_folder / "iter_0000008").mkdir(parents=True)
    (own_run.hf_folder / "iter_0000008" / "config.json").touch()
    assert next_of(own_run) == ""
    new = load_run(make_run(name="new", jobs__image="/x.sif", jobs__site="local"))
    assert cptain("jobs", tmp_path / "run.toml").exit_code == 0
    assert next_of(new) == f"bash {new.folder}/jobs/submit.sh"
    table = [text.split("  ") for text in cptain("status", tmp_path / "runs").stdout.splitlines()]
    assert [row[0].strip() for row in table] == ["run", "new", "run"]


def test_what_to_do_can_be_pasted_where_a_folder_s_name_is_odd(make_run: RunFileMaker, tmp_path: Path) -> None:
    file = make_run(work_dir=str(tmp_path / '走る it\'s "q"'), jobs__image="/x.sif", jobs__site="local")
    assert cptain("jobs", file).exit_code == 0
    run = load_run(file)
    for submit, words in (
        (run.folder / "jobs" / "submit.sh", ["bash"]),
        (run.folder / "run.toml", ["cptain", "preprocess"]),
    ):
        assert shlex.split(next_of(run)) == [*words, str(submit)]
        (run.folder / "jobs" / "submit.sh").unlink(missing_ok=True)


def test_a_link_that_failed_says_what_the_next_one_does(own_run: RunFile) -> None:
    one = dataclasses.replace(read_history(own_run.folder)[0], steps=20, outcome="failed: node1: SIGKILL")
    write_history(own_run.folder, [one])
    jobs = own_run.folder / "jobs"
    jobs.mkdir()
    (jobs / "submitted").write_text(f"train.1 1.pbs0 {jobs}\ntrain.2 2.pbs0 {jobs}\n")
    told = {"time": time.time(), "words": {"1.pbs0": "failed", "2.pbs0": "queued"}}
    (jobs / "states.json").write_text(json.dumps(told))
    assert next_of(own_run) == "the next job of the chain goes on from step 8"
    attempt = Attempt(own_run, 8)
    for _ in range(2):
        attempt.begin()
        attempt.failed("node1: SIGKILL", only_if_unsaid=False)
    assert next_of(own_run) == ("the next job of the chain gives up: 2 trainings failed at step 8: node1: SIGKILL")
    (jobs / "submit.sh").touch()
    (jobs / "states.json").write_text(json.dumps({"time": time.time(), "words": {}}))
    (jobs / "submitted").unlink()
    assert next_of(own_run) == f"failed: node1: SIGKILL; then bash {jobs}/submit.sh train export"


def test_a_start_that_was_killed_before_it_could_say_so_is_over_once_the_scheduler_has_told(own_run: RunFile) -> None:
    (one,) = read_history(own_run.folder)
    write_history(own_run.folder, [dataclasses.replace(one, steps=20, saved=4, outcome=RUNNING, ended="")])
    jobs = own_run.folder / "jobs"
    jobs.mkdir()
    (jobs / "submitted").write_text(f"train.1 1.pbs0 {jobs}\ntrain.2 2.pbs0 {jobs}\nexport 3.pbs0 {jobs}\n")
    (jobs / "submit.sh").touch()
    again = f"bash {jobs}/submit.sh train export"
    for words, later, says in (
        (("running", "waiting", "waiting"), 1, "wait"),
        (("failed", "never ran", "never ran"), -86400, "wait"),  # told before this training began
        (("failed", "never ran", "never ran"), 86400, f"killed; then {again}"),
        (("failed", "blocked", "blocked"), 86400, f"killed; then qdel 2.pbs0, then {again}"),
    ):
        told = {"time": time.time() + later, "words": {f"{job}.pbs0": word for job, word in enumerate(words, 1)}}
        (jobs / "states.json").write_text(json.dumps(told))
        assert next_of(own_run) == says
    said = cptain("status", own_run.folder).stdout
    assert ": steps 1 to 8, saved at 4: killed\n" in said


def test_jobs_have_the_words_that_the_scheduler_last_told(make_submission: MakeSubmission) -> None:
    submission = make_submission(STATUSES, jobs__chain=2)
    jobs = submission.submit_only()
    folder = submission.submit.parent.parent

    def cells() -> tuple[str, str | None]:
        result = cptain("status", folder, "--json")
        assert result.exit_code == 0, result.output
        one: dict[str, Any] = json.loads(result.stdout)
        return one["job"], one["word"]

    submission.wait()
    assert cells() == (jobs["convert"], "submitted")  # which left nothing behind, in this test
    assert next_of(load_run(folder / "jobs" / "run.toml")) == f"bash {submission.submit} --state"
    submission.run("bash", submission.submit, "--state")
    assert cells() == (jobs["convert"], "done")


def test_a_hundred_runs_are_a_table_in_little_reading(own_run: RunFile, tmp_path: Path) -> None:
    work_dir, metrics = tmp_path / "many", metrics_file(own_run).read_bytes()
    for number in range(100):
        folder = work_dir / f"run-{number:02d}"
        (folder / "logs").mkdir(parents=True)
        (folder / "checkpoints").mkdir()
        for name in ("run.toml", "history.jsonl", "checkpoints/latest_checkpointed_iteration.txt"):
            shutil.copy(own_run.folder / name, folder / name)
        (folder / "logs" / "metrics.jsonl").write_bytes(metrics * 1000)
    (work_dir / "run-07" / "history.jsonl").write_text("{}\n")
    (work_dir / "no run").mkdir()
    result = cptain("status", work_dir, "--json")
    found = json.loads(result.stdout)
    assert [one["name"] for one in found] == [f"run-{number:02d}" for number in range(100)]
    assert {one["step"] for one in found if one["name"] != "run-07"} == {8}
    assert "history.jsonl: cannot be read" in found[7]["next"]


def test_status_watches_until_ctrl_c_and_refuses_what_is_not_there(own_run: RunFile) -> None:
    command = [sys.executable, "-m", "cptain", "status", str(own_run.work_dir), "--watch"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("run ")
    process.send_signal(2)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "")
    assert cptain("status", "/no/such").output == "cptain: /no/such: no such run file or folder\n"
    assert cptain("status", own_run.logs_folder).output == "no runs here\n"


def test_each_run_of_a_sweep_has_its_own_jobs(make_submission: MakeSubmission) -> None:
    submission = make_submission(sweep={"train.lr": [1e-3, 2e-3]})
    jobs = submission.submit_only("train", "export")
    submission.wait()
    work_dir = submission.submit.parent.parent.parent
    for folder in work_dir.glob("run-*"):  # as if the jobs had left something
        run = load_run(folder / "jobs" / "run.toml")
        for left in (run.data_folder / "manifest.json", run.megatron_folder / "latest_checkpointed_iteration.txt"):
            left.parent.mkdir(parents=True, exist_ok=True)
            left.write_text("release")
    found = json.loads(cptain("status", work_dir, "--json").stdout)
    assert {one["name"]: one["job"] for one in found} == {
        "run-lr0.001": jobs["train-run-lr0.001.1"],
        "run-lr0.002": jobs["train-run-lr0.002.1"],
    }
