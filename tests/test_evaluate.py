"""cptain eval: a run's models in a task of the real lm-evaluation-harness, against transformers' own likelihoods."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunFileMaker, cptain
from cptain.checkpoint.evaluate import Score, table
from cptain.run_file import load_run
from safetensors.torch import load_file, save_file

QUESTIONS = [
    {"question": f"第{number}話。吾輩は", "choices": [" cat", " dog house", " 猫である", " x"], "answer": number % 4}
    for number in range(10)
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one task, "first-word", whose data is a file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(one) for one in QUESTIONS))
    (folder / "first-word.yaml").write_text(TASK.format(name="first-word", data=data))
    return folder


def accuracy(folder: Path) -> float:
    """By transformers: how often the likeliest choice is the right one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    for one in QUESTIONS:
        likelihoods = []
        for choice in one["choices"]:  # type: ignore[attr-defined]
            begin = tokenizer(one["question"])["input_ids"]
            ids = tokenizer(f"{one['question']}{choice}")["input_ids"]
            logits = model(torch.tensor([ids])).logits[0].detach().float().log_softmax(-1)
            likelihoods.append(sum(float(logits[at - 1, ids[at]]) for at in range(len(begin), len(ids))))
        right += likelihoods.index(max(likelihoods)) == one["answer"]
    return right / len(QUESTIONS)


def test_the_base_and_the_exports_are_scored_once_and_the_change_is_said(
    make_run: RunFileMaker, tasks: Path, tmp_path: Path
) -> None:
    file = make_run()
    run = load_run(file)
    command = ("eval", file, "--task", "first-word", "--tasks-folder", tasks)
    alone = cptain(*command)
    assert alone.exit_code == 0, alone.output
    assert f"eval: no export in {run.hf_folder} yet: the base model alone\n" in alone.output

    export = Path(shutil.copytree(run.model.hf, run.hf_folder / "iter_0000008"))
    noise = torch.Generator().manual_seed(3)
    for weights in export.glob("*.safetensors"):
        noisy = {
            name: (one.float() + torch.randn(one.shape, generator=noise)).to(one.dtype)
            for name, one in load_file(weights).items()
        }
        save_file(noisy, weights, {"format": "pt"})
    result = cptain(*command, "--json")
    assert result.exit_code == 0, result.output
    assert "eval: base: " not in result.output  # which is done
    assert "eval: iter_0000008: first-word\n" in result.output
    scores = json.loads((run.folder / "eval.json").read_text())
    assert json.loads(result.stdout) == {"scores": scores}
    found = {one["model"]: one for one in scores}
    assert found["base"]["value"] == accuracy(Path(run.model.hf))
    assert found["iter_0000008"]["value"] == accuracy(export)
    assert {one["samples"] for one in scores} == {len(QUESTIONS)}

    (export / "config.json").touch()  # as if it had been exported again
    again = cptain(*command)
    assert "eval: iter_0000008: first-word\n" in again.output
    header, row = again.stdout.splitlines()
    assert header.split() == ["task", "metric", "questions", "base", "iter_0000008", "change"]
    assert row.split()[:3] == ["first-word", "acc", str(len(QUESTIONS))]
    (export / "verify.json").write_text("{}")  # as cptain verify --logits would
    assert cptain(*command).stdout == cptain(*command).output == again.stdout
    few = cptain(*command, "--limit", "2", "--few-shot", "0")
    assert few.output.count("eval: ") == 2
    assert few.stdout.splitlines()[-1].split()[2] == "2"
    assert len(json.loads((run.folder / "eval.json").read_text())) == 4

    unknown = cptain("eval", file, "--task", "first-words", "--tasks-folder", tasks)
    assert unknown.exit_code == 2
    assert unknown.output.startswith("cptain: eval: first-words: no such task (alike: first-word")


def test_without_the_harness_one_line_says_how_to_get_it(
    make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = cptain("eval", make_run(), "--task", "first-word")
    assert result.exit_code == 1
    assert result.output.endswith("it needs lm-evaluation-harness: pip install 'cptain[eval]'\n")


def test_a_change_beyond_two_standard_errors_is_marked_and_a_group_is_one_line() -> None:
    def score(model: str, value: float, **changes: Any) -> Score:
        of = {"asked": "g", "task": "g", "metric": "acc,none", "error": 0.01, "higher_is_better": True, **changes}
        more = {"weights": "", "version": "1", "harness": "", "samples": 100, "few_shot": None, "limit": None}
        return Score(model=model, value=value, **of, **more)

    scores = [
        *(score("base", 0.5, task=task) for task in ("g", "g_part")),
        *(score("iter_1", value, task=task) for task, value in (("g", 0.45), ("g_part", 0.9))),
        *(score(model, 20.0 + len(model), asked="p", task="p", higher_is_better=False) for model in ("base", "iter_1")),
        *(score(model, 0.5 + 0.001 * len(model), asked="n", task="n") for model in ("base", "iter_1")),
    ]
    assert [line.split("  ")[-1].strip() for line in table(scores).splitlines()] == [
        "change",
        "-0.05 worse *",
        "+2 worse *",
        "+0.002 better",
        "* beyond 2 standard errors of the difference",
    ]
