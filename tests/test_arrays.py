"""preprocess --shard: the tasks of an array share the files."""

import json
from pathlib import Path

import pytest
from conftest import RunFileMaker, cptain
from cptain.run_file import load_run


def test_an_array_s_tasks_share_the_files_and_leave_one_manifest(make_run: RunFileMaker) -> None:
    whole, parts = make_run(name="whole"), 2
    assert cptain("preprocess", whole).exit_code == 0
    file = make_run()
    data = load_run(file).data_folder
    first = cptain("preprocess", file, "--shard", f"1/{parts}")
    assert first.exit_code == 0
    assert "preprocess: part 1 of 2: 1 files done; 2 files of other parts are not done yet" in first.output
    assert not (data / "manifest.json").exists()
    assert cptain("preprocess", file, "--shard", f"2/{parts}").exit_code == 0
    expected = json.loads((load_run(whole).data_folder / "manifest.json").read_text())
    assert json.loads((data / "manifest.json").read_text()) == expected
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.bin")}
    (data / "a_text_document.bin").unlink()
    for part in (1, 2):
        assert cptain("preprocess", file, "--shard", f"{part}/{parts}").exit_code == 0
    after = {path: path.stat().st_mtime_ns for path in data.rglob("*.bin")}
    assert [path.name for path in before if before[path] != after[path]] == ["a_text_document.bin"]
    assert cptain("preprocess", file, "--shard", "9/9").exit_code == 0  # more tasks than files


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "-1/2", "1/2/3", ""])
def test_a_shard_that_is_none_is_refused(shard: str, make_run: RunFileMaker) -> None:
    result = cptain("preprocess", make_run(), "--shard", shard)
    assert result.exit_code == 2
    assert "allowed: I/N with I from 1 to N, such as 1/4" in result.output


def test_parts_are_even_in_bytes(tmp_path: Path, make_run: RunFileMaker) -> None:
    from cptain.data.inputs import input_files
    from cptain.data.preprocess import _tasks, shard
    from cptain.data.recipe import Recipe

    sizes = [100, 90, 50, 40, 30, 20, 10, 10, 10]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.jsonl").write_bytes(b" " * size)
    run = load_run(make_run(data__input=[f"{tmp_path}/*.jsonl"]))
    made = Recipe("text", False, "fail", 1, "hash", 1, False)
    tasks = _tasks(run, made, False, input_files(run.data.input))
    parts = [shard(tasks, number, 3) for number in (1, 2, 3)]
    assert sorted(task.record.prefix for part in parts for task in part) == sorted(task.record.prefix for task in tasks)
    assert [sum(task.record.bytes for task in part) for part in parts] == [120, 120, 120]
