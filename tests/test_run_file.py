"""The run file: what is read, and what is refused with which line."""

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain
from cptain.errors import BAD_USAGE, CptainError
from cptain.run_file import load_run, write_resolved


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(CptainError) as raised:
        load_run(file, overrides)
    assert raised.value.exit_status == BAD_USAGE
    return str(raised.value)


@pytest.mark.parametrize("name", ["tiny.toml", "swallow-8b.toml"])
def test_the_run_files_of_the_project_are_valid(name: str) -> None:
    assert load_run(Path(__file__).parent.parent / "runs" / name).train.steps


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"train__lr_": 1},
            "train.lr_ = 1: no such key (allowed: adam_beta1, adam_beta2, adam_eps, batch_ramp, clip_grad",
        ),
        (
            {"modell": {}},
            "modell: no such key (allowed: data, jobs, model, name, parallel, sweep, train, wandb, work_dir)",
        ),
        ({"train__lr": "fast"}, 'train.lr = "fast": input should be a valid number'),
        ({"train__lr": 0.0}, "train.lr = 0.0: input should be greater than 0"),
        ({"train__seq_length": None}, "train.seq_length: is missing"),
        ({"train__precision": "fp4"}, "train.precision = \"fp4\": input should be 'bf16', 'fp8' or 'fp32'"),
        ({"train__tokens": "15B"}, "train: give exactly one of steps, tokens and epochs (given: steps, tokens)"),
        ({"train__steps": None}, "train: give exactly one of steps, tokens and epochs (given: none)"),
        (
            {"train__steps": None, "train__tokens": "15X"},
            'train.tokens = "15X": allowed: a whole number, or digits with K',
        ),
        ({"train__global_batch_size": 7}, "train: global_batch_size = 7 is not a multiple of micro_batch_size = 2"),
        ({"train__min_lr": 1.0}, "train: min_lr = 1.0 is over lr = 0.001"),
        ({"train__warmup_steps": 8}, "train: warmup_steps = 8 must be under steps = 8"),
        ({"data__mix": "token"}, 'data.mix = "token": allowed: "tokens", "uniform", or [[data.mix]] tables'),
        ({"data__mix": [{"input": "x", "weigth": 1.0}]}, "data.mix[0].weigth = 1.0: no such key (allowed: input, name"),
        ({"data__split": "1,2"}, 'data.split = "1,2": allowed: the weights of train, validation and test'),
        ({"data__split": "0,1,0"}, 'data.split = "0,1,0": nothing is left to train on'),
        ({"data__input": []}, "data: give input, globs of text files, or tokenized, globs of .bin/.idx pairs, or both"),
        ({"data__input": ["$CPTAIN_NOWHERE/x.jsonl"]}, "the environment variable $CPTAIN_NOWHERE is not set"),
        ({"data__on_error": "ignore"}, "data.on_error = \"ignore\": input should be 'fail' or 'skip'"),
        ({"name": "a/b"}, 'name = "a/b": string should match pattern'),
        ({"name": "../up"}, 'name = "../up": string should match pattern'),
        ({"jobs__walltime": "36h"}, 'jobs.walltime = "36h": allowed: HH:MM:SS'),
        ({"sweep": {"train.lrr": [1]}}, 'sweep: no key "train.lrr" in a run file'),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_file_key_and_what_is_allowed(
    make_run: RunFileMaker, changes: dict[str, Any], line: str
) -> None:
    file = make_run(**changes)
    lines = refusal(file).splitlines()
    assert any(one.startswith(f"{file}: ") and line in one for one in lines), lines


def test_the_command_prints_the_refusal_and_exits_2(make_run: RunFileMaker) -> None:
    file = make_run(train__lr="fast", train__seq_length=-1)
    result = cptain("convert", file)
    assert result.exit_code == 2
    assert result.output.splitlines() == [
        f"cptain: {file}: train.seq_length = -1: input should be greater than 0",
        f'cptain: {file}: train.lr = "fast": input should be a valid number, unable to parse string as a number',
    ]


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    assert "no.toml: cannot read the run file: No such file" in refusal(tmp_path / "no.toml")
    (tmp_path / "broken.toml").write_text("name = ")
    assert "broken.toml: not TOML: Invalid value (at end of document)" in refusal(tmp_path / "broken.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    assert "latin.toml: the run file is not UTF-8 (byte 8)" in refusal(tmp_path / "latin.toml")


def test_set_overrides_any_key_with_a_toml_value_or_one_bare_word(make_run: RunFileMaker) -> None:
    file = make_run()
    overrides = (
        "train.lr=2.5e-3",
        "name='a b'",
        "train.precision=bf16",
        'data.input=["x/*.jsonl"]',
        "parallel.tensor=2",
    )
    run = load_run(file, overrides)
    assert (run.train.lr, run.name, run.train.precision, run.parallel.tensor) == (2.5e-3, "a b", "bf16", 2)
    assert run.data.input == [str(file.parent / "x/*.jsonl")]
    assert load_run(make_run(sweep={"train.lr": [1]}), ('sweep."train.lr"=[1, 2]',)).sweep == {"train.lr": [1, 2]}


def test_set_says_anew_how_long_a_run_is(make_run: RunFileMaker) -> None:
    train = load_run(make_run(), ("train.tokens=1K",)).train
    assert (train.steps, train.tokens) == (None, 1000)


@pytest.mark.parametrize(
    "override", ["train.lr", "=1", "train..lr=1", "train.lr=1\nname='x'", "name=two words", "name.x=1"]
)
def test_an_override_that_is_not_one_key_and_one_value_is_refused(make_run: RunFileMaker, override: str) -> None:
    assert refusal(make_run(), override).startswith(f"--set {override}: ")


def test_paths_are_resolved_from_the_run_files_folder_with_home_and_variables(
    make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir("/")
    run = load_run(
        make_run(work_dir="../runs", model__hf="~/model", data__input=["$SCRATCH/**/*.jsonl", "${SCRATCH}/x"])
    )
    assert run.work_dir == tmp_path.parent / "runs"
    assert run.model.hf == "/home/me/model"
    assert run.data.input == ["/scratch/me/**/*.jsonl", "/scratch/me/x"]
    assert run.folder == tmp_path.parent / "runs" / "run"


def test_a_model_is_a_folder_where_there_is_one_and_else_a_hub_id(make_run: RunFileMaker, tmp_path: Path) -> None:
    file = make_run(model__hf="org/name")
    assert load_run(file).model.hf == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert load_run(file).model.hf == str(tmp_path / "org" / "name")


def test_tokens_take_a_suffix(make_run: RunFileMaker) -> None:
    assert load_run(make_run(train__steps=None, train__tokens="1.5B")).train.tokens == 1_500_000_000


def test_the_resolved_run_file_loads_as_the_same_run_and_changes_are_reported(make_run: RunFileMaker) -> None:
    run = load_run(make_run(wandb__project="p", sweep={"train.lr": [1e-5, 5e-5]}))
    assert write_resolved(run) == []
    assert load_run(run.folder / "run.toml") == run
    changed = load_run(make_run(wandb__project="p", train__lr=0.5, sweep={"train.lr": [1e-5, 5e-5]}))
    assert write_resolved(changed) == ["train.lr: 0.001 → 0.5"]


def test_a_stage_leaves_the_resolved_run_file_and_its_provenance(ready_run: Path) -> None:
    import json

    folder = ready_run.parent / "runs" / "run"
    assert tomllib.loads((folder / "run.toml").read_text())["train"]["steps"] == 8
    provenance = json.loads((folder / "provenance.json").read_text())
    assert set(provenance) == {"preprocess", "convert"}
    assert provenance["convert"]["packages"]["torch"]
    assert provenance["convert"]["host"] == os.uname().nodename
