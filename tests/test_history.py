"""What a run remembers: the history, and that the record says what trained and not what the run file says now."""

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import cptain
from cptain.errors import CptainError
from cptain.history import KILLED, RUNNING, Recorder, Start, read_history, stretches, write_history
from cptain.megatron_version import whole_version
from cptain.run_file import load_run


def start(begin: int, last: int, **more: Any) -> Start:
    return Start(
        began="", start=begin, steps=20, run={}, data={}, layout={}, versions={}, last=last, saved=last, **more
    )


def test_a_start_of_training_leaves_one_line_that_says_what_it_did(trained_run: Path) -> None:
    run = load_run(trained_run)
    (line,) = read_history(run.folder)
    assert (line.start, line.last, line.saved, line.outcome) == (0, 8, 8, "done")
    assert line.sequences == 8 * run.train.global_batch_size
    assert line.run["train"]["lr"] == 1e-3
    assert line.layout == {"processes": 1, "nodes": 1, "tensor": 1, "pipeline": 1, "context": 1}
    assert line.versions["packages"]["megatron-core"]
    assert line.data["tokens"] > 0
    assert line.began <= line.ended


def test_the_steps_that_count_are_those_of_the_start_that_did_them_last() -> None:
    first, crashed, third = start(0, 10), start(8, 14), start(8, 20)  # the second saved nothing
    assert stretches([first, crashed, third], 20) == [(first, 1, 8), (third, 9, 20)]
    assert stretches([first, crashed, third], 8) == [(first, 1, 8)]
    assert stretches([first, start(10, 10)], 10) == [(first, 1, 10)]
    assert stretches([], 5) == []


def test_a_start_that_was_killed_is_called_so_by_the_next(tmp_path: Path) -> None:
    Recorder(tmp_path, lambda: start(0, 3)).record(outcome=RUNNING)
    Recorder(tmp_path, lambda: start(3, 4)).record(outcome="done")
    assert [one.outcome for one in read_history(tmp_path)] == [KILLED, "done"]


def test_a_history_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text("{}\n")
    with pytest.raises(CptainError, match=r"history\.jsonl: cannot be read: "):
        read_history(tmp_path)


def records(run_folder: Path) -> dict[str, bytes]:
    return {name: (run_folder / name).read_bytes() for name in ("run.toml", "provenance.json", "history.jsonl")}


def test_an_attempt_that_trains_nothing_changes_no_record(own_trained_run: Path) -> None:
    run = load_run(own_trained_run)
    before = records(run.folder)
    assert (
        cptain("train", own_trained_run, "--cpu", "--set", "train.eval_interval=3").exit_code == 0
    )  # all steps are done
    refused = cptain("train", own_trained_run, "--cpu", "--set", "train.steps=10", "--set", "parallel.tensor=8")
    assert refused.exit_code == 2
    assert records(run.folder) == before


def test_the_card_says_what_trained_and_not_what_export_was_told(own_trained_run: Path) -> None:
    run = load_run(own_trained_run)
    before = (run.folder / "run.toml").read_bytes()
    result = cptain(
        "export", own_trained_run, "--set", "train.lr=0.25", "--set", "train.global_batch_size=16", "--force"
    )
    assert result.exit_code == 0, result.output
    card = (run.hf_folder / "iter_0000008" / "README.md").read_text()
    assert "| learning rate | 0.001, cosine to 0.0001, 1 steps of warm-up |" in card
    assert "| global batch size | 8 sequences |" in card
    assert f"({8 * 8 * 64:,})" in card
    assert (run.folder / "run.toml").read_bytes() == before


def test_the_card_tells_the_steps_of_each_where_training_changed_on_the_way(own_trained_run: Path) -> None:
    run = load_run(own_trained_run)
    (one,) = read_history(run.folder)
    other = json.loads(json.dumps(one.run))
    other["train"]["lr"] = 5e-4
    secret = {"input": "/secret/*"}
    other["data"]["mix"] = [{**secret, "name": "ja", "repeat": 2.0}, {**secret, "repeat": 1.0}]
    write_history(run.folder, [dataclasses.replace(one, last=5, saved=4), dataclasses.replace(one, start=4, run=other)])
    assert cptain("export", own_trained_run, "--force").exit_code == 0  # a card that is there is kept
    card = (run.hf_folder / "iter_0000008" / "README.md").read_text()
    assert "0.001, cosine to 0.0001, 1 steps of warm-up (steps 1 to 4); 0.0005, cosine" in card
    assert "| mix | none (steps 1 to 4); ja 2 times, part 2 1 times (steps 5 to 8) |" in card
    assert "/secret" not in card


def test_a_config_that_was_edited_after_training_is_refused_at_resume_export_and_verify(
    own_trained_run: Path, model: Path, tmp_path: Path
) -> None:
    """Neither rope theta nor the norm's epsilon shows in a tensor's shape, and the logits of both sides agreed."""
    run = load_run(own_trained_run)
    assert cptain("export", own_trained_run).exit_code == 0
    exported = run.hf_folder / "iter_0000008"
    shutil.copytree(model, tmp_path / "other")
    hf, tokenizer = f'model.hf="{tmp_path}/other"', f'model.tokenizer="{model}"'
    for key, value, said in (
        ("rms_norm_eps", 0.01, "rms_norm_eps = 1e-05, where config.json has 0.01"),
        ("rope_theta", 10000.0, "rope_theta = 500000, where config.json has 10000"),
        ("rope_scaling", None, "rope_scaling = yes, where config.json has no"),
    ):
        for folder in (tmp_path / "other", exported):
            config = json.loads((model / "config.json").read_text())
            config = {name: old for name, old in config.items() if name not in ("rope_parameters",)}
            config |= {"rope_theta": 500000.0, "rope_scaling": ROPE, key: value}
            (folder / "config.json").write_text(json.dumps(config))
        for command in (
            ("train", own_trained_run, "--dry-run", "--set", hf, "--set", tokenizer, "--set", "train.steps=9"),
            ("export", own_trained_run, "--set", hf, "--set", tokenizer),
            ("verify", exported, run.checkpoints_folder),
            ("verify", exported, run.checkpoints_folder, "--logits"),
        ):
            result = cptain(*command)
            assert result.exit_code == 1, (command, result.output)
            assert f"iter_0000008: trained as a model with {said}" in result.output


ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_a_checkpoint_of_another_iteration_under_this_ones_name_is_refused(own_trained_run: Path) -> None:
    checkpoints = load_run(own_trained_run).checkpoints_folder
    shutil.rmtree(checkpoints / "iter_0000008")
    shutil.copytree(checkpoints / "iter_0000004", checkpoints / "iter_0000008")
    result = cptain("export", own_trained_run)
    assert result.exit_code == 1
    assert "iter_0000008: holds iteration 4, not the one that the folder's name says" in result.output


def test_other_data_is_refused_at_a_resume_and_recorded_where_it_is_accepted(
    own_trained_run: Path, texts: list[str]
) -> None:
    """preprocess again with other files, and training resumed at its sample count in another blend, silently."""
    from conftest import write_jsonl

    run = load_run(own_trained_run)
    write_jsonl(own_trained_run.parent / "more" / "new.jsonl", texts[:20])
    more = json.dumps([*run.data.input, str(own_trained_run.parent / "more" / "*.jsonl")])
    data = [f"data.input={more}", f'data.output="{own_trained_run.parent}/other data"', "train.steps=9"]
    sets = [word for one in data for word in ("--set", one)]
    assert cptain("preprocess", own_trained_run, *sets).exit_code == 0
    result = cptain("train", own_trained_run, "--cpu", *sets)
    assert result.exit_code == 1
    assert "was trained on other data: 3 → 4 files" in result.output
    assert "--accept data" in result.output
    result = cptain("train", own_trained_run, "--cpu", "--accept", "data", *sets)
    assert result.exit_code == 0, result.output
    assert read_history(run.folder)[-1].accepted[0].startswith("data: 3 → 4 files")


def test_the_megatron_that_trains_is_named_and_not_the_one_that_is_installed(tmp_path: Path) -> None:
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "package_info.py").write_text("MAJOR, MINOR = 0, 13\n__version__ = '0.13.1'\n")
    script = tmp_path / "pretrain_gpt.py"
    assert whole_version(script) == ("0.13.1", None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert whole_version(script) == ("0.13.1", head)
    installed = importlib.metadata.version("megatron-core")
    assert whole_version(tmp_path / "elsewhere" / "pretrain.py") == (installed, None)
