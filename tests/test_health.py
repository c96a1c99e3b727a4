"""The health of a training: a loss that is lost, a step that does not end, a slow rank; each in the real Megatron."""

import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import RunFileMaker, cptain
from cptain.checkpoint.tracker import read_tracker
from cptain.errors import CptainError
from cptain.megatron.log import read_steps, train_logs
from cptain.run_file import RunFile, load_run


def last_line(result: Result) -> str:
    return result.output.strip().splitlines()[-1]


def steps_saved(run: RunFile) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in run.checkpoints_folder.glob("iter_*"))


def test_nan_ends_every_rank_at_the_same_step_with_nothing_saved_after_it(make_ready_run: RunFileMaker) -> None:
    """A learning rate of 1e30 leaves no number finite; only the second of two stages has a loss."""
    file = make_ready_run(parallel__pipeline=2, train__save_interval=1, train__lr=1e30)
    result = cptain("train", file, "--cpu")
    run = load_run(file)
    number = len(read_steps(train_logs(run.logs_folder))) + 1
    assert result.exit_code == 1
    line = last_line(result)
    assert line.startswith(f"cptain: train: the gradient's norm of step {number} is nan; the last good checkpoint is ")
    assert f"{run.checkpoints_folder}/iter_{number - 1:07d}; lower train.lr, or look at the data" in line
    assert steps_saved(run) == list(range(1, number))


def test_a_loss_that_leaves_where_it_was_ends_the_chain_and_not_only_the_job(
    make_ready_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_ready_run(train__lr=1.0, train__save_interval=2)
    run = load_run(file)
    lost = "the loss of step 3 is 19.3281, where it was 6.2410 (the median of the steps before it, up to 100); "
    lost += f"train.max_loss_spike = 2; the last good checkpoint is {run.checkpoints_folder}/iter_0000002"
    monkeypatch.setenv("CPTAIN_LINK", "1")
    result = cptain("train", file, "--cpu")
    assert result.exit_code == 1
    assert last_line(result).startswith(f"cptain: train: {lost}; ")
    assert (steps_saved(run), read_tracker(run.checkpoints_folder)) == ([2], 2)
    monkeypatch.setenv("CPTAIN_LINK", "2")
    again = cptain("train", file, "--cpu")
    assert again.exit_code == 1
    line = last_line(again)
    assert line.startswith("cptain: train: not tried again in this chain (submit.sh train export begins another): ")
    assert lost in line
    monkeypatch.setenv("CPTAIN_LINK", "1")
    goes_on = cptain("train", file, "--cpu", "--set", "train.lr=1e-3", "--set", "train.steps=3")
    assert goes_on.exit_code == 0, goes_on.output


def with_documents(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Let the training's processes run `body` whenever one reads a document; `reads` are those it has read."""
    (folder / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if any(word.endswith('pretrain.py') for word in sys.orig_argv) and 'RANK' in os.environ:\n"
        "    from cptain.training.documents import Documents\n"
        "    get, reads = Documents.get, []\n"
        "    def slow_get(self, *args, **kwargs):\n"
        "        reads.append(args)\n"
        f"        {body}\n"
        "        return get(self, *args, **kwargs)\n"
        "    Documents.get = slow_get\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")


def test_a_step_that_does_not_end_ends_the_training_with_the_stacks_of_every_rank(
    make_ready_run: RunFileMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both wait for a disk that does not answer; start-up takes longer than a step may, and does not count."""
    with_documents(tmp_path, monkeypatch, "time.sleep(600 if len(reads) > 200 else 0)")
    file = make_ready_run(train__steps=1000, train__save_interval=1000, train__step_timeout="00:00:02")
    result = cptain("train", file, "--cpu", "--nproc-per-node", 2)
    assert result.exit_code == 1
    assert last_line(result).startswith(
        "cptain: train: a step did not end in 00:00:02 (train.step_timeout); the log has the ranks' stacks (log: "
    )
    (log,) = train_logs(load_run(file).logs_folder)
    first, *stacks = re.split(r"^Timeout \(0:00:0\d(?:\.\d+)?\)!$", log.read_text(), flags=re.MULTILINE)
    assert " iteration " in first
    assert len(stacks) == 2
    assert all("in slow_get" in stack and "in train_step" in stack for stack in stacks)


def test_a_slow_rank_is_named_once_with_its_host(
    make_ready_run: RunFileMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_documents(tmp_path, monkeypatch, "time.sleep(0.05 if os.environ['RANK'] == '1' else 0)")
    file = make_ready_run(train__steps=14, train__save_interval=1000, train__eval_interval=1000)
    result = cptain("train", file, "--cpu", "--nproc-per-node", 2)
    assert result.exit_code == 0, result.output
    (said,) = [line for line in result.output.splitlines() if " is slow: " in line]
    assert said.startswith(f"train: rank 1 on {socket.gethostname()} (GPU 1) is slow: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__step_timeout": "00:00:00"}, "step_timeout: allowed: 00:00:01 and more"),
        ({"train__max_loss_spike": float("inf")}, "train.max_loss_spike"),
        (
            {"train__script": "other.py", "train__max_loss_spike": 3.0},
            "max_loss_spike: another train.script than cptain's own does nothing with it",
        ),
    ],
)
def test_a_bound_that_would_bound_nothing_is_refused(
    make_run: RunFileMaker, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CptainError, match=re.escape(message)):
        load_run(make_run(**changes))
