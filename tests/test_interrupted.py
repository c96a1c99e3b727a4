"""convert and export killed at any moment, on a full disk, or several at once: a whole checkpoint or none."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, RunFileMaker, as_if_trained, count, cptain, cptain_process, leftovers
from cptain.atomic import atomic_folder
from cptain.checkpoint.convert import convert
from cptain.checkpoint.export import export
from cptain.checkpoint.safetensors_folder import SafetensorsReader
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.checkpoint.verify import tensors
from cptain.errors import CptainError
from cptain.run_file import RunFile, load_run
from test_checkpoint import last_line

KILLS = 50
ROUNDS = 20  # of several processes at once


def target(run: RunFile, stage: str) -> Path:
    """The folder that a stage makes."""
    return run.hf_folder / "iter_0000001" if stage == "export" else run.megatron_folder / "release"


def once(run: RunFile, stage: str, force: bool = True) -> None:
    """Do a stage in two threads."""
    if stage == "export":
        export(run, 1, 2, force)
    else:
        convert(run, 2, force)


def digest(folder: Path) -> str:
    """Of every value of a checkpoint of either format, all of it read, and of its other files."""
    total = hashlib.sha256()
    is_hf = (folder / "config.json").exists()
    with SafetensorsReader(folder) if is_hf else TorchDistReader(folder) as reader:
        for name, tensor in sorted(tensors(reader).items()):
            content = torch.empty(prod(tensor.shape) * tensor.dtype.itemsize, dtype=torch.uint8)
            tensor.fill(0, tensor.rows, content)
            total.update(name.encode() + content.numpy().tobytes())
    for file in sorted(folder.glob("*.json")):
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()


def forked(work: Callable[[], Any]) -> int:
    """Do something in a process that has all of this one's imports."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        status = 0
    finally:
        os._exit(status)


def trials(file: Path, stage: str) -> None:
    """Kill a stage at random moments and judge what it leaves; run in a process of its own, which it forks."""
    run = load_run(file)
    folder = target(run, stage)

    def seconds(force: bool) -> float:
        began = time.monotonic()
        assert os.waitpid(forked(partial(once, run, stage, force)), 0)[1] == 0, "a run that nobody killed failed"
        return time.monotonic() - began

    durations = []
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        durations.append(seconds(force=True))
    expected, dice = digest(folder), random.Random(0)
    killed = whole = 0
    while killed < KILLS:
        if dice.random() < 0.5:
            shutil.rmtree(folder)
        process = forked(partial(once, run, stage))
        time.sleep(dice.random() * statistics.median(durations[-9:]))
        os.kill(process, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(process, 0)[1]):
            continue  # it was done
        killed += 1
        if folder.exists():
            assert digest(folder) == expected, f"kill {killed}: another content"
            whole += 1
        if force := dice.random() < 0.5:
            durations.append(seconds(force))
        else:
            seconds(force)
        assert digest(folder) == expected, f"kill {killed}: the next run made another content"
        assert leftovers(run.folder) == [], f"kill {killed}: debris"
    print(json.dumps({"killed": killed, "whole": whole}))


def together(file: Path, stage: str) -> None:
    """Run a stage in four processes at once; the folder must be whole each time."""
    run, folder = load_run(file), target(load_run(file), stage)
    once(run, stage)
    expected = digest(folder)
    for number in range(ROUNDS):
        if number % 2:
            shutil.rmtree(folder)
        processes = [forked(partial(once, run, stage)) for _ in range(4)]
        assert [os.waitpid(process, 0)[1] for process in processes] == [0] * 4, f"round {number}"
        assert digest(folder) == expected
        assert leftovers(run.folder) == [], f"round {number}"
    print(json.dumps({"rounds": ROUNDS}))


def in_a_process(function: str, file: Path, stage: str) -> Any:
    """What a function of this module prints in a process of its own, whose torch has started no thread.

    The garbage collector leaves the imports alone: by going through them after a fork it copies all their memory, which
    took most of the time.
    """
    script = f"""
import gc, sys, torch, torch.distributed.checkpoint.filesystem  # which convert imports late
from pathlib import Path
from test_interrupted import {function}
torch.set_num_threads(1)
gc.freeze()
{function}(Path(sys.argv[1]), sys.argv[2])
"""
    path = os.pathsep.join([str(PROJECT / "tests"), str(PROJECT / "apps")])
    command = [sys.executable, "-c", script, str(file), stage]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def file(make_run: RunFileMaker, ready_run: Path, request: pytest.FixtureRequest) -> Path:
    """A run file whose convert, or whose export of iteration 1, can begin."""
    file = make_run(data__output=str(load_run(ready_run).data_folder))
    if request.node.callspec.params["stage"] == "export":
        assert cptain("convert", file).exit_code == 0
        as_if_trained(file)
    return file


@pytest.mark.parametrize("stage", ["convert", "export"])
def test_killed_at_any_moment_it_leaves_a_whole_checkpoint_or_none_and_the_next_run_cleans_up(
    file: Path, stage: str
) -> None:
    result = in_a_process("trials", file, stage)
    count(f"{stage} killed at random moments", result["killed"])
    assert 0 < result["whole"] < KILLS


@pytest.mark.parametrize("stage", ["convert", "export"])
def test_several_at_once_do_not_corrupt_each_other(file: Path, stage: str) -> None:
    count(f"{stage} by several processes at once", in_a_process("together", file, stage)["rounds"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder in which 200 kB can be written, and what a process needs for that to be so."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True)
    if mounted.returncode == 0:
        yield folder, {}
        subprocess.run(["umount", folder], check=True)
    else:
        yield folder, {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))}


@pytest.mark.parametrize("stage", ["convert", "export"])
def test_a_disk_that_fills_ends_in_one_line_and_leaves_no_debris(
    file: Path, stage: str, small_disk: tuple[Path, dict[str, Any]]
) -> None:
    folder, options = small_disk
    run = load_run(file)
    if stage == "convert":
        arguments, made = ["--set", f"model.megatron='{folder}/megatron'"], folder / "megatron" / "release"
    else:
        run.hf_folder.symlink_to(folder)
        arguments, made = [], run.hf_folder / "iter_0000001"
    process = cptain_process(stage, file, *arguments, **options)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.startswith(f"cptain: {made}: cannot be written: ")
    assert output.count("\n") == 1
    assert not made.exists()
    assert leftovers(folder) == []


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing can be made; root needs a mount for that."""
    folder = tmp_path / "read only"
    folder.mkdir(mode=0o555)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("stage", ["convert", "export"])
def test_a_folder_that_is_read_only_ends_in_one_line(file: Path, stage: str, read_only: Path) -> None:
    run = load_run(file)
    if stage == "convert":
        result = cptain(stage, file, "--set", f"model.megatron='{read_only}/megatron'")
    else:
        run.hf_folder.symlink_to(read_only)
        result = cptain(stage, file)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert str(read_only if stage == "convert" else run.hf_folder) in result.output


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_an_error_of_the_disk_names_the_folder_and_keeps_the_old_one(tmp_path: Path, number: int) -> None:
    final = tmp_path / "release"
    final.mkdir()
    (final / "old").write_text("old")

    def write() -> None:
        with atomic_folder(final) as folder:
            (folder / "new").write_text("new")
            raise OSError(number, os.strerror(number))

    with pytest.raises(CptainError, match=f"release: cannot be written: {os.strerror(number)}"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["release"]
    assert [path.name for path in final.iterdir()] == ["old"]


def test_what_a_process_of_another_namespace_is_writing_is_left_alone(tmp_path: Path) -> None:
    clean = "import sys; from pathlib import Path; from cptain.atomic import remove_stale_partials as clean; "
    clean += "clean(Path(sys.argv[1]))"
    with atomic_folder(tmp_path / "release") as folder:  # by this process, whose number means nothing there
        apart = ["unshare", "--pid", "--fork", "--mount-proc"]
        subprocess.run([*apart, sys.executable, "-c", clean, tmp_path], check=True)
        assert folder.exists()


@pytest.mark.parametrize("stage", ["convert", "export"])
def test_a_full_disk_leaves_no_checkpoint_and_no_debris(make_run: RunFileMaker, ready_run: Path, stage: str) -> None:
    file = make_run()
    if stage == "export":
        assert cptain("convert", file).exit_code == 0
        as_if_trained(file)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = cptain_process(stage, file, preexec_fn=limit)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    run = load_run(file)
    target = run.megatron_folder / "release" if stage == "convert" else run.hf_folder / "iter_0000001"
    assert last_line(output) == f"cptain: {target}: cannot be written: File too large"
    assert not target.exists()
    assert leftovers(run.folder) == []


@pytest.mark.parametrize("stage", ["convert", "export", "verify"])
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind_and_exits_75(
    make_run: RunFileMaker, tmp_path: Path, stage: str, signal_number: signal.Signals
) -> None:
    """Slowed to a tensor a tenth of a second, so that the signal arrives in the middle."""
    file = make_run()
    run = load_run(file)
    if stage != "convert":
        assert cptain("convert", file).exit_code == 0
        as_if_trained(file)
    slow = """
import sys, time
from cptain import progress
advance = progress.Progress.advance
def slowly(self, *arguments):
    advance(self, *arguments)
    print("working", flush=True)
    time.sleep(0.1)
progress.Progress.advance = slowly
from cptain.cli import main
main()
"""
    arguments = [str(run.model.hf), str(run.megatron_folder)] if stage == "verify" else [str(file)]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, stage, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "working\n":
            break
    process.send_signal(signal_number)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 75
    assert last_line(rest) == f"cptain: stopped by {signal_number.name}; the same command continues"
    assert leftovers(run.folder) == []
    if stage != "verify":
        target = run.megatron_folder / "release" if stage == "convert" else run.hf_folder / "iter_0000001"
        assert not target.exists()
        assert cptain(stage, file).exit_code == 0
        assert target.exists()


def test_a_killed_convert_leaves_the_old_checkpoint_and_the_next_one_cleans_up(make_run: RunFileMaker) -> None:
    file = make_run()
    root = load_run(file).megatron_folder
    assert cptain("convert", file).exit_code == 0
    before = (root / "release" / ".metadata").read_bytes()
    killer = """
import os, signal
from cptain import progress
progress.Progress.advance = lambda self, *arguments: os.kill(os.getpid(), signal.SIGKILL)
from cptain.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", killer, "convert", str(file), "--force"], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert leftovers(root)
    assert (root / "release" / ".metadata").read_bytes() == before
    time.sleep(0.01)
    assert cptain("convert", file, "--force").exit_code == 0
    assert leftovers(root) == []
