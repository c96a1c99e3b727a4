"""A tokenizer that is larger than the model, and which tokenizer an export has."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import RunFileMaker, as_if_trained, cptain, in_megatron, write_jsonl
from cptain.data.tokenizer import Tokenizer, tokenizer_facts
from cptain.run_file import load_run

TEXT = "吾輩は猫である。名前はまだ無い。"


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def extended(model: Path, folder: Path, vocab_size: int) -> Path:
    """The model's folder with ten Japanese tokens added to its tokenizer, 510 in all, and another vocab_size."""
    from transformers import AutoTokenizer

    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.add_tokens(["吾輩", "名前", *(f"追加{number}" for number in range(8))])
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
    return folder


@pytest.fixture
def larger(make_run: RunFileMaker, ready_run: Path, model: Path, tmp_path: Path) -> Path:
    """A run file whose data was made for a model large enough, and which now names the small one."""
    folder = extended(model, tmp_path / "larger", 510)
    write_jsonl(tmp_path / "in.jsonl", [TEXT] * 5)
    shared = {"model__megatron": str(load_run(ready_run).megatron_folder)}
    enough = make_run(data__input=["in.jsonl"], model__hf=str(folder), **shared)
    assert cptain("preprocess", enough, "--workers", 1).exit_code == 0
    return make_run(data__input=["in.jsonl"], model__tokenizer=str(folder), **shared)


def test_preprocess_refuses_it_before_it_writes_a_pair_with_both_sizes_and_how_much_is_over(
    make_run: RunFileMaker, model: Path, tmp_path: Path
) -> None:
    folder = extended(model, tmp_path / "larger", 500)
    write_jsonl(tmp_path / "in.jsonl", [TEXT] * 5)
    file = make_run(data__input=["in.jsonl"], model__hf=str(folder))
    result = cptain("preprocess", file, "--workers", 1)
    tokens = 5 * len(Tokenizer(str(folder), load_run(file).tokenizers_folder).exact([TEXT])[0])
    assert result.exit_code == 1
    assert last_line(result.output).startswith(
        f"cptain: {folder}: the tokenizer has 510 ids, and the model 500 ({folder}/config.json, vocab_size): what is "
        f"over has no row in the embedding (10 of the {tokens} tokens of the first documents): enlarge the model first"
    )
    assert not list(load_run(file).data_folder.rglob("*.bin"))


def test_train_refuses_it_and_counts_in_the_data_without_transformers(
    larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cptain.data.tokenizer.ask_transformers", lambda folder: pytest.fail("asked"))
    result = cptain("train", larger, "--cpu", "--dry-run")
    data = load_run(larger).data_folder
    tokens = json.loads((data / "manifest.json").read_text())["tokens"]
    assert result.exit_code == 1
    assert f"{tmp_path}/larger: the tokenizer has 510 ids, and the model 500 (" in last_line(result.output)
    assert f"(10 of the {tokens} tokens of {data})" in last_line(result.output)


def test_export_refuses_it_with_the_data_and_without(larger: Path) -> None:
    as_if_trained(larger)
    data = load_run(larger).data_folder
    result = cptain("export", larger)
    assert result.exit_code == 1
    assert "the tokenizer has 510 ids, and the model 500 (" in last_line(result.output)
    assert f" tokens of {data})" in last_line(result.output)
    shutil.rmtree(data)
    result = cptain("export", larger)
    assert result.exit_code == 1
    assert "the tokenizer has 510 ids, and the model 500 (" in last_line(result.output)
    assert not load_run(larger).hf_folder.exists()


def test_the_highest_id_counts_and_not_how_many_there_are(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 70_000}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "holes")
    facts = tokenizer_facts(str(tmp_path / "holes"))
    assert (facts.length, facts.size) == (3, 70_001)
    holed = Tokenizer(str(tmp_path / "holes"), facts=facts)
    assert holed.exact(["a"]) == [[70_000]]
    assert np.iinfo(np.uint16).max < holed.vocab_size  # so that its ids are written in four bytes


def test_an_export_has_the_tokenizer_that_the_run_trained_with(
    make_ready_run: RunFileMaker, model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.add_special_tokens({"pad_token": "猫"})
    tokenizer.save_pretrained(tmp_path / "own")
    base = Path(shutil.copytree(model, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    for folder, name in ((base, "chat_template.jinja"), (base, "vocab.json"), (tmp_path / "own", "tokenizer.model")):
        (folder / name).write_text("{}")
    (base / "config.json").write_text(json.dumps(config))
    (base / "LICENSE").write_text("licence")
    file = make_ready_run(model__hf=str(base))
    exported = as_if_trained(file)
    assert cptain("export", file).exit_code == 0
    assert (exported / "vocab.json").exists()
    own = ("--set", f"model.tokenizer='{model}'")
    assert cptain("export", file, *own).exit_code == 0  # not done: the base's own tokenizer is there
    assert not (exported / "vocab.json").exists()
    assert not (exported / "chat_template.jinja").exists()
    assert (exported / "LICENSE").read_text() == "licence"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (model / name).read_bytes()
    assert "is done: it is what would be written" in cptain("export", file, *own).output
    larger = cptain("export", file, "--set", f"model.tokenizer='{tmp_path}/own'")
    assert "the tokenizer has 501 ids, and the model 500" in last_line(larger.output)
    nothing = cptain("export", file, "--set", f"model.tokenizer='{tmp_path}'")
    assert f"cptain: {tmp_path}: no tokenizer in this folder" in nothing.output


def test_a_rank_builds_a_tokenizer_only_where_an_argument_asks_for_the_end_of_a_document() -> None:
    script = """
from types import SimpleNamespace
from megatron.training import global_vars
from cptain.megatron import no_tokenizer
global_vars.build_tokenizer = lambda args: "Megatron's own"
no_tokenizer.install()
def built(**asked):
    args = SimpleNamespace(make_vocab_size_divisible_by=256, tensor_model_parallel_size=2, **asked)
    tokenizer = global_vars.build_tokenizer(args)
    return getattr(tokenizer, "vocab_size", tokenizer)
found = [built(eod_mask_loss=mask) for mask in (False, True)]
"""
    assert in_megatron(script) == [512, "Megatron's own"]
