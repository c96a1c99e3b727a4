"""How often a training sees its data, and what data it is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import RunFileMaker, cptain, write_jsonl
from cptain.data.epochs import check_epochs, exposures
from cptain.data.indexed_dataset import EncodedDocuments, IndexedDatasetWriter
from cptain.data.manifest import Record, read_manifest, write_manifest
from cptain.data.recipe import Recipe
from cptain.data.split import training_tokens
from cptain.data.steps import train_steps
from cptain.data.trained_on import other_data, trained_on
from cptain.errors import CptainError
from cptain.run_file import RunFile, load_run
from cptain.training.changes import check_changes
from cptain.training.documents import File
from cptain.training.prepare import prepare

RECIPE = Recipe("text", False, "fail", 1, "hash", 1, False)
TABLES = [{"input": "/d/en/*", "weight": 3}, {"input": "/d/ja/*", "weight": 1}]


def record(input: str, documents: int, tokens: int) -> Record:
    return Record(input, input[1:], 1, 1, "fingerprint", RECIPE, input, documents, tokens)


RECORDS = [record("/d/en/a.jsonl", 4, 3000), record("/d/en/b.jsonl", 1, 1000), record("/d/ja/c.jsonl", 2, 1000)]


def load(file: Path) -> RunFile:
    """A run whose data folder has the index of every file of RECORDS, its tokens shared out among its documents."""
    run = load_run(file)
    for one in RECORDS:
        pair = run.data_folder / one.prefix
        pair.parent.mkdir(parents=True, exist_ok=True)
        lengths = np.full(one.documents, one.tokens // one.documents, dtype=np.int32)
        writer = IndexedDatasetWriter(Path(f"{pair}.bin"), np.uint16)
        writer.add(EncodedDocuments(np.zeros(one.tokens, np.uint16), lengths, np.ones(one.documents, np.int64)))
        writer.write_index(Path(f"{pair}.idx"))
    return run


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def test_epochs_are_counted_by_part_of_the_mix(make_run: RunFileMaker) -> None:
    """A step of the tests' run is 512 tokens; of files so small, nine tenths of the documents are all of them."""
    (every,) = exposures(load(make_run()), RECORDS, 100)
    assert (every.documents, every.tokens, every.share, every.epochs) == (7, 5000, 1, pytest.approx(51_200 / 5000))
    files = exposures(load(make_run(data__mix="uniform")), RECORDS, 100)
    assert [file.epochs for file in files] == pytest.approx([51_200 / 3 / 3000, 51_200 / 3 / 1000, 51_200 / 3 / 1000])
    english, japanese = exposures(load(make_run(data__mix=TABLES)), RECORDS, 100)
    assert (english.name, english.documents, english.tokens, english.share) == ("/d/en/*", 5, 4000, 0.75)
    assert (japanese.tokens, japanese.share, japanese.epochs) == (1000, 0.25, pytest.approx(12_800 / 1000))


def test_the_part_that_is_seen_most_is_refused_with_its_tokens_epochs_and_the_key(make_run: RunFileMaker) -> None:
    run = load(make_run(data__mix=TABLES, data__max_epochs=None))
    check_epochs(run, exposures(run, RECORDS, 112), 112)
    with pytest.raises(CptainError) as refused:
        check_epochs(run, exposures(run, RECORDS, 200), 200)
    assert str(refused.value) == (
        "data.max_epochs = 16: /d/ja/*: the 1,000 tokens to train on would be seen 25.6 times in 200 steps of 512 "
        "tokens: take more text, fewer steps or another data.mix, or allow it with data.max_epochs"
    )


def test_one_short_document_is_not_trained_on_a_thousand_times(
    make_run: RunFileMaker, ready_run: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "in.jsonl", ["one"])
    shared = str(load_run(ready_run).megatron_folder)
    short = {"data__input": ["in.jsonl"], "data__max_epochs": None, "model__megatron": shared}
    file = make_run(**short)
    assert cptain("preprocess", file, "--workers", 1).exit_code == 0
    result = cptain("train", file, "--cpu", "--dry-run")
    assert result.exit_code == 2
    assert last_line(result.output).startswith("cptain: data.max_epochs = 16: all files: the ")
    assert cptain("train", file, "--cpu", "--dry-run", "--set", "data.max_epochs=1e6").exit_code == 0
    assert (
        cptain("train", make_run(**short, train__steps=None, train__epochs=1000), "--cpu", "--dry-run").exit_code == 0
    )


def test_the_first_lines_of_a_training_tell_what_is_seen_and_how_often(
    make_ready_run: RunFileMaker, text_folder: Path, tmp_path: Path
) -> None:
    records = read_manifest(load_run(make_ready_run()).data_folder, load_run(make_ready_run()).data.input)
    folder = load_run(make_ready_run()).data_folder
    a, *sub = (training_tokens(folder, [record], "90,10,0") for record in records)
    tokens = a + sum(sub)
    whole = prepare(load_run(make_ready_run()), cpu=True).lines
    assert whole == [
        f"{sum(record.documents for record in records)} documents, {tokens:,} tokens to train on; 8 steps of "
        f"512 tokens: 4.1k in all, {4096 / tokens:.3g} epochs",
    ]
    mix = [{"input": f"{text_folder}/*.jsonl", "weight": 1}, {"input": f"{text_folder}/sub/**/*", "weight": 3}]
    (tmp_path / "nothing.py").write_text("")
    result = cptain("train", make_ready_run(data__mix=mix, train__script="nothing.py"), "--cpu")
    first, one, other, begins = result.output.splitlines()[:4]
    assert first.startswith("train: " + whole[0].partition(":")[0])
    assert first.endswith(f": 4.1k in all, {1024 / a:.3g} to {3072 / sum(sub):.3g} epochs")
    assert one.startswith(f"train:   {text_folder}/*.jsonl: 40 documents, ")
    assert one.endswith(f", 25.0% of what is trained on, {1024 / a:.3g} epochs")
    assert other.endswith(f", 75.0% of what is trained on, {3072 / sum(sub):.3g} epochs")
    assert begins.startswith("train: from ")


def test_what_a_run_trains_on_is_a_value_that_tells_other_data(make_run: RunFileMaker) -> None:
    run = load_run(make_run())
    value = json.loads(json.dumps(trained_on(run, RECORDS, 100)))
    assert {key: value[key] for key in ("files", "documents", "tokens", "split", "mix")} == {
        "files": 3,
        "documents": 7,
        "tokens": 5000,
        "split": "90,10,0",
        "mix": "tokens",
    }
    assert other_data(value, trained_on(run, [*RECORDS, record("/d/ja/empty.jsonl", 0, 0)], 100), 4) == ""
    more = trained_on(run, [*RECORDS, record("/d/ja/d.jsonl", 1, 10_000)], 100)
    assert other_data(value, more, 4) == "3 → 4 files, 7 → 8 documents, 5,000 → 15,000 tokens"
    split = trained_on(run.model_copy(update={"data": run.data.model_copy(update={"split": "99,1,0"})}), RECORDS, 100)
    assert other_data(value, split, 4) == 'data.split "90,10,0" → "99,1,0"'
    tables = trained_on(load(make_run(data__mix=TABLES)), RECORDS, 100)
    assert other_data(value, tables, 4) == 'data.mix "tokens" → {"/d/en/*": 3.0, "/d/ja/*": 1.0}'
    thrice = [{**table, "weight": table["weight"] * 3} for table in TABLES]
    assert other_data(tables, trained_on(load(make_run(data__mix=thrice)), RECORDS, 100), 4) == ""
    edited = trained_on(run, [replace(RECORDS[0], sha256="another"), *RECORDS[1:]], 100)
    assert other_data(value, edited, 4) == "other files, or other text in them, with the same counts"


def test_an_epoch_is_every_token_that_megatron_trains_on_and_no_validation_is_said(
    make_run: RunFileMaker, ready_run: Path, tmp_path: Path
) -> None:
    for number in range(6):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", [f"text {number} {one}" * (one + 1) for one in range(10)])
    length = {"train__steps": None, "train__epochs": 1, "train__warmup_steps": 0, "train__seq_length": 8}
    shared = str(load_run(ready_run).megatron_folder)
    file = make_run(data__input=["in/*.jsonl"], data__split="970,30,0", model__megatron=shared, **length)
    assert cptain("preprocess", file, "--workers", 1).exit_code == 0
    run = load_run(file)
    records = read_manifest(run.data_folder, run.data.input)
    files = [File(str(run.data_folder / record.prefix)) for record in records]
    trained_on = sum(int(one.lengths[part.start : part.stop].sum()) for one in files if (part := one.part((0.0, 0.97))))
    assert trained_on == sum(record.tokens for record in records)
    assert train_steps(run, records) == -(-trained_on // run.train.tokens_per_step)
    lines = prepare(run, cpu=True).lines
    assert lines[0].startswith(f"60 documents, {trained_on:,} tokens to train on; ")
    assert lines[1].startswith("no validation: no file has a document in that part of data.split = 970,30,0, ")
    halves = run.model_copy(update={"data": run.data.model_copy(update={"split": "50,50,0"})})
    assert not any("no validation" in line for line in prepare(halves, cpu=True).lines)


REPEATS = [{"name": "en", "input": "/d/en/*", "repeat": 2}, {"name": "ja", "input": "/d/ja/*", "repeat": 12.5}]


def test_repeat_says_how_often_each_document_is_seen_and_so_how_long_the_run_is(make_run: RunFileMaker) -> None:
    run = load(make_run(data__mix=REPEATS, train__steps=None, train__epochs=1))
    steps = train_steps(run, RECORDS)
    assert steps == 41  # 2 × 4,000 and 12.5 × 1,000 tokens in steps of 512
    seen = 41 * 512 / 20_500  # whole steps
    english, japanese = exposures(run, RECORDS, steps)
    assert (english.name, english.epochs) == ("en", pytest.approx(2 * seen))
    assert (japanese.name, japanese.epochs) == ("ja", pytest.approx(12.5 * seen))
    half = load(make_run(data__mix=REPEATS, train__steps=None, train__epochs=0.5))
    assert train_steps(half, RECORDS) == 21
    assert trained_on(run, RECORDS, 100)["mix"] == {"/d/en/*": "2 times", "/d/ja/*": "12.5 times"}
    weights = [{"input": "/d/en/*", "weight": 8000}, {"input": "/d/ja/*", "weight": 12_500}]
    weighted = trained_on(load(make_run(data__mix=weights)), RECORDS, 100)
    assert weighted["sha256"] == trained_on(run, RECORDS, 100)["sha256"]
    often = load(make_run(data__mix=REPEATS, train__steps=None, train__epochs=1, data__max_epochs=10))
    with pytest.raises(
        CptainError, match=r"data\.max_epochs = 10: ja: the 1,000 tokens to train on would be seen 12\.8"
    ):
        check_epochs(often, exposures(often, RECORDS, steps), steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__mix": REPEATS}, "data.mix: repeat says how often documents are seen in an epoch: say how long with"),
        ({"data__mix": [{"input": "x"}]}, "data: mix[0]: give weight or repeat"),
        ({"data__mix": [{"input": "x", "weight": 1, "repeat": 1}]}, "data: mix[0]: give weight or repeat"),
        (
            {"data__mix": [{"input": "x", "weight": 1}, {"input": "y", "repeat": 1}]},
            "data: mix: give weight in every table, or repeat in every one",
        ),
    ],
)
def test_tables_that_say_too_little_or_too_much_are_refused(
    make_run: RunFileMaker, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CptainError) as refused:
        load_run(make_run(**changes))
    assert message in str(refused.value)


def test_the_name_of_a_table_may_change_in_a_run_that_has_begun(make_run: RunFileMaker) -> None:
    run = load(make_run(data__mix=TABLES))
    before = run.model_dump(mode="json", exclude_none=True)
    before["data"]["mix"][0]["name"] = "English"
    write_manifest(run.data_folder, RECORDS, run.data.input)
    assert check_changes(before, run) == []
