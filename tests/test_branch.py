"""train.from: a run that branches off another's checkpoint, whole or with the weights alone."""

from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain
from cptain.checkpoint.tracker import read_tracker
from cptain.history import read_history
from cptain.megatron.log import Step, read_steps, train_logs
from cptain.run_file import load_run
from cptain.scheduling.sweep import expand


def steps(run_file: Path, *overrides: str) -> list[Step]:
    return read_steps(train_logs(load_run(run_file, overrides).logs_folder))


@pytest.fixture
def trunk(trained_run: Path) -> Path:
    """The folder of a run of 8 steps, with checkpoints of the steps 4 and 8."""
    return load_run(trained_run).folder


def test_a_branch_goes_on_as_its_trunk_did_and_then_from_its_own(
    make_ready_run: RunFileMaker, trained_run: Path, trunk: Path
) -> None:
    file = make_ready_run(name="branch", train__from={"run": str(trunk), "iteration": 4})
    stopped = cptain("train", file, "--cpu", "--set", 'train.megatron_args=["--exit-interval", "6"]')
    assert stopped.exit_code == 75, stopped.output
    assert f"train: from step 4 of {trunk}/checkpoints to step 8" in stopped.output
    resumed = cptain("train", file, "--cpu")
    assert resumed.exit_code == 0, resumed.output
    run = load_run(file)
    assert f"train: from step 6 of {run.checkpoints_folder} to step 8" in resumed.output
    trunks = {step.number: (step.loss, step.learning_rate, step.sequences) for step in steps(trained_run)}
    found = {step.number: (step.loss, step.learning_rate, step.sequences) for step in steps(file)}
    assert found == {number: trunks[number] for number in range(5, 9)}
    assert [(start.start, start.last) for start in read_history(run.folder)] == [(4, 6), (6, 8)]
    assert read_tracker(trunk / "checkpoints") == 8
    assert cptain("export", file).exit_code == 0
    card = (run.hf_folder / "iter_0000008" / "README.md").read_text()
    assert "| begins with | step 4 of the run run |" in card
    assert str(trunk) not in card


def test_a_cooldown_has_its_own_schedule_and_length(make_ready_run: RunFileMaker, trunk: Path) -> None:
    changes: dict[str, Any] = {"train__schedule": "wsd", "train__decay_steps": 2, "train__steps": 11}
    file = make_ready_run(name="cooldown", **changes, train__from={"run": str(trunk), "iteration": 8})
    result = cptain("train", file, "--cpu")
    assert result.exit_code == 0, result.output
    assert 'train: changed since step 8: train.schedule: "cosine" → "wsd"' in result.output
    assert [(step.number, step.learning_rate) for step in steps(file)] == [
        (9, pytest.approx(1e-3)),
        (10, pytest.approx(5.5e-4)),
        (11, pytest.approx(1e-4)),
    ]


def test_with_the_weights_alone_a_branch_begins_at_step_0(
    make_ready_run: RunFileMaker, trained_run: Path, trunk: Path
) -> None:
    branch = {"run": str(trunk), "iteration": 8, "optimizer": False}
    file = make_ready_run(name="again", train__steps=2, train__global_batch_size=4, train__from=branch)
    result = cptain("train", file, "--cpu")  # with another batch size, which a run that goes on could not have
    assert result.exit_code == 0, result.output
    first, second = steps(file)
    assert (first.number, first.sequences, second.sequences) == (1, 4, 8)
    assert first.learning_rate == pytest.approx(1e-3)  # the end of a warm-up of one step
    trained = steps(trained_run)
    assert abs(first.loss - trained[-1].loss) < abs(first.loss - trained[0].loss)
    assert (load_run(file).folder / "history.jsonl").exists()


def test_a_sweep_over_branches_is_a_run_each_from_one_trunk(make_ready_run: RunFileMaker, trunk: Path) -> None:
    file = make_ready_run(
        name="tree",
        train__from={"run": str(trunk), "iteration": 4},
        sweep={"train.from.iteration, train.steps": [[4, 6], [8, 10]]},
    )
    runs = expand(load_run(file), file)
    assert [(run.name, run.train.from_ and run.train.from_.iteration, run.train.steps) for run in runs] == [
        ("tree-iteration4", 4, 6),
        ("tree-iteration8", 8, 10),
    ]
    for name, iteration, total in (("tree-iteration4", 4, 6), ("tree-iteration8", 8, 10)):
        sets = [f"name={name}", f"train.from.iteration={iteration}", f"train.steps={total}", "sweep={}"]
        result = cptain("train", file, "--dry-run", *(word for one in sets for word in ("--set", one)))
        assert result.exit_code == 0, result.output
        assert f"--load '{trunk}/checkpoints'" in result.stdout
        assert f"--ckpt-step {iteration}" in result.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__from": {"iteration": 5}}, "iter_0000005: no such checkpoint (there: iter_0000004, iter_0000008)"),
        (
            {"train__from": {"iteration": 8}},
            "train: steps = 8 must be over from.iteration = 8, whose steps count",
        ),
        ({"train__from": {"iteration": 4, "optimiser": False}}, "train.from.optimiser = false: no such key"),
        ({"train__from": {"iteration": 4}, "train__global_batch_size": 16}, "train.global_batch_size: 8 → 16: a run"),
        (
            {"train__from": {"iteration": 4}, "data__split": "80,20,0"},
            "step 4 of {trunk}/checkpoints was trained on other",
        ),
        ({"train__from": {"iteration": 4, "run": "runs/run"}}, "train.from.run = "),
    ],
)
def test_a_branch_that_cannot_be_is_refused(
    make_ready_run: RunFileMaker, trunk: Path, changes: dict[str, Any], message: str
) -> None:
    changes["train__from"] = {"run": str(trunk), **changes["train__from"]}
    result = cptain("train", make_ready_run(**changes), "--dry-run")
    assert result.exit_code in (1, 2)
    assert message.format(trunk=trunk) in result.output
