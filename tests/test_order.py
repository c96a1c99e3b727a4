"""[[data.stage]]: what is seen when, and that nothing is repeated or left out where the blend changes."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunFileMaker, cptain, write_jsonl
from cptain.checkpoint.model_card import model_card
from cptain.data.epochs import exposures
from cptain.data.manifest import read_manifest
from cptain.data.split import read_lengths
from cptain.data.stages import parts_to_train, stages
from cptain.errors import CptainError
from cptain.report.document import document as report
from cptain.run_file import load_run
from cptain.training.metrics import metrics_file, read_metrics
from cptain.training.order import stream

# In the place of a sitecustomize: rank 0 writes a line for each piece of a document that it reads.
_RECORDER = """
import json, os
if os.environ.get("RANK") == "0":
    import numpy as np
    from cptain.training.documents import Documents

    get = Documents.get

    def recorded(self, idx, offset=0, length=None):
        number = int(np.searchsorted(self._starts, idx, side="right")) - 1
        file, part = self._parts[number]
        ids = get(self, idx, offset, length)
        with open(os.environ["RECORD"], "a") as out:
            place = part.start + int(idx) - int(self._starts[number])
            print(json.dumps([file.prefix, place, int(offset), len(ids)]), file=out)
        return ids

    Documents.get = recorded
"""
_SEQ, _BATCH = 16, 8
_STEP = _SEQ * _BATCH
_LATER = [{"step": 4, "weight": {"ja": 1, "new": 1}}, {"step": 8, "weight": {"new": 1}}]


@pytest.fixture
def make_staged(make_run: RunFileMaker, ready_run: Path, tmp_path: Path) -> RunFileMaker:
    """Writes run files of ten steps over three parts of about 1,000, 600 and 400 tokens."""
    for name, texts in (("en", 30), ("ja", 18), ("new", 12)):
        write_jsonl(
            tmp_path / "in" / f"{name}.jsonl", [f"{name} text {n} {'of many ' * (n % 7)}" for n in range(texts)]
        )
    first = {"en": 3, "ja": 1}
    mix = [
        {"name": name, "input": f"in/{name}.jsonl"} | ({"weight": first[name]} if name in first else {})
        for name in ("en", "ja", "new")
    ]

    def make(**changes: Any) -> Path:
        train = {"seq_length": _SEQ, "global_batch_size": _BATCH, "micro_batch_size": 2, "steps": 10}
        data = {"input": ["in/*.jsonl"], "mix": mix, "split": "1,0,0", "stage": _LATER}
        values = {f"train__{key}": value for key, value in train.items()}
        values |= {f"data__{key}": value for key, value in data.items()}
        return make_run(model__megatron=str(load_run(ready_run).megatron_folder), **{**values, **changes})

    return make


def test_every_sample_that_is_read_is_as_the_stages_say_over_a_resume_and_a_changed_future(
    make_staged: RunFileMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_RECORDER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("RECORD", str(tmp_path / "read"))
    file = make_staged()
    assert cptain("preprocess", file).exit_code == 0
    pipeline = ("--set", "parallel.pipeline=2")
    stopped = cptain("train", file, "--cpu", *pipeline, "--set", 'train.megatron_args=["--exit-interval","5"]')
    assert stopped.exit_code == 75, stopped.output
    assert "train:   steps 5 to 8: ja 50.0%, new 50.0%" in stopped.output
    other_past = [{**_LATER[0], "weight": {"ja": 1}}, _LATER[1]]
    result = cptain("train", make_staged(data__stage=other_past), "--cpu")
    assert result.exit_code == 1
    assert "was trained on other data: data.stage of steps 1 to 5: " in result.output
    later = [_LATER[0], {"step": 7, "weight": {"en": 2, "new": 1}}]
    file = make_staged(data__stage=later, train__steps=12, parallel__tensor=2)
    resumed = cptain("train", file, "--cpu")
    assert resumed.exit_code == 0, resumed.output

    run = load_run(file)
    samples = _samples(tmp_path / "read")
    assert len(samples) == 12 * _BATCH
    # Of a sample the part is the file; by stage they are as the weights say.
    named = [Path(sample[0][0]).name.partition("_")[0] for sample in samples]
    by_stage = [Counter(named[first * _BATCH : stop * _BATCH]) for first, stop in ((0, 4), (4, 7), (7, 12))]
    assert by_stage[0] == {"en": 24, "ja": 8}
    assert by_stage[1] == {"ja": 12, "new": 12}
    assert by_stage[2]["en"] in (26, 27)
    assert by_stage[2]["new"] == 40 - by_stage[2]["en"]
    for name in ("en", "ja", "new"):
        _as_often_as_it_can_be([sample for sample, part in zip(samples, named, strict=True) if part == name])

    metrics = read_metrics(metrics_file(run))
    for step in range(1, 13):
        until = Counter(named[: step * _BATCH])
        told = {name: metrics[step].get(f"tokens/{name}") for name in ("en", "ja", "new")}
        assert told == {name: until[name] * _SEQ for name in told}
        _sums_are_megatrons(metrics, step)
    records = read_manifest(run.data_folder, run.data.sources)
    counted = exposures(run, records, 12)
    for part in counted:
        assert metrics[12][f"epochs/{part.name}"] == pytest.approx(part.epochs, abs=_SEQ / part.tokens)
    total = Counter(named)
    assert {part.name: round(part.epochs * part.tokens / _SEQ) for part in counted} == total
    card = model_card(run, Path(run.model.hf), 12)
    assert "| epochs | " + ", ".join(f"{part.name} {part.epochs:.3g}" for part in counted) + " |" in card
    before = "en 3, ja 1; from step 5 ja 1, new 1; from step 9 new 1 (steps 1 to 5)"
    assert f"| mix | {before}; en 3, ja 1; from step 5 ja 1, new 1; from step 8 en 2, new 1 (steps 6 to 12) |" in card
    document = json.loads(cptain("plan", file, "--json").stdout)
    assert [part["epochs"] for part in document["data"]["parts"]] == [part.epochs for part in counted]


def _sums_are_megatrons(metrics: dict[int, dict[str, Any]], step: int) -> None:
    """The tokens of the domains are those that Megatron counts, and their losses its loss."""
    before, now = metrics.get(step - 1, {}), metrics[step]
    tokens = {name: now[name] - before.get(name, 0) for name in now if name.startswith("tokens/")}
    assert sum(tokens.values()) == now["tokens"] - before.get("tokens", 0) == _STEP
    losses = [count * now[f"loss/{name[7:]}"] for name, count in tokens.items() if count]
    assert sum(losses) / _STEP == pytest.approx(now["loss"], abs=1e-5)


def test_domains_that_megatron_reads_as_one_data_set_are_told_apart(make_staged: RunFileMaker) -> None:
    """Two tables of one weight a token, over two copies of the model."""
    mix = [{"name": "en", "input": "in/en.jsonl", "repeat": 1}, {"input": "in/[jn]*.jsonl", "repeat": 1}]
    file = make_staged(data__mix=mix, data__stage=[], train__steps=None, train__epochs=1)
    assert cptain("preprocess", file).exit_code == 0
    result = cptain("train", file, "--cpu", "--nproc-per-node", 2)
    assert result.exit_code == 0, result.output
    run = load_run(file)
    metrics = read_metrics(metrics_file(run))
    last = max(metrics)
    for step in range(1, last + 1):
        _sums_are_megatrons(metrics, step)
    parts = parts_to_train(run, read_manifest(run.data_folder, run.data.sources))
    for part, tokens in parts:  # an epoch of a blend is whole steps, and sequences that no document ends with
        assert metrics[last][f"tokens/{part.name}"] == pytest.approx(tokens, abs=2 * _STEP)
    made = report(run)
    assert made is not None
    assert [domain["domain"] for domain in made["tables"]["Domains"]] == [part.name for part, _ in parts]
    assert f"loss/{parts[0][0].name}" in made["columns"]
    assert not [name for name in made["columns"] if name.startswith(("tokens/", "epochs/"))]


def _samples(record: Path) -> list[list[tuple[str, int, int, int]]]:
    """The pieces of documents that each sample was made of."""
    found: list[list[tuple[str, int, int, int]]] = [[]]
    for line in record.read_text().splitlines():
        if sum(piece[3] for piece in found[-1]) == _SEQ + 1:
            found.append([])
        found[-1].append(json.loads(line))
    return found


def _as_often_as_it_can_be(samples: list[list[tuple[str, int, int, int]]]) -> None:
    """Every token of a part was trained on equally often, but for the epoch that is not over, and, where an epoch ends
    amid a sequence, for less than a sequence at its end."""
    lengths = read_lengths(samples[0][0][0])[1]
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for sample in samples:
        left = _SEQ  # the last token is a label alone
        for _, document, offset, length in sample:
            seen[document][offset : offset + min(length, left)] += 1
            left -= min(length, left)
    often = np.concatenate(seen)
    assert often.sum() == len(samples) * _SEQ
    epochs = often.sum() // len(often)
    assert np.isin(often, (epochs, epochs + 1)).sum() > len(often) - 2 * _SEQ
    assert often.min() >= epochs - 1
    assert often.max() <= epochs + 2


def test_a_stream_sees_each_token_once_an_epoch_and_does_not_depend_on_how_much_is_taken() -> None:
    lengths = np.array([5, 0, 17, 1, 8, 33, 0, 4, 12], dtype=np.int32)  # 80 tokens
    for seq_length in (16, 7, 200):
        documents, begins, shuffle = stream(lengths, seq_length, 40, 1234, "order")
        assert len(shuffle) >= 40
        assert sorted(shuffle) == list(range(len(shuffle)))
        tokens = np.concatenate([np.arange(lengths[one]) * 100 + one for one in documents])  # which document, and where
        cut = np.concatenate([[0], np.cumsum(lengths[documents])])
        assert (cut[begins[:, 0]] + begins[:, 1] == np.arange(len(begins)) * seq_length).all()
        assert begins[-1, 1] < lengths[documents[begins[-1, 0]]]  # the last label is there
        whole = tokens[: len(tokens) // 80 * 80].reshape(-1, 80)
        assert all((np.sort(epoch) == np.sort(whole[0])).all() for epoch in whole)
        if len(whole) > 1:
            assert (whole[0] != whole[1]).any()
        for count in (1, 5, 13):
            fewer = stream(lengths, seq_length, count, 1234, "order")
            assert (fewer[2][:count] == shuffle[:count]).all()
            assert (fewer[0] == documents[: len(fewer[0])]).all()
        assert stream(lengths, seq_length, 40, 1234, "another")[0].tolist() != documents.tolist()


def _planned(file: Path) -> list[Any]:
    run = load_run(file)
    return stages(run, parts_to_train(run, read_manifest(run.data_folder, run.data.sources)), 10)


def test_repeats_of_a_stage_take_the_steps_that_they_take(make_staged: RunFileMaker) -> None:
    file = make_staged()
    assert cptain("preprocess", file).exit_code == 0
    run = load_run(file)
    tokens = {
        part.name: tokens for part, tokens in parts_to_train(run, read_manifest(run.data_folder, run.data.sources))
    }
    takes = -(-(2 * tokens["new"] + tokens["ja"]) // _STEP)
    repeat = {"new": 2, "ja": 1}
    with pytest.raises(CptainError, match=rf"take {takes} steps, and it has 2: let it end at step {takes + 1}, where"):
        _planned(make_staged(data__stage=[{"step": 1, "repeat": repeat}, {"step": 3, "weight": {"en": 1}}]))
    assert takes < 9
    plans = _planned(make_staged(data__stage=[{"step": 1, "repeat": repeat}, {"step": takes + 1, "weight": {"en": 1}}]))
    seen = [share * takes * _STEP / count for share, count in zip(plans[1].shares, tokens.values(), strict=True)]
    assert seen[0] == 0
    assert seen[2] == pytest.approx(2 * seen[1])
    assert 1 <= seen[1] < 1 + _STEP / tokens["ja"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__stage": [{"step": 4, "weight": {"x": 1}}]}, 'no table of mix is called "x" (there: en, ja, new)'),
        ({"data__stage": [{"step": 4, "weight": {"en": 1}}]}, "mix: new is in no stage, and has neither weight"),
        ({"data__stage": [{"weight": {"new": 1}}]}, "data.stage[0]: give step or share"),
        ({"data__stage": [{"step": 4}]}, "data.stage[0]: give weight or repeat"),
        ({"data__stage": [{"step": 0, "weight": {"new": 1}}]}, "hold until the first stage: give none"),
        ({"data__mix": [{"name": "a", "input": x, "weight": 1} for x in "xy"]}, 'mix: two tables are called "a"'),
        ({"data__mix": "tokens"}, "a stage names parts of [[data.mix]]"),
        ({"train__steps": None, "train__epochs": 1}, "train.epochs: stages see each part another number of times"),
        ({"train__script": "x.py"}, "only cptain's own training script reads stages"),
    ],
)
def test_stages_that_say_nothing_or_two_things_are_refused(
    make_staged: RunFileMaker, changes: dict[str, Any], message: str
) -> None:
    result = cptain("train", make_staged(**changes), "--dry-run")
    assert result.exit_code == 2
    assert message in result.output


def test_stages_follow_one_another_and_count_as_epochs(make_staged: RunFileMaker) -> None:
    file = make_staged()
    assert cptain("preprocess", file).exit_code == 0
    middle = {"share": 0.3, "weight": {"new": 1}}
    for bad in ([_LATER[0], middle], [middle, {"step": 10, "weight": {"ja": 1}}]):
        result = cptain("train", make_staged(data__stage=bad), "--cpu", "--dry-run")
        assert result.exit_code == 2
        assert "stages must follow" in result.output
    cyclic = make_staged(train__megatron_args=["--dataloader-type", "cyclic"])
    result = cptain("train", cyclic, "--cpu", "--dry-run")
    assert result.exit_code == 2
    assert "--dataloader-type: set data.validation and data.stage" in result.output
    result = cptain("train", make_staged(data__max_epochs=1), "--cpu", "--dry-run")
    assert result.exit_code == 2
    assert "data.max_epochs = 1: new: the " in result.output
