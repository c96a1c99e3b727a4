"""convert --shard: processes that write one checkpoint together, killed, late, twice or of another model."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from conftest import RunFileMaker, count, cptain, cptain_process
from cptain.checkpoint.parts import share
from cptain.checkpoint.streaming import FilePlan
from cptain.lock import lock
from cptain.run_file import load_run


@pytest.fixture
def file(make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file of a model whose checkpoint has several files."""
    monkeypatch.setattr("cptain.checkpoint.torch_dist._SMALLEST_FILE", 100_000)
    return make_run()


def release(file: Path) -> Path:
    return load_run(file).megatron_folder / "release"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def part(file: Path, number: int, count: int, *more: str) -> str:
    result = cptain("convert", file, "--shard", f"{number}/{count}", *more)
    assert result.exit_code == 0, result.output
    return result.output


def test_parts_in_any_order_make_the_bytes_of_one_convert(file: Path) -> None:
    assert cptain("convert", file).exit_code == 0
    expected = contents(release(file))
    assert sum(name.endswith(".distcp") for name in expected) > 3
    shutil.rmtree(release(file).parent)
    assert "part 3 of 3 is done; 2 other parts are not done yet: 1, 2" in part(file, 3, 3)
    assert "part 1 of 3 is done; 1 other parts are not done yet: 2" in part(file, 1, 3)
    assert not release(file).exists()
    assert cptain("train", file, "--cpu").exit_code == 1
    assert f"→ {release(file)}" in part(file, 2, 3)
    assert contents(release(file)) == expected
    assert [path.name for path in release(file).parent.iterdir() if path.name.startswith(".")] == []
    assert "is done and the model unchanged" in part(file, 1, 3)
    assert cptain("verify", load_run(file).model.hf, release(file).parent).exit_code == 0


def test_more_parts_than_files_and_all_at_once_make_one_checkpoint(file: Path) -> None:
    parts = 12
    processes = [cptain_process("convert", file, "--shard", f"{number}/{parts}") for number in range(1, parts + 1)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * parts, outputs
    assert sum(f"→ {release(file)}" in output for output in outputs) == 1
    assert cptain("verify", load_run(file).model.hf, release(file).parent).exit_code == 0
    assert [path.name for path in release(file).parent.iterdir() if path.name.startswith(".")] == []


def test_a_part_that_is_done_is_not_done_again_and_one_cut_short_is(file: Path) -> None:
    part(file, 1, 2)
    (folder,) = release(file).parent.glob(".release.parts-*/release")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    part(file, 1, 2)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    victim = max(times, key=lambda path: path.stat().st_size)
    os.truncate(victim, 10)
    assert "part 2 of 2 is done; 1 other parts are not done yet: 1" in part(file, 2, 2)
    part(file, 1, 2)
    assert cptain("verify", load_run(file).model.hf, release(file).parent).exit_code == 0


def test_parts_of_two_models_are_not_mixed(file: Path, model: Path, tmp_path: Path) -> None:
    part(file, 1, 2)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    change = ("--set", f"model.hf='{other}'")
    assert "1 other parts are not done yet: 1" in part(file, 2, 2, *change)
    assert "1 other parts are not done yet: 2" not in part(file, 1, 2, *change)
    assert json.loads((release(file) / "source.json").read_text())["source"]["model"] == str(other)
    assert list(release(file).parent.glob(".release*")) == []


def test_a_part_that_another_process_is_at_is_refused_with_its_host_and_number(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cptain.lock._PATIENCE", 0.1)
    part(file, 1, 2)
    (folder,) = release(file).parent.glob(".release.parts-*")
    with lock(folder / "2.lock", "a test"):
        result = cptain("convert", file, "--shard", "2/2")
    assert result.exit_code == 1
    expected = f"cptain: part 2 of 2 of {release(file)}: process {os.getpid()} on {socket.gethostname()} is at it"
    assert result.output.startswith(expected)
    assert not (folder / "release" / "metadata.json").exists()
    part(file, 2, 2)
    assert release(file).exists()


def test_every_file_has_one_part_and_parts_are_alike_in_bytes() -> None:
    for sizes in ([5], [1] * 7, [3, 1, 4, 1, 5, 9, 2, 6] * 5, [100] + [1] * 50):
        files = [FilePlan(str(number), bytes=size) for number, size in enumerate(sizes)]
        for parts in (1, 2, 3, 8, 60):
            shares = [share(files, number, parts) for number in range(1, parts + 1)]
            assert [file for one in shares for file in one] == files
            assert max(sum(file.bytes for file in one) for one in shares) <= sum(sizes) / parts + max(sizes)
            count("ways to share files tried")


def test_force_goes_without_shard(file: Path) -> None:
    result = cptain("convert", file, "--shard", "1/2", "--force")
    assert result.exit_code == 2
    assert "--force goes without --shard" in result.output


@pytest.mark.parametrize("wrong", ["0/2", "3/2", "1/0", "a/b", "1", "-1/2", "1/2/3"])
def test_a_shard_that_makes_no_sense_is_bad_usage(file: Path, wrong: str) -> None:
    result = cptain("convert", file, "--shard", wrong)
    assert result.exit_code == 2
    assert "allowed: I/N with I from 1 to N" in result.output
