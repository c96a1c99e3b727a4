"""train.keep: old checkpoints are removed, whole ones that a newer whole one replaces, and never one that is read."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, as_if_trained, count, cptain
from cptain.checkpoint import in_use
from cptain.checkpoint.in_use import being_read, remove
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.checkpoint.tracker import iteration_folder, read_tracker, write_tracker
from cptain.run_file import load_run
from cptain.training.keep import keeping, surplus
from cptain.training.saved import SavedCheckpoints


def iterations(run_file: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in sorted(load_run(run_file).checkpoints_folder.glob("iter_*"))]


def given_up(run_file: Path, began: int = 0) -> list[int]:
    """The iterations that a start which began at a step would remove."""
    return [int(folder.name[5:]) for folder in surplus(load_run(run_file), began)]


def test_a_run_keeps_its_last_checkpoints_every_kth_and_the_last_of_each_start(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run(train__save_interval=2, train__keep=1, train__keep_every=4, train__steps=10)
    stopped = cptain("train", file, "--cpu", "--set", 'train.megatron_args=["--exit-interval", "3"]')
    assert stopped.exit_code == 75, stopped.output
    assert iterations(file) == [3]
    assert "train: iter_0000002: removed (train.keep = 1)" in stopped.output
    done = cptain("train", file, "--cpu")
    assert done.exit_code == 0, done.output
    assert iterations(file) == [3, 4, 8, 10]
    checkpoints = load_run(file).checkpoints_folder
    assert sorted(path.name for path in checkpoints.iterdir() if path.name != ".in-use") == [
        "iter_0000003",
        "iter_0000004",
        "iter_0000008",
        "iter_0000010",
        "latest_checkpointed_iteration.txt",
    ]
    assert cptain("export", file, "--iteration", "all").exit_code == 0
    # Another start keeps what this one ended with.
    assert cptain("train", file, "--cpu", "--set", "train.steps=12").exit_code == 0
    assert iterations(file) == [3, 4, 8, 10, 12]


def test_only_whole_checkpoints_that_a_newer_whole_one_replaces_are_removed(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run(train__save_interval=1, train__keep=2)
    as_if_trained(file, 1, 2, 3, 4, 5)
    root = load_run(file).checkpoints_folder
    assert given_up(file) == [1, 2, 3]
    assert given_up(file, began=2) == [1, 3]
    (iteration_folder(root, 2) / "metadata.json").unlink()  # half-written: it is no checkpoint, and no concern of ours
    assert given_up(file) == [1, 3]
    (iteration_folder(root, 4) / ".metadata").unlink()  # so the last two whole ones are 3 and 5
    assert given_up(file) == [1]
    write_tracker(root, 3)
    assert given_up(file) == []  # 1 and 3 are the last two; what is newer than the tracker says is not looked at
    next(iteration_folder(root, 3).glob("*.distcp")).unlink()
    assert given_up(file) == []  # the newest is not whole
    assert given_up(make_ready_run(train__save_interval=1)) == []  # everything is kept unless something else is said


def test_a_checkpoint_that_is_read_stays_until_it_is_not(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run(train__save_interval=1, train__keep=1)
    as_if_trained(file, 1, 2)
    run = load_run(file)
    with being_read(iteration_folder(run.checkpoints_folder, 1)), keeping(run, 0, print):
        pass
    assert iterations(file) == [1, 2]
    with keeping(run, 0, print):
        pass
    assert iterations(file) == [2]


def test_a_checkpoint_that_is_removed_while_it_is_recorded_does_not_come_back(
    make_ready_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_ready_run()
    as_if_trained(file, 1, 2)

    def removed_meanwhile(reader: TorchDistReader, names: list[str]) -> dict[str, Any]:
        assert remove(reader.folder)
        return {}

    monkeypatch.setattr("cptain.checkpoint.saved_files.checksums_of", removed_meanwhile)
    said: list[str] = []
    saved = SavedCheckpoints(load_run(file).checkpoints_folder, said.append)
    saved.add(1)
    saved.close()
    assert (iterations(file), said) == ([2], [])


def test_a_removal_that_fails_is_said_and_finished_later(
    make_ready_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_ready_run(train__save_interval=1, train__keep=1)
    as_if_trained(file, 1, 2)
    run = load_run(file)

    def full(folder: Path) -> None:
        raise OSError(5, "Input/output error", str(folder))

    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(in_use.shutil, "rmtree", full)
        with keeping(run, 0, said.append):
            pass
    assert said[0].startswith(f"train: {run.checkpoints_folder}: an old checkpoint cannot be removed: ")
    assert iterations(file) == [2]
    assert list(run.checkpoints_folder.glob(".removed-*"))
    with keeping(run, 0, said.append):
        pass
    assert not list(run.checkpoints_folder.glob(".removed-*"))


REMOVER = """
import sys
from pathlib import Path
from cptain.run_file import load_run
from cptain.training.keep import keeping
print("begin", flush=True)
with keeping(load_run(Path(sys.argv[1])), 0, print):
    pass
"""


def test_a_process_killed_amid_a_removal_leaves_whole_checkpoints_alone(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run(train__save_interval=1, train__keep=1)
    run = load_run(file)
    for number in range(5):
        if run.checkpoints_folder.exists():
            shutil.rmtree(run.checkpoints_folder)
        as_if_trained(file, 1, 2, 3)
        for first in (1, 2):  # so many files that a kill falls amid them
            for copy in range(300):
                (iteration_folder(run.checkpoints_folder, first) / f"more{copy}").touch()
        process = subprocess.Popen([sys.executable, "-c", REMOVER, str(file)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.Random(number).uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert read_tracker(run.checkpoints_folder) == 3
        assert iterations(file)[-1] == 3
        for iteration in iterations(file):
            folder = iteration_folder(run.checkpoints_folder, iteration)
            TorchDistReader(folder).close()
            assert iteration == 3 or len(list(folder.glob("more*"))) == 300
        count("removals killed")
    with keeping(run, 0, print):
        pass
    assert iterations(file) == [3]
    assert not list(run.checkpoints_folder.glob(".removed-*"))


def test_no_reader_ever_loses_a_checkpoint(tmp_path: Path) -> None:
    """Readers and a remover race for a folder: what a reader has found is there until it has done."""
    found = 0
    for _ in range(25):
        folder = tmp_path / "iter_0000001"
        folder.mkdir(exist_ok=True)
        children = []
        for reader in range(3):
            if child := os.fork():
                children.append(child)
                continue
            status = 2
            try:
                time.sleep(random.Random(reader + os.getpid()).choice((0, 0, 0.001, 0.003)))
                with being_read(folder):
                    status = 1 if folder.exists() else 0
                    time.sleep(0.01)
                    status = status if folder.exists() == bool(status) else 2
            finally:
                os._exit(status)
        time.sleep(random.choice((0, 0.001, 0.003)))
        removed = remove(folder)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert 2 not in statuses
        assert folder.exists() != removed
        found += sum(statuses)
    assert found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__keep": 0}, "train.keep = 0: input should be greater than 0"),
        ({"train__keep": "some"}, "train.keep"),
        ({"train__keep_every": 8}, 'train: keep_every = 8: keep = "all" keeps them anyway'),
        ({"train__keep": 1, "train__keep_every": 6}, "train: keep_every = 6: save_interval = 4 does not divide it"),
        (
            {"train__megatron_args": ["--save-retain-interval", "8"]},
            "train.megatron_args: --save-retain-interval: set train.keep",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(
    make_ready_run: RunFileMaker, changes: dict[str, object], message: str
) -> None:
    result = cptain("train", make_ready_run(**changes), "--dry-run")
    assert result.exit_code == 2
    assert message in result.output
