"""--json and --quiet of the stages: what was done is one object on stdout, and progress is not shown."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, as_if_trained, cptain
from cptain import progress
from cptain.data.manifest import read_manifest
from cptain.megatron.log import read_steps, train_logs
from cptain.run_file import load_run


def summary(*arguments: object, status: int = 0) -> dict[str, Any]:
    """The object that a stage prints: all of stdout."""
    done = cptain(*arguments, "--json")
    assert done.exit_code == status, done.output
    found = json.loads(done.stdout)
    assert list(found)[:3] == ["command", "exit_status", "error"]
    assert (found["command"], found["exit_status"]) == (arguments[0], status)
    said = done.stderr.splitlines()[-1]
    assert (found["error"] is None) == (not said.startswith("cptain: "))
    assert found["error"] is None or said == f"cptain: {found['error']}"
    assert list(found)[-1] == "seconds"
    return dict(found)


def test_preprocess_and_convert_say_what_the_manifest_and_the_disk_say(
    make_run: RunFileMaker, text_folder: Path
) -> None:
    file = make_run(
        data__validation=[{"name": "held", "input": f"{text_folder}/a.jsonl"}],
        data__input=[f"{text_folder}/sub/**/*"],
        data__split=None,
    )
    found, run = summary("preprocess", file), load_run(file)
    records = read_manifest(run.data_folder, run.data.sources)
    for key in ("documents", "tokens", "text_bytes", "skipped"):
        assert found[key] == sum(getattr(record, key) for record in records)
    assert (found["files"], found["folder"]) == (2, str(run.data_folder))
    assert found["validation"]["held"]["documents"] == 40
    assert summary("preprocess", file)["were_done"] == 2
    converted = summary("convert", file)
    assert (converted["folder"], converted["written"]) == (str(run.megatron_folder / "release"), True)
    assert converted["bytes"] > 100_000
    assert summary("convert", file)["written"] is False


def test_train_says_what_its_log_says_and_a_job_without_time_what_it_did_not(
    make_ready_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_ready_run(train__steps=2, train__warmup_steps=0)
    with monkeypatch.context() as late:
        late.setenv("CPTAIN_DEADLINE", "1")
        assert "no time is left" in summary("train", file, "--cpu", status=75)["error"]
    found = summary("train", file, "--cpu")
    (log,) = train_logs(load_run(file).logs_folder)
    first, last = read_steps([log])
    assert (found["start"], found["step"], found["steps"], found["saved"], found["log"]) == (0, 2, 2, 2, str(log))
    assert (found["first_loss"], found["loss"]) == (first.loss, last.loss)
    again = summary("train", file, "--cpu")
    assert (again["saved"], "loss" in again) == (2, False)
    assert "--num-layers" in summary("train", file, "--cpu", "--dry-run", "--set", "train.steps=4")["argv"]


def test_export_verify_and_merge_say_which_were_written_and_how_many_are_equal(
    make_ready_run: RunFileMaker, tmp_path: Path
) -> None:
    file = make_ready_run()
    second = as_if_trained(file, 1, 2)
    first, run = second.parent / "iter_0000001", load_run(file)
    exports = summary("export", file, "--iteration", "all")["iterations"]
    assert {step: one["folder"] for step, one in exports.items()} == {"1": str(first), "2": str(second)}
    assert exports["1"]["bytes"] == exports["2"]["bytes"] > 100_000
    compared = summary("verify", first, run.checkpoints_folder / first.name)
    assert compared["tensors"] == compared["equal"] > 20
    merged = summary("merge", tmp_path / "merged", second, first)
    assert (merged["written"], merged["models"], merged["bytes"]) == (True, 2, exports["2"]["bytes"])
    (first / "config.json").write_text("{}")
    wrong = summary("verify", first, status=1)
    assert wrong["wrong"] == ["config.json: changed"]
    assert set(wrong["made_of"].values()) == {"unchanged"}


def test_an_export_that_fails_leaves_the_others_in_the_summary(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run()
    as_if_trained(file, 1, 2)
    (load_run(file).checkpoints_folder / "iter_0000002" / "common.pt").write_bytes(b"")
    found = summary("export", file, "--iteration", "all", status=1)["iterations"]
    assert "error" in found["2"]
    assert found["1"]["written"]


def test_what_a_library_or_a_process_prints_is_not_in_the_object() -> None:
    script = (
        "import os, subprocess\nfrom cptain.summary import as_json, say\n"
        "with as_json('stage'):\n"
        " print('of Python'); os.write(1, b'of a library\\n'); subprocess.run(['echo', 'of a process'])\n"
        " say('said', loss=float('nan'), path=__import__('pathlib').Path('x'))\n"
        "print('after')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    document, _, rest = done.stdout.partition("}\n")
    assert json.loads(document + "}")["loss"] is None
    assert rest == "after\n"
    assert sorted(done.stderr.splitlines()) == ["of Python", "of a library", "of a process", "said"]


def test_quiet_shows_no_progress_and_what_was_done_all_the_same(
    make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    file = make_run()
    shown = cptain("convert", file).stderr
    assert " left" in shown
    quiet = cptain("convert", file, "--force", "-q").stderr
    assert quiet.startswith("convert: ")
    assert quiet.count("\n") == 1
