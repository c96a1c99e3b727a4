"""[[data.validation]]: sets of their own, a loss each, and no text that is trained on."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunFileMaker, cptain, in_megatron, write_jsonl
from cptain.data.indexed_dataset import EncodedDocuments, IndexedDatasetWriter
from cptain.data.manifest import read_manifest
from cptain.data.overlap import texts_in_both
from cptain.data.split import training_tokens
from cptain.data.validation import data_folders
from cptain.megatron.log import parse_validation, parse_validation_sets, train_logs
from cptain.run_file import load_run
from cptain.training.metrics import metrics_file, read_metrics
from cptain.training.validation import Rounds, round_length


@pytest.fixture
def sets(tmp_path: Path, texts: list[str]) -> list[dict[str, str]]:
    """Two sets: one of Japanese, and one of which the training data has a part."""
    write_jsonl(
        tmp_path / "held" / "ja.jsonl",
        [f"第{number}話。名前はまだ無いが、そのうち付ける。" * 9 for number in range(12)],
    )
    write_jsonl(
        tmp_path / "held" / "both.jsonl.gz", [*(f"No text has {n} of these. " * 30 for n in range(6)), *texts[:5]]
    )
    return [
        {"name": "ja", "input": str(tmp_path / "held" / "ja.jsonl")},
        {"name": "part", "input": str(tmp_path / "held" / "both*")},
    ]


def test_each_set_has_its_own_loss_in_log_and_metrics_which_is_the_models_own(
    make_run: RunFileMaker, sets: list[dict[str, str]]
) -> None:
    file = make_run(data__validation=sets, data__split=None, train__eval_steps=2)
    made = cptain("preprocess", file)
    assert made.exit_code == 0, made.output
    assert "preprocess: validation part: 5 texts are trained on too: left out" in made.output
    assert "preprocess: validation ja: " not in made.output.replace("preprocess: validation ja:\n", "")
    assert cptain("convert", file).exit_code == 0
    sizes = ("--set", "parallel.pipeline=2", "--set", 'train.megatron_args=["--exit-interval", "4"]')
    stopped = cptain("train", file, "--cpu", *sizes)  # only the first stage and the last read data
    assert stopped.exit_code == 75, stopped.output
    assert "train: validation part: 6 texts, " in stopped.output
    assert " tokens; 5 more are trained on too, and left out" in stopped.output
    resumed = cptain(
        "train", file, "--cpu", "--set", "parallel.tensor=2"
    )  # the numbers of the sets are sent to the peer
    assert resumed.exit_code == 0, resumed.output
    run = load_run(file)
    metrics = read_metrics(metrics_file(run))
    assert "validation_loss/ja" not in metrics[5]
    assert stopped.output.count("train: step 0: validation loss ") == 1  # before the first step
    assert "train: step 0: " not in resumed.output
    found = in_megatron(_LOSSES.format(run=str(file)))
    assert found.keys() == {"0", "4", "8"}
    for step, losses in found.items():
        logged = {name: metrics[int(step)][f"validation_loss/{name}"] for name in losses}
        # Megatron trains the vocabulary's padding, which is cut off an export.
        assert logged == pytest.approx(losses, abs=5e-3)
        assert abs(logged["ja"] - logged["part"]) > 0.05 or step == "0"
    assert f"(ja {logged['ja']:.4f}, part {logged['part']:.4f})" in resumed.output


# The loss of every set, by transformers' model of the export.
_LOSSES = """
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
from cptain.checkpoint.export import export
from cptain.run_file import load_run
from cptain.training.validation import read_sets
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from transformers import AutoModelForCausalLM

run = load_run(Path({run!r}))
tokenizer = SimpleNamespace(unique_identifiers={{}}, eod=0, pad=-1, vocab_size=500)
found = {{}}
for step in (0, 4, 8):
    if step:
        export(run, step)
    folder = run.hf_folder / f"iter_{{step:07d}}" if step else run.model.hf
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found[step] = {{}}
    for one in read_sets(run.folder / "validation-sets.json"):
        config = GPTDatasetConfig(
            random_seed=1234, sequence_length=64, blend=(["none"], None), split="0,1,0", path_to_cache=str(run.folder),
            tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
            create_attention_mask=False)
        count = min(16, one.sequences(64))
        texts = np.arange(len(one.documents), dtype=np.int32)
        data = GPTDataset(one.documents, one.documents.path_prefix, texts, count, Split.valid, config)
        losses = []
        with torch.no_grad():
            for sample in map(data.__getitem__, range(count)):
                logits = torch.nn.functional.pad(model(sample["tokens"].long()[None]).logits[0], (0, 12))
                losses.append(torch.nn.functional.cross_entropy(logits, sample["labels"].long()))
        found[step][one.name] = float(torch.stack(losses).mean())
"""


def test_without_steps_of_it_nothing_is_validated_and_what_is_split_off_stays_unseen(
    make_ready_run: RunFileMaker, make_run: RunFileMaker, sets: list[dict[str, str]]
) -> None:
    file = make_ready_run(train__eval_steps=0)
    result = cptain("train", file, "--cpu")
    assert result.exit_code == 0, result.output
    run = load_run(file)
    assert not any("validation_loss" in values for values in read_metrics(metrics_file(run)).values())
    assert "validation loss" not in "".join(log.read_text() for log in train_logs(run.logs_folder))
    records = read_manifest(run.data_folder, run.data.sources)
    assert f" {training_tokens(run.data_folder, records, '90,10,0'):,} tokens to train on" in result.output
    both = cptain("preprocess", make_run(data__validation=sets, data__split=None, train__eval_steps=0))
    assert both.exit_code == 2
    assert "train.eval_steps = 0: no validation is made, and data.validation is given: leave one out" in both.output


def test_a_round_holds_each_sequence_once_wherever_it_begins() -> None:
    import torch

    sequences = [[{"tokens": f"{name}{n}", "loss_mask": torch.ones(3)} for n in range(9)] for name in "ab"]
    rounds = Rounds(sequences, [5, 2], 4, 40)
    assert len(rounds) == 40
    assert round_length([5, 2], 4) == 8
    for begin in (0, 3, 8, 21):
        seen = [rounds[begin + place] for place in range(8)]
        counted = {one["tokens"]: float(one["loss_mask"].max()) for one in seen if one["loss_mask"].any()}
        assert counted == {**{f"a{n}": 1.0 for n in range(5)}, **{f"b{n}": 2.0 for n in range(2)}}


def test_texts_in_both_are_found_token_by_token(tmp_path: Path) -> None:
    """Against a plain comparison, on texts of few tokens, which are alike in many places."""
    generator = random.Random(7)
    made: dict[str, list[list[int]]] = {}
    eod = 9
    for name, count, dtype in (("few", 300, np.int32), ("more", 900, np.uint16), ("others", 500, np.int32)):
        made[name] = [[generator.randrange(3) for _ in range(generator.randrange(9))] for _ in range(count)]
        made[name][3] = [1] * 5000
        made[name][4] = [1] * 4999 + [len(name)]
        writer = IndexedDatasetWriter(tmp_path / f"{name}.bin", dtype)
        for number, text in enumerate(made[name]):
            ids = text if name == "more" and number % 2 else [*text, eod]  # as by a tool that adds none
            lengths = np.array([len(ids)], dtype=np.int32)
            writer.add(EncodedDocuments(np.array(ids, dtype=dtype), lengths, np.ones(1, dtype=np.int64)))
        writer.write_index(tmp_path / f"{name}.idx")
    many = {tuple(ids) for name in ("more", "others") for ids in made[name]}
    plain = [number for number, ids in enumerate(made["few"]) if ids and tuple(ids) in many]
    assert 10 < len(plain) < 290
    both = texts_in_both([tmp_path / "few"], [tmp_path / "more", tmp_path / "others"], eod)
    assert both == {tmp_path / "few": plain}
    assert texts_in_both([tmp_path / "few"], [], eod) == {}


def test_a_set_of_pairs_that_are_there_is_compared_with_the_data_as_one_of_text_is(
    make_run: RunFileMaker, sets: list[dict[str, str]], tmp_path: Path
) -> None:
    held = make_run(data__input=[sets[1]["input"]], data__output=str(tmp_path / "held-pairs"))
    assert cptain("preprocess", held).exit_code == 0
    pairs = [{"name": "part", "tokenized": f"{tmp_path}/held-pairs/*"}]
    file = make_run(data__validation=pairs, data__split=None)
    made = cptain("preprocess", file)
    assert made.exit_code == 0, made.output
    assert "preprocess: validation part: 5 texts are trained on too: left out" in made.output
    assert cptain("convert", file).exit_code == 0
    dry = cptain("train", file, "--cpu", "--dry-run")
    assert "train: validation part: 6 texts, " in dry.output
    both = make_run(data__tokenized=[pairs[0]["tokenized"]], data__validation=pairs, data__split=None)
    folders = data_folders(load_run(both))  # a training takes the lock of each
    assert folders.count(tmp_path / "held-pairs") == 1
    own = [{"name": "own", "tokenized": f"{tmp_path}/held-pairs/both_text_document"}]
    refused = cptain(
        "preprocess",
        make_run(data__tokenized=[own[0]["tokenized"]], data__input=[], data__validation=own, data__split=None),
    )
    assert refused.exit_code == 2
    assert refused.output.endswith("held-pairs/both_text_document.bin is trained on too: leave it out of one\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__validation": [{"name": "a", "input": "x"}], "data__split": "90,10,0"},
            'data: split = "90,10,0": with [[data.validation]] all of the data is trained on: leave it out',
        ),
        (
            {"data__validation": [{"name": "a", "input": "x"}, {"name": "a", "input": "y"}]},
            'data: two [[data.validation]] sets are called "a"',
        ),
        ({"data__validation": [{"name": "a b", "input": "x"}]}, "data.validation[0].name"),
        ({"data__validation": [{"name": "a"}]}, "give input or tokenized"),
        ({"data__validation": [{"name": "a", "input": "x", "tokenized": "y"}]}, "give input or tokenized"),
    ],
)
def test_sets_that_cannot_be_are_refused(make_run: RunFileMaker, changes: dict[str, Any], message: str) -> None:
    result = cptain("preprocess", make_run(**{"data__split": None, **changes}))
    assert result.exit_code == 2
    assert message in result.output


def test_a_file_that_is_trained_on_is_no_validation(make_run: RunFileMaker, text_folder: Path) -> None:
    file = make_run(data__split=None, data__validation=[{"name": "a", "input": f"{text_folder}/sub/*"}])
    result = cptain("preprocess", file)
    assert result.exit_code == 2
    assert "data.validation: a: " in result.output
    assert "sub/a.jsonl.gz is trained on too: leave it out of one" in result.output


def test_what_was_not_compared_with_the_data_as_it_is_trains_nothing(
    make_run: RunFileMaker, sets: list[dict[str, str]]
) -> None:
    file = make_run(data__split=None, data__validation=sets[:1])
    assert cptain("preprocess", file).exit_code == 0
    assert cptain("convert", file).exit_code == 0
    more = make_run(data__split=None, data__validation=sets)
    result = cptain("train", more, "--dry-run")
    assert result.exit_code == 1
    assert "manifest.json: missing: the data is not ready; run preprocess first" in result.output
    left_out = load_run(file).data_folder / ".validation" / "ja" / "left-out.json"
    content = json.loads(left_out.read_text())
    left_out.write_text(json.dumps({**content, "made_of": "something else"}))
    result = cptain("train", make_run(data__split=None, data__validation=sets[:1]), "--dry-run")
    assert result.exit_code == 1
    assert "data.validation: ja: not compared with the data as it is now: run preprocess again" in result.output
    file = make_run(data__split=None, data__validation=sets[:1], train__seq_length=100000)
    assert cptain("preprocess", file).exit_code == 0
    result = cptain("train", file, "--dry-run")
    assert result.exit_code == 2
    assert "tokens to validate with are less than a sequence (train.seq_length = 100000)" in result.output


def test_the_lines_of_validations_with_and_without_names_are_read() -> None:
    line = " validation loss at iteration 4 | lm loss value: 6.1E+00 | lm loss PPL: 4.4E+02 | "
    assert parse_validation_sets(line) == {}
    named = line + "validation/ja value: 5.5E+00 | validation/ja PPL: 2E+02 | validation/a.b-c value: 7E+00 | "
    assert parse_validation(named) == (4, 6.1)
    assert parse_validation_sets(named) == {"ja": 5.5, "a.b-c": 7.0}
