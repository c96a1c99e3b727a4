"""generate: the likeliest tokens are those of transformers' own logits, and bad input is a line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import cptain
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_the_likeliest_tokens_are_added_one_after_the_other(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("An apple")["input_ids"]
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    wanted = list(ids)
    for _ in range(5):
        with torch.no_grad():
            wanted.append(int(network(torch.tensor([wanted])).logits[0, -1].argmax()))
    done = cptain("generate", model, "An apple", "--tokens", "5")
    assert done.exit_code == 0, done.output
    assert done.stdout == tokenizer.decode(wanted, skip_special_tokens=True) + "\n"
    assert "generate: 5 tokens" in done.stderr


def test_sampling_repeats_by_its_seed(model: Path) -> None:
    def said(seed: int) -> str:
        return cptain("generate", model, "An", "--tokens", "8", "--temperature", "5", "--seed", seed).stdout

    assert said(1) == said(1) != said(2)


@pytest.mark.parametrize(("damage", "status"), [("missing", 2), ("weights", 1)])
def test_a_model_that_cannot_speak_is_one_line(model: Path, tmp_path: Path, damage: str, status: int) -> None:
    folder = tmp_path / "m"
    if damage == "weights":
        shutil.copytree(model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    done = cptain("generate", folder, "An apple")
    assert (done.exit_code, done.stdout) == (status, "")
    assert done.stderr.splitlines()[-1].startswith(f"cptain: generate: {folder}: ")
