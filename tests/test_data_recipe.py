"""How the data was made: told once, and asked by preprocess, by sweeps and by train."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunFileMaker, cptain, write_jsonl
from cptain.data.recipe import options
from cptain.data.tokenizer import Tokenizer
from cptain.run_data import Data
from cptain.run_file import load_run
from cptain.scheduling.sweep import expand


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def test_train_refuses_data_made_with_other_options_and_names_each_with_both_values(
    make_ready_run: RunFileMaker,
) -> None:
    file = make_ready_run(data__key="body", data__strip=True)
    result = cptain("train", file, "--cpu")
    assert result.exit_code == 1
    assert last_line(result.output) == (
        f'cptain: {load_run(file).data_folder}: made with data.key = "text", and the run file has "body"; '
        "with data.strip = false, and the run file has true: run preprocess again"
    )


def test_train_refuses_data_of_another_tokenizer(make_ready_run: RunFileMaker, model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other")) / "tokenizer_config.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "split_special_tokens": True}))
    result = cptain("train", make_ready_run(model__tokenizer="./other"), "--cpu")
    assert result.exit_code == 1
    said = f": made with another model.tokenizer, and the run file has {tmp_path}/other (sha256 "
    assert said in last_line(result.output)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("data.key", ["text", "body"]),
        ("data.strip", [False, True]),
        ("data.on_error", ["fail", "skip"]),
        ("data.max_document_bytes", [1000, 2000]),
    ],
)
def test_a_sweep_over_what_changes_the_data_gives_each_value_its_own_folder(
    make_run: RunFileMaker, key: str, values: list[Any]
) -> None:
    file = make_run(sweep={key: values})
    assert len({run.data_folder for run in expand(load_run(file), file)}) == 2


def test_a_sweep_over_what_leaves_the_data_alone_shares_one_folder(make_run: RunFileMaker) -> None:
    file = make_run(sweep={"data.check_fraction": [0, 1], "data.split": ["9,1,0", "8,2,0"], "data.max_epochs": [1, 2]})
    assert len({run.data_folder for run in expand(load_run(file), file)}) == 1


def test_every_key_of_data_is_part_of_the_recipe_or_known_to_change_no_pair(make_run: RunFileMaker) -> None:
    """A new key of [data] is either a field of Recipe, and refused by train, or is named here."""
    no_part = {"input", "output", "mix", "stage", "split", "check_fraction", "max_epochs", "documents"}
    no_part |= {"validation", "tokenized"}  # a set has a recipe of its own, a pair that others made has none
    assert set(options(load_run(make_run()))) == set(Data.model_fields) - no_part


def test_the_recipe_stands_once_in_the_manifest_and_once_in_every_record(ready_run: Path) -> None:
    folder = load_run(ready_run).data_folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["recipe"]["key"] == "text"
    assert manifest["recipe"]["tokenizer_size"] == 500
    assert not any("recipe" in record for record in manifest["records"])
    for record in manifest["records"]:
        own = json.loads((folder / ".records" / f"{record['prefix']}.json").read_text())
        assert own == {**record, "recipe": manifest["recipe"]}


def test_a_manifest_of_an_earlier_version_is_one_line_and_its_files_are_done_again(
    make_run: RunFileMaker, ready_run: Path
) -> None:
    file = make_run()
    folder = load_run(file).data_folder
    shutil.copytree(load_run(ready_run).data_folder, folder, ignore=shutil.ignore_patterns(".in-use"))
    for path in (folder / "manifest.json", *(folder / ".records").rglob("*.json")):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in content.items() if key != "recipe"}))
    result = cptain("train", file, "--cpu")
    assert last_line(result.output) == (
        f"cptain: {folder}/manifest.json: written by an earlier version of cptain: run preprocess again"
    )
    again = cptain("preprocess", file)
    assert again.exit_code == 0
    assert "done and unchanged" not in again.output


def test_split_special_tokens_gives_the_ids_of_transformers(
    make_run: RunFileMaker, model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    texts = ["a <|end_of_text|> b", "<|begin_of_text|>", "none of them", "<|end_of_text|><|end_of_text|>x"]
    folder = Path(shutil.copytree(model, tmp_path / "splitting"))
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "split_special_tokens": True}))
    expected = [AutoTokenizer.from_pretrained(str(folder))(text).input_ids for text in texts]
    whole = [AutoTokenizer.from_pretrained(str(model))(text).input_ids for text in texts]
    assert expected[0] != whole[0]
    write_jsonl(tmp_path / "in.jsonl", texts)
    file = make_run(data__input=["in.jsonl"], model__tokenizer=str(folder), data__check_fraction=1)
    result = cptain("preprocess", file, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "tokenizer: tokenizers, of Hugging Face (no other knows its split_special_tokens = true)" in result.output
    data = load_run(file).data_folder
    eod = Tokenizer(str(folder), load_run(file).tokenizers_folder).eod
    ids = np.fromfile(data / "in_text_document.bin", np.uint16).tolist()
    assert ids == [one for document in expected for one in (*document, eod)]
    assert json.loads((data / "manifest.json").read_text())["recipe"]["split_special_tokens"] is True
