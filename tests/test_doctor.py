"""cptain doctor: a healthy machine and run are said to be so, and every planted fault is found, named and answered."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, RunFileMaker, as_if_trained, cptain, in_megatron
from cptain.checkpoint.saved_files import write_record
from cptain.doctor import machine, of_run
from cptain.doctor.checks import Check, Found, Result, Subject, fail, look, ok
from cptain.doctor.report import MACHINE, RUN, line_of_node, table
from cptain.history import read_history, write_history
from cptain.run_file import load_run
from cptain.scheduling.sites import load_site
from cptain.training.flags import schedule_rows
from cptain.training.metrics import metrics_file
from stand_ins import KEEPS_ENVIRONMENT, Submission, programs


def states(results: list[Result]) -> dict[str, str]:
    return {one.name: one.state for one in results}


def edit_metrics(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite every line of a run's metrics."""
    metrics = metrics_file(load_run(file))
    lines = [json.dumps(change(json.loads(line))) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(f"{line}\n" for line in lines))


def test_a_healthy_run_is_all_ok_and_nothing_of_it_is_changed(own_trained_run: Path) -> None:
    run = load_run(own_trained_run)
    edit_metrics(own_trained_run, lambda line: {**line, "loss": 2.0})  # not the random model that the tests train
    (run.folder / "blend.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in run.work_dir.rglob("*")}
    results = look(RUN, Subject(run))
    assert set(states(results).values()) == {"ok"}, table(results)
    assert "goes from step 8 to 8" in table(results)
    assert "as the schedule says at 8 steps" in table(results)
    assert before == {path: path.stat().st_mtime_ns for path in run.work_dir.rglob("*")}


def test_the_command_prints_a_table_a_document_or_a_line_and_fails_on_a_fail(
    own_trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PATH", programs(tmp_path / "bin", apptainer="#!/bin/bash\necho apptainer version 1.4.5")["PATH"]
    )
    monkeypatch.setattr(machine, "_LITTLE", 0)
    shown = cptain("doctor", own_trained_run)
    assert shown.exit_code == 0, shown.output
    assert "apptainer version 1.4.5" in shown.stdout
    assert "warn  random model" in shown.stdout
    assert "do: cptain verify --logits" in shown.stdout
    line = cptain("doctor", own_trained_run, "--nodes").stdout
    assert line.count("\n") == 1
    assert ": warn: " in line
    document = json.loads(cptain("doctor", "--json").stdout)
    assert [one["name"] for one in document["checks"]] == [*(check.name for check in MACHINE), "GPU arithmetic"]
    wrong = cptain("doctor", own_trained_run, "--json", "--set", "train.steps=4")
    assert wrong.exit_code == 1
    assert wrong.stderr == "cptain: doctor: failed: train\n"
    failed = {one["name"]: one for one in json.loads(wrong.stdout)["checks"]}["train"]
    assert failed["state"] == "fail"
    assert "beyond it" in failed["means"]
    assert failed["remedy"]


def test_what_hangs_dies_or_is_a_defect_keeps_no_other_check() -> None:
    def dies(subject: Subject) -> Found:
        os._exit(3)

    def hangs(subject: Subject) -> Found:
        time.sleep(600)
        return ok("")

    checks = (
        Check("hangs", hangs, 0.3),
        Check("dies", dies),
        Check("defect", lambda subject: ok(str(1 // 0))),
        Check("long", lambda subject: fail("x" * 100_000, "less")),  # over what a pipe holds
    )
    found = {one.name: one for one in look(checks, Subject())}
    assert "no answer in 0.3 s" in found["hangs"].means
    assert found["dies"].state == found["hangs"].state == "fail"
    assert "ZeroDivisionError" in found["defect"].means
    assert found["long"].means == "x" * 100_000


def test_a_run_that_is_not_prepared_is_no_failure_and_what_train_refuses_is_one(
    make_run: RunFileMaker, make_ready_run: RunFileMaker
) -> None:
    new = of_run.train(Subject(load_run(make_run())))
    assert (new.state, new.remedy) == ("warn", "cptain preprocess RUN; cptain convert RUN")
    run = load_run(make_ready_run(train__megatron_args=["--rotary-base", "500000"]))
    (found,) = look((Check("train", of_run.train, 60),), Subject(run))
    assert found.state == "fail"
    assert "--rotary-base" in found.means


def test_a_loss_near_ln_v_is_that_of_a_random_model(own_trained_run: Path) -> None:
    run = load_run(own_trained_run)
    found = of_run.begins_at_random(Subject(run))
    assert found.state == "warn"
    assert "ln 500 = 6.21" in found.means
    edit_metrics(own_trained_run, lambda line: {**line, "loss": math.log(500) * 0.5})
    assert of_run.begins_at_random(Subject(run)).state == "ok"


def test_a_learning_rate_that_is_not_the_schedule_s_is_found(own_trained_run: Path) -> None:
    run = load_run(own_trained_run)
    assert of_run.learning_rate(Subject(run)).state == "ok"
    edit_metrics(own_trained_run, lambda line: {**line, "learning_rate": 9e-4} if line["step"] == 6 else line)
    found = of_run.learning_rate(Subject(run))
    assert found.state == "fail"
    assert found.means.startswith("step 6 had 0.0009, where the run file's schedule says ")
    (start,) = read_history(run.folder)
    write_history(run.folder, [replace(start, run={**start.run, "of_another_release": 1})])
    other = of_run.learning_rate(Subject(run))
    assert other.state == "warn"
    assert "steps 1 to 8 are of another release" in other.means


SCHEDULES = [("cosine", None), ("linear", None), ("constant", None)]
SCHEDULES += [("wsd", style) for style in ("linear", "cosine", "minus_sqrt", "exponential")]


def test_the_schedules_are_those_of_megatron(make_run: RunFileMaker) -> None:
    """Against OptimizerParamScheduler itself, which gets what `schedule_rows` says."""
    trains, told = [], []
    for schedule, style in SCHEDULES:
        keys: dict[str, Any] = {"train__warmup_steps": 5, "train__steps": 20, "train__schedule": schedule}
        keys |= {"train__min_lr": 0.0} if schedule == "constant" else {"train__decay_steps": 10}
        trains.append(load_run(make_run(**keys, **({"train__decay_style": style} if style else {}))).train)
        flags = {row[1]: row[2] for row in schedule_rows(trains[-1], 20)}
        told.append([trains[-1].lr, trains[-1].min_lr, flags])
    found = in_megatron(f"""
from types import SimpleNamespace
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
found = []
for lr, min_lr, flags in {told!r}:
    group = {{"lr": 0.0, "max_lr": lr, "min_lr": min_lr, "wd_mult": 1.0, "lr_mult": 1.0}}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]), 0.0, lr, min_lr, int(flags["--lr-warmup-iters"]),
        int(flags["--lr-decay-iters"]), flags["--lr-decay-style"], 0.0, 0.0, 20, "constant",
        wsd_decay_steps=int(flags.get("--lr-wsd-decay-iters", 0)), lr_wsd_decay_style=flags.get("--lr-wsd-decay-style"),
    )
    rates = []
    for _ in range(20):
        scheduler.step(1)
        rates.append(group["lr"])
    found.append(rates)
""")
    for train, rates in zip(trains, found, strict=True):
        assert [of_run.rate_at(train, 20, step) for step in range(1, 21)] == pytest.approx(rates, rel=1e-9, abs=1e-15)


def test_rows_of_padding_that_the_data_uses_are_counted(own_trained_run: Path, model: Path, tmp_path: Path) -> None:
    run = load_run(own_trained_run)
    smaller = tmp_path / "smaller"
    shutil.copytree(model, smaller)
    config = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    run = run.model_copy(update={"model": run.model.model_copy(update={"hf": str(smaller)})})
    found = of_run.padded_rows(Subject(run))
    assert found.state == "fail"
    assert "have no row among the model's 400" in found.means


def test_an_optimizer_state_of_another_layout_is_named_with_the_way_out(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run()
    as_if_trained(file, 1)
    run = load_run(file)
    other = run.model_copy(update={"parallel": run.parallel.model_copy(update={"pipeline": 2})})
    folder = run.checkpoints_folder / "iter_0000001"
    for kind, state in (("fully_reshardable", "ok"), ("dp_reshardable", "fail")):
        common = torch.load(folder / "common.pt", weights_only=False)
        common["content_metadata"] = {"distrib_optim_sharding_type": kind}
        torch.save(common, folder / "common.pt")
        write_record(folder)
        assert of_run.optimizer(Subject(run)).state == "ok"  # the layout is the same
        found = of_run.optimizer(Subject(other))
        assert found.state == state
    assert "dp_reshardable, which loads at parallel.tensor = 1, parallel.pipeline = 1 alone" in found.means
    assert "--dist-ckpt-optim-fully-reshardable" in found.remedy


def test_a_mask_that_another_script_would_ignore_is_named(make_run: RunFileMaker, tmp_path: Path) -> None:
    (tmp_path / "own.py").touch()
    asked = make_run(train__script=str(tmp_path / "own.py"), train__megatron_args=["--reset-attention-mask"])
    assert of_run.masks(Subject(load_run(asked))).state == "warn"
    assert of_run.masks(Subject(load_run(make_run()))).state == "ok"


def test_a_site_that_cannot_take_the_run_is_named(make_jobs_run: RunFileMaker) -> None:
    site, file = load_site("tsubame4")
    found = look((Check("site", of_run.site, 60),), Subject(load_run(make_jobs_run(jobs__nodes=500)), site, file.stem))
    assert found[0].state == "fail"
    assert "jobs.nodes = 500: site tsubame4 allows at most 64" in found[0].means


DOCTOR = """#!/bin/bash
[ "$1" = exec ] || exit 9
case $CPTAIN_NODE in
  0) echo "doctor: node0: ok: 16 checks" ;;
  1) @ ;;
esac
"""


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ('echo "doctor: node1: ok: 16 checks"', ""),
        ('echo "doctor: node1: fail: GPU arithmetic: GPU 3: no answer in 20 s"', "node1: fail: GPU arithmetic: GPU 3"),
        ("exit 1", "doctor.sh: 1 of 2 nodes answered: node0, of "),
    ],
)
def test_a_job_looks_at_every_node_and_names_the_bad_ones(
    second: str, says: str, make_submission: Callable[..., Submission]
) -> None:
    submission = make_submission(DOCTOR.replace("@", second))
    jobs = submission.submit_only("doctor")
    submission.wait()
    assert list(jobs) == ["doctor"]
    said = submission.said()
    assert "doctor: node0: ok: 16 checks" in said
    assert says in said
    assert submission.job(jobs["doctor"])["Exit_status"] == (1 if says else 0)
    folder = submission.submit.parent
    assert not (folder / "submitted").exists()
    assert not (folder / "environment").exists()
    assert not list(folder.parent.rglob("hosts-*"))


def test_the_command_itself_says_a_line_on_every_node(make_submission: Callable[..., Submission]) -> None:
    program = f"""#!/bin/bash
while [ "$1" != cptain ]; do shift; done
export PYTHONPATH={PROJECT}/apps
exec "{sys.executable}" -m "$@"
"""
    submission = make_submission(program, {"gpus": 0})
    jobs = submission.submit_only("doctor")
    submission.wait()
    lines = [line for line in submission.said().splitlines() if line.startswith("doctor: ")]
    assert len(lines) == 2, submission.said()
    assert all("train: the data and the converted checkpoint not made yet" in line for line in lines), lines
    assert submission.job(jobs["doctor"])["Exit_status"] == 0, lines
    assert not (load_run(submission.submit.parent / "run.toml").folder / "data-args.txt").exists()


def test_submit_looks_at_nodes_only_when_asked(make_submission: Callable[..., Submission]) -> None:
    submission = make_submission(KEEPS_ENVIRONMENT)
    shown = subprocess.run(["bash", submission.submit, "--dry-run"], capture_output=True, text=True, check=True).stdout
    assert "doctor" not in shown
    assert "walltime=00:10:00" in (submission.submit.parent / "doctor.sh").read_text()


def test_a_line_of_a_node_says_the_worst() -> None:
    found = [Result("a", "ok", "x", ""), Result("b", "warn", "y", "do y"), Result("c", "fail", "z", "do z")]
    assert line_of_node(found).endswith(": fail: c: z (do: do z)")
    assert line_of_node(found[:2]).endswith(": warn: b: y (do: do y)")
    assert line_of_node(found[:1]).endswith(": ok: 1 checks")
