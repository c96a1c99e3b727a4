"""Chains of train jobs, and the runs that one run file with a [sweep] describes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, RunFileMaker, cptain, refused
from cptain.errors import CptainError
from cptain.run_file import load_run
from cptain.scheduling.render import chain_length
from cptain.scheduling.sweep import expand
from stand_ins import dry_run, shellcheck


def test_a_chain_is_as_long_as_the_steps_need_and_one_more(make_jobs_run: RunFileMaker) -> None:
    def length(**changes: Any) -> int:
        return chain_length(load_run(make_jobs_run(**changes)))

    long = {"train__steps": 3600, "jobs__walltime": "10:10:00"}  # ten hours and the margin
    assert length(jobs__chain=7) == 7
    assert length(**long) == 2  # nothing tells how long a step takes
    assert length(**long, jobs__seconds_per_step=1.0) == 2
    assert length(**long, jobs__seconds_per_step=10.0) == 2
    assert length(**long, jobs__seconds_per_step=10.1) == 3
    assert length(**long, jobs__seconds_per_step=40.0) == 5
    with pytest.raises(CptainError, match=r"jobs\.chain: 3600 steps of 2000 s are 201 jobs"):
        length(**long, jobs__seconds_per_step=2000.0)


def test_a_chain_learns_from_earlier_logs(trained_run: Path) -> None:
    run = load_run(trained_run, ("jobs.walltime=00:10:01", "train.steps=1000000"))
    with pytest.raises(CptainError, match="1000000 steps of"):
        chain_length(run)


def test_a_sweep_is_one_run_a_combination_that_share_what_they_can(
    make_jobs_run: RunFileMaker, text_folder: Path
) -> None:
    file = make_jobs_run(
        name="base",
        sweep={
            "train.lr, train.min_lr": [[1e-3, 1e-4], [2.5e-5, 2e-6]],
            "data.input": [[f"{text_folder}/*.jsonl"], [f"{text_folder}/sub/*"]],
            "jobs.nodes": [1],
        },
    )
    runs = expand(load_run(file), file)
    assert [run.name for run in runs] == [
        "base-lr0.001-input1-nodes1",
        "base-lr0.001-input2-nodes1",
        "base-lr2.5e-05-input1-nodes1",
        "base-lr2.5e-05-input2-nodes1",
    ]
    assert [run.train.min_lr for run in runs] == [1e-4, 1e-4, 2e-6, 2e-6]
    shared = load_run(file).folder
    assert {run.megatron_folder for run in runs} == {shared / "megatron"}
    assert [run.data_folder for run in runs] == [shared / "data-1", shared / "data-2"] * 2
    assert not any(run.sweep for run in runs)
    result = cptain("jobs", file)
    assert result.exit_code == 0, result.output
    lines = dry_run(shared / "jobs" / "submit.sh")
    assert sum("preprocess.sh" in line for line in lines) == 2
    assert sum("convert.sh" in line for line in lines) == 1
    assert sum("export.sh" in line for line in lines) == 4
    shellcheck(shared / "jobs" / "submit.sh")


def test_the_lab_s_six_experiments_differ_only_where_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert cptain("jobs", PROJECT / "runs" / "swallow-8b-sweep.toml", "--out", tmp_path).exit_code == 0
    names = [f"exp{number}" for number in range(1, 7)]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == names
    runs = [load_run(tmp_path / name / "run.toml") for name in names]
    assert len({(run.train.lr, tuple(run.data.input), run.jobs.nodes) for run in runs}) == 6
    assert [run.jobs.nodes for run in runs] == [4, 4, 4, 4, 4, 16]
    plain = {}
    for name in names:
        text = (tmp_path / name / "train.sh").read_text()
        plain[name] = text.replace(name, "NAME")
    assert len({plain[name] for name in names[:5]}) == 1
    changed = set(plain["exp6"].splitlines()) - set(plain["exp1"].splitlines())
    assert sorted(line.split("  #")[0] for line in changed) == [
        "#$ -l h_rt=01:40:00",
        "#$ -l node_f=16",
        "deadline=$(($(date +%s) + 5400))",
        'settings+=("CPTAIN_LINK=${LINK:-1}" CPTAIN_NODES=16 CPTAIN_GPUS=4 "CPTAIN_DEADLINE=$deadline" '
        "CPTAIN_CORES_PER_GPU=48)",
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sweep": {"train.learning_rate": [1]}}, 'no key "train.learning_rate" in a run file'),
        ({"sweep": {"sweep": [1]}}, 'no key "sweep" in a run file'),
        ({"sweep": {"train.lr, train.min_lr": [[1e-3]]}}, "allowed: lists of 2 values; not [0.001]"),
        ({"sweep": {"train.lr": [1e-3, -1]}}, "train.lr = -1: input should be greater than 0"),
        ({"sweep": {"train.lr": [1e-3, 1e-3]}}, 'sweep: two of its runs would be "run-lr0.001"'),
        (
            {"sweep": {"data.input": [["/a/*"], ["/b/*"]]}, "data__output": "/shared"},
            "data.output is one folder, and the sweep would put different things into it",
        ),
    ],
)
def test_a_sweep_that_is_none_is_refused(changes: dict[str, Any], says: str, make_jobs_run: RunFileMaker) -> None:
    assert says in refused(make_jobs_run(**changes))


@pytest.mark.parametrize(
    "sweep",
    [
        {"train.lr": [2.5e-4, 1e-3], "data.key": ["text", "body"]},
        {"name, train.lr, train.min_lr": [["true", 1e-3, 1e-4], ["an exp 2", 1e-3, 2e-6]], "jobs.nodes": [1]},
        {"train.tokens": ["8K"], "train.megatron_args": [["--log-interval", "2"]], "data.mix": ["uniform"]},
    ],
)
def test_a_stage_refuses_a_sweep_with_a_command_that_does_one_of_its_runs(
    sweep: dict[str, Any], make_jobs_run: RunFileMaker, tmp_path: Path
) -> None:
    file = make_jobs_run(name="base", jobs__nodes=1, sweep=sweep)
    assert cptain("jobs", file, "--set", "train.seq_length=32").exit_code == 0
    first = expand(load_run(file), file)[0]
    (rendered,) = (first.folder / "jobs").glob("run.toml")
    result = cptain("convert", file, "--workers", "1", "--set", "train.seq_length=32")
    assert result.exit_code == 2
    count = len(expand(load_run(file), file))
    said, _, command = result.output.rstrip("\n").partition("; the first of them: ")
    assert said == f"cptain: {file}: sweep: describes {count} runs and a stage works on one"
    assert "\n" not in command
    program = tmp_path / "bin" / "cptain"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\nexec "{sys.executable}" -m cptain "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert load_run(first.folder / "run.toml") == load_run(rendered)
    assert (load_run(file).folder / "megatron" / "release").is_dir()
