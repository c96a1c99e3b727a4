"""Pipeline stages that hold different numbers of layers, trained by the real Megatron on the CPU."""

from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, RunFileMaker, cptain
from cptain.megatron.log import read_steps, train_logs
from cptain.run_file import load_run


def losses(file: Path) -> list[float]:
    """Of every step that the run's logs have."""
    return [step.loss for step in read_steps(train_logs(load_run(file).logs_folder))]


def test_three_layers_on_two_stages_train_resume_on_one_and_export(
    make_run: RunFileMaker, ready_run: Path, texts: list[str], tmp_path: Path
) -> None:
    from demo import make_model

    make_model(tmp_path / "model", texts, **{**TINY, "num_hidden_layers": 3})
    tokens = ready_run.parent / "runs" / "run" / "data"
    common: dict[str, Any] = {
        "model__hf": str(tmp_path / "model"),
        "model__megatron": str(tmp_path / "megatron"),
        "data__output": str(tokens),
        "train__steps": 4,
    }
    file = make_run(name="whole", **common)
    assert cptain("convert", file).exit_code == 0
    result = cptain("train", file, "--cpu")
    assert result.exit_code == 0, result.output
    undisturbed = losses(file)

    file = make_run(name="cut", parallel__pipeline=2, **common)
    assert "--decoder-first-pipeline-num-layers 2" in cptain("train", file, "--cpu", "--dry-run").stdout
    stopped = cptain("train", file, "--cpu", "--set", 'train.megatron_args=["--exit-interval", "2"]')
    assert stopped.exit_code == 75, stopped.output
    resumed = cptain("train", file, "--cpu", "--set", "parallel.pipeline=1")
    assert resumed.exit_code == 0, resumed.output
    assert losses(file) == pytest.approx(undisturbed, abs=2e-5)
    assert len(undisturbed) == 4

    run = load_run(file)
    assert cptain("export", file).exit_code == 0
    result = cptain("verify", run.hf_folder / "iter_0000004", run.checkpoints_folder)
    assert result.exit_code == 0, result.output
    assert "30 of 30 tensors bit-equal" in result.output
