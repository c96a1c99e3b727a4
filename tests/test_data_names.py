"""What a pair is called when data.input changes, and that none is replaced under a training."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RunFileMaker, cptain, cptain_process, write_jsonl
from cptain.data.in_use import in_use
from cptain.data.inputs import input_files
from cptain.lock import living_holder
from cptain.run_file import load_run
from test_preprocess import obey_permissions


@pytest.fixture
def file(make_run: RunFileMaker, ready_run: Path, tmp_path: Path) -> Path:
    """A run file for a/x.jsonl, beside which are b/x.jsonl and c/x.jsonl; transformers has been asked of its
    tokenizer."""
    for name in "abc":
        write_jsonl(tmp_path / name / "x.jsonl", [f"document of {name}"])
    file = make_run(data__input=["a/*.jsonl"])
    shutil.copytree(load_run(ready_run).tokenizers_folder, load_run(file).tokenizers_folder)
    return file


def preprocess(file: Path, *folders: str, status: int = 0) -> str:
    globs = ", ".join(f"'{folder}/*.jsonl'" for folder in folders)
    result = cptain("preprocess", file, "--workers", 1, "--set", f"data.input=[{globs}]")
    assert result.exit_code == status, result.output
    return result.output


def names(file: Path) -> dict[str, str]:
    """The prefix of every file in the manifest, by its folder."""
    records = json.loads((load_run(file).data_folder / "manifest.json").read_text())["records"]
    return {Path(record["input"]).parent.name: record["prefix"] for record in records}


def written(file: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in load_run(file).data_folder.rglob("*.bin")}


def test_a_done_file_keeps_its_name_whatever_the_globs_and_no_two_files_get_one(file: Path) -> None:
    preprocess(file, "a")
    assert names(file) == {"a": "x_text_document"}
    before = written(file)
    output = preprocess(file, "a", "b")
    assert "1 of 2 files are done and unchanged" in output
    assert "are left in" not in output
    assert names(file) == {"a": "x_text_document", "b": "b/x_text_document"}
    output = preprocess(file, "c")  # below whose own folder it would be x, as a's is
    assert names(file)["c"].startswith("x-")
    assert (
        "preprocess: 2 pairs of files that data.input no longer matches, or of another data.key, are left in "
        f"{load_run(file).data_folder}: they are not in the manifest and not trained on\n"
    ) in output
    assert written(file).items() >= before.items()
    assert "3 of 3 files are done and unchanged" in preprocess(file, "a", "b", "c")
    assert len(set(names(file).values())) == 3


def test_a_file_keeps_its_name_under_another_key_too(file: Path) -> None:
    preprocess(file, "a")
    (file.parent / "b" / "x.jsonl").write_text('{"body": "b"}\n')
    (file.parent / "a" / "x.jsonl").write_text('{"body": "a"}\n')
    globs = "data.input=['a/*.jsonl', 'b/*.jsonl']"
    assert cptain("preprocess", file, "--set", globs, "--set", "data.key=body").exit_code == 0
    assert names(file) == {"a": "x_body_document", "b": "b/x_body_document"}


def test_two_runs_at_once_with_other_globs_do_not_write_one_pair(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess(file, "a")
    before = written(file)
    monkeypatch.setattr("cptain.data.preprocess.read_records", lambda folder: [])  # as if it had looked before that
    output = preprocess(file, "b", status=1)
    assert f"cptain: {file.parent}/b/x.jsonl: {file.parent}/a/x.jsonl became x_text_document meanwhile" in output
    assert written(file) == before


def test_a_pair_that_a_training_reads_is_not_replaced_and_new_ones_are_added(file: Path) -> None:
    preprocess(file, "a")
    data = load_run(file).data_folder
    before, manifest = written(file), (data / "manifest.json").read_bytes()
    with in_use(data, load_run(file).folder):
        said = f"cptain: preprocess: {data}/x_text_document would be replaced, and process "
        forced = cptain("preprocess", file, "--force")
        assert forced.exit_code == 1
        assert said in forced.output
        assert " trains on it: wait until that is done, or write to another data.output" in forced.output
        assert said in cptain("preprocess", file, "--set", "data.strip=true").output
        assert (written(file), (data / "manifest.json").read_bytes()) == (before, manifest)
        preprocess(file, "a", "b")
        (file.parent / "a" / "x.jsonl").write_text('{"text": "changed"}\n')
        assert said in preprocess(file, "a", "b", status=1)
        with in_use(data, file.parent / "another run"):
            pass
    assert cptain("preprocess", file, "--force").exit_code == 0


def test_a_training_that_was_killed_holds_nothing(file: Path) -> None:
    preprocess(file, "a")
    data = load_run(file).data_folder
    holder = f"""
import os, signal
from pathlib import Path
from cptain.data.in_use import in_use
with in_use(Path({str(data)!r}), Path("/run")):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", holder])
    assert list((data / ".in-use").iterdir())
    assert cptain("preprocess", file, "--force").exit_code == 0


def test_the_next_training_of_a_run_waits_for_nobody_that_trained_on_another_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("/run")
    with in_use(tmp_path, run):
        mine = next((tmp_path / ".in-use").iterdir())
    os.symlink(f"another-host|1|17|1|{int(time.time())}|0", mine)  # killed a moment ago
    with in_use(tmp_path, run):
        assert f"process {os.getpid()} on " in str(living_holder(mine))
    assert not living_holder(mine)
    assert capsys.readouterr().err == ""  # the wait for the run's own lock was the only one


def test_data_of_another_user_that_may_only_be_read_is_trained_on_all_the_same(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    use = f"""
from pathlib import Path
from cptain.data.in_use import in_use
with in_use(Path({str(tmp_path)!r}), Path("/run")):
    print("in use")
"""
    done = subprocess.run(
        [sys.executable, "-c", use], capture_output=True, text=True, check=True, preexec_fn=obey_permissions
    )
    tmp_path.chmod(0o755)
    assert done.stdout == "in use\n"


def test_globs_that_match_nothing_or_clash_are_named(make_run: RunFileMaker, tmp_path: Path) -> None:
    result = cptain("preprocess", make_run(data__input=["nothing/*.jsonl"]))
    assert result.exit_code == 1
    kinds = ".jsonl, .jsonl.gz, .jsonl.zst, .jsonl.bz2, .jsonl.xz, .parquet"
    assert f"cptain: data.input: {tmp_path}/nothing/*.jsonl matches no {kinds} file" in result.output
    (tmp_path / "a.txt").write_text("x")
    result = cptain("preprocess", make_run(data__input=["*.txt"]))
    assert "a.txt" not in result.output
    assert "file (1 other files)" in result.output
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    write_jsonl(tmp_path / "a.jsonl.gz", ["x"])
    result = cptain("preprocess", make_run(data__input=["a.jsonl*"]))
    assert "a.jsonl and " in result.output
    assert "a.jsonl.gz would both become a: rename one" in result.output


def test_a_match_that_is_no_readable_file_is_never_left_out_without_a_word(
    make_run: RunFileMaker, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "in" / "good.jsonl", ["x"])
    file, odd = make_run(data__input=["in/**/*"]), tmp_path / "in" / "odd.jsonl"
    makers: list[Callable[[], object]] = [
        lambda: odd.symlink_to("nothing"),
        lambda: odd.symlink_to("odd.jsonl"),
        lambda: os.mkfifo(odd),
    ]
    for make in makers:
        make()
        result = cptain("preprocess", file)
        assert result.exit_code == 1
        assert result.output.startswith(f"cptain: data.input: {odd}: no regular file, or a link to nothing")
        odd.unlink()
    secret = tmp_path / "in" / "secret"
    write_jsonl(secret / "x.jsonl", ["x"])
    secret.chmod(0)
    process = cptain_process("preprocess", file, preexec_fn=obey_permissions)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, f"cptain: {secret}: Permission denied\n")
    secret.chmod(0o755)
    for name, said in ((b".jsonl", "has no name before its suffix"), (b"\xff.jsonl", "a name that is not UTF-8")):
        (Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name))).write_bytes(b'{"text": "x"}\n')
        result = cptain("preprocess", file, "--set", "data.input=['in/*', 'in/.json*']")
        assert f"{said}: rename it" in result.output
        (Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name))).unlink()
    folder = cptain("preprocess", file, "--set", "data.input=['in']")
    assert f"it is a folder: write {tmp_path}/in/**/*" in folder.output


def test_files_of_several_globs_are_named_from_their_common_folder(tmp_path: Path) -> None:
    for name in ("one/a.jsonl", "two/x/a.jsonl"):
        write_jsonl(tmp_path / name, ["x"])
    found = input_files([f"{tmp_path}/one/**/*.jsonl", f"{tmp_path}/two/x/a.jsonl"])
    assert sorted(found) == ["one/a", "two/x/a"]
