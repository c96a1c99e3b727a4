"""train, stopped: by signals, by the loss of a rank or of its parent, and by a full disk."""

import os
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import RunFileMaker, cptain, cptain_process
from cptain.checkpoint.tracker import read_tracker
from cptain.megatron.log import train_logs
from cptain.processes import read_of_all
from cptain.run_file import load_run
from cptain.training import stopping
from test_train import last_line, losses, wait_for, wait_for_step


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_in_hand_and_exits_75(
    make_ready_run: RunFileMaker, signal_number: signal.Signals
) -> None:
    file = make_ready_run(train__steps=2000, train__save_interval=2000, train__eval_interval=2000)
    process = cptain_process("train", file, "--cpu")
    wait_for_step(file, 3)
    second = cptain("train", file, "--cpu")
    assert second.exit_code == 1
    assert last_line(second).startswith(f"cptain: train: {load_run(file).folder}: process {process.pid} on host ")
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    reached = losses(file)
    saved = read_tracker(load_run(file).checkpoints_folder)
    assert saved is not None
    assert saved >= 3
    assert saved == len(reached)
    assert f"train: {signal_number.name}: saving after this step (again, 15 s later: end now)" in output
    assert output.splitlines()[-1] == (
        f"cptain: train: stopped by {signal_number.name}; saved at step {saved} of 2000; the same command continues"
    )


def ranks(run_file: Path) -> list[int]:
    """The processes that run our training script for this run: torchrun and its ranks."""
    checkpoints = str(load_run(run_file).checkpoints_folder).encode()
    return sorted(pid for pid, line in read_of_all("cmdline") if b"pretrain.py\0--cpu" in line and checkpoints in line)


def test_a_killed_parent_leaves_no_rank(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run(train__steps=100000, train__save_interval=100000, train__eval_interval=100000)
    process = cptain_process("train", file, "--cpu")
    wait_for_step(file, 1)
    started = set(ranks(file))
    assert len(started) >= 2
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while started & set(ranks(file)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not started & set(ranks(file))


def in_a_long_step(file: Path) -> "subprocess.Popen[str]":
    """A training whose first step goes on for hours."""
    process = cptain_process("train", file, "--cpu", "--set", "train.global_batch_size=100000")
    wait_for(
        file, "the first step", lambda logs: any("before the start of training step" in x.read_text() for x in logs)
    )
    return process


def test_signals_that_come_together_are_one_request_and_the_step_is_saved(make_ready_run: RunFileMaker) -> None:
    """Apptainer and PBS send each signal twice: 0.15 ms, 21 ms and 5 s apart were seen."""
    file = make_ready_run(train__steps=2000, train__save_interval=2000, train__eval_interval=2000)
    process = cptain_process("train", file, "--cpu")
    wait_for_step(file, 2)
    for pause in (0.00015, 0.021, 1, 0):
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert output.count("SIGTERM") == 2
    saved = read_tracker(load_run(file).checkpoints_folder)
    assert output.splitlines()[-1].startswith(f"cptain: train: stopped by SIGTERM; saved at step {saved} of 2000")


def test_a_signal_long_after_the_first_ends_a_long_step_at_once(
    make_ready_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_ready_run()
    process = in_a_long_step(file)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    time.sleep(stopping.ONE_REQUEST)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output
    assert "train: SIGINT again: ending now, without saving" in output
    assert output.splitlines()[-1].startswith("cptain: train: stopped by SIGINT; nothing saved yet")


def is_torchrun(process: int) -> bool:
    """Or one of its ranks, which are Python's children of it; numbers of processes begin anew at 32768."""
    return b"torch.distributed.run" in readable(Path(f"/proc/{process}/cmdline"))


def kill_a_rank(file: Path, step: int, torchrun: bool = False) -> None:
    """Train, kill a rank or torchrun once `step` is done, and see the signal named."""
    process = cptain_process("train", file, "--cpu")
    wait_for_step(file, step)
    os.kill(next(one for one in ranks(file) if is_torchrun(one) == torchrun), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("cptain: train: SIGKILL (log: ")


@pytest.mark.parametrize("torchrun", [False, True], ids=["rank", "torchrun"])
def test_what_is_killed_is_named_with_its_signal(torchrun: bool, make_ready_run: RunFileMaker) -> None:
    file = make_ready_run(train__steps=100000, train__save_interval=100000, train__eval_interval=100000)
    kill_a_rank(file, step=1, torchrun=torchrun)


def test_a_rank_killed_after_a_save_ends_the_training_and_leaves_no_process(make_ready_run: RunFileMaker) -> None:
    """With --async-save Megatron keeps processes from a save on, which outlive a killed rank and hold its output."""
    more = {"train__megatron_args": ["--async-save"], "train__eval_interval": 100000}
    file = make_ready_run(train__steps=100000, train__save_interval=2, **more)
    kill_a_rank(file, step=6)
    mark = str(load_run(file).folder).encode()
    assert not [pid for pid, environment in read_of_all("environ") if mark in environment]


def readable(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""  # another user's, or ended meanwhile


def test_a_full_disk_is_named_and_what_was_saved_before_stays(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run(train__steps=2)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    process = cptain_process("train", file, "--cpu", preexec_fn=limit)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    checkpoints = load_run(file).checkpoints_folder
    assert output.splitlines()[-1].startswith(f"cptain: train: {checkpoints}: cannot be written (")
    assert not (checkpoints / "latest_checkpointed_iteration.txt").exists()
    assert cptain("train", file, "--cpu").exit_code == 0


def test_a_signal_costs_no_line_of_the_log(make_ready_run: RunFileMaker, tmp_path: Path) -> None:
    script = """
import itertools, signal
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
for number in itertools.count():
    print("line", number)
    if asked:
        raise SystemExit
"""
    (tmp_path / "prints.py").write_text(script)
    file = make_ready_run(train__script="prints.py")
    process = cptain_process("train", file, "--cpu")
    wait_for(file, "line 5000", lambda logs: any("line 5000\n" in log.read_text() for log in logs))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    (log,) = train_logs(load_run(file).logs_folder)
    numbers = [int(number) for number in re.findall(r"^line (\d+)$", log.read_text(), re.MULTILINE)]
    assert numbers == list(range(len(numbers)))


def test_a_script_that_exits_0_without_training_is_a_failure(make_ready_run: RunFileMaker, tmp_path: Path) -> None:
    """As Megatron's own pretrain_gpt.py does where it finds no checkpoint."""
    (tmp_path / "lies.py").write_text("import sys\nprint('could not find the metadata file')\nsys.exit()\n")
    result = cptain("train", make_ready_run(train__script="lies.py"), "--cpu")
    assert result.exit_code == 1
    assert last_line(result).startswith("cptain: train: could not find the metadata file (log: ")
