"""data.tokenized: pairs that are there already are checked, counted and trained on as they lie."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunFileMaker, cptain, write_jsonl
from cptain.data import tokenized
from cptain.data.manifest import read_manifest
from cptain.data.tokenized import find_pairs
from cptain.data.tokenizer import TokenizerFacts
from cptain.data.validation import data_folders
from cptain.run_file import load_run
from cptain.training.metrics import metrics_file, read_metrics

HEADER = 34  # bytes of an .idx file before the lengths of its sequences


@pytest.fixture
def make_tokenized_run(ready_run: Path, tmp_path: Path, make_run: RunFileMaker) -> Callable[..., Path]:
    """Run files without text, for pairs that another run made: a copy of them, below `tmp_path`/lab."""
    shared = load_run(ready_run)
    shutil.copytree(shared.data_folder, tmp_path / "lab", ignore=shutil.ignore_patterns(".*", "*.json"))
    shutil.copytree(shared.tokenizers_folder, tmp_path / "runs" / ".tokenizers")

    def make(**changes: Any) -> Path:
        own = {"data__input": None, "data__tokenized": ["lab/**/*"], "model__megatron": str(shared.megatron_folder)}
        return make_run(**own | changes)

    return make


def _last(*arguments: object) -> str:
    result = cptain(*arguments)
    assert result.exit_code == 1, result.output
    return result.output.splitlines()[-1]


def test_pairs_of_another_run_train_as_the_text_that_they_were_made_of(
    make_tokenized_run: Callable[..., Path], trained_run: Path, tmp_path: Path
) -> None:
    file = make_tokenized_run()
    made = cptain("preprocess", file)
    assert made.exit_code == 0, made.output
    assert "end-of-document" not in made.output
    run, text = load_run(file), load_run(trained_run)
    records, of_text = (read_manifest(one.data_folder, one.data.sources) for one in (run, text))
    assert [(one.documents, one.tokens) for one in records] == [(one.documents, one.tokens) for one in of_text]
    assert not [*run.data_folder.rglob("*.bin")]
    result = cptain("train", file, "--cpu")
    assert result.exit_code == 0, result.output
    losses, of_text_losses = (
        [line["loss"] for line in read_metrics(metrics_file(one)).values()] for one in (run, text)
    )
    assert losses == of_text_losses
    assert cptain("export", file).exit_code == 0
    assert "of them tokenized by others" in (run.hf_folder / "iter_0000008" / "README.md").read_text()
    plan = cptain("plan", file)
    assert plan.exit_code == 0, plan.output
    assert cptain("report", file).exit_code == 0


def test_pairs_and_text_blend_by_their_tables_and_what_is_checked_is_not_read_again(
    make_tokenized_run: Callable[..., Path], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "in" / "new.jsonl", ["Some text of its own. " * 40] * 9)
    mix = [{"input": "in/*", "weight": 1}, {"name": "lab", "input": "lab/**/*.bin", "weight": 3}]
    file = make_tokenized_run(data__input=["in/*.jsonl"], data__mix=mix)
    parts = [cptain("preprocess", file, "--shard", f"{number}/2") for number in (1, 2)]
    assert [one.exit_code for one in parts] == [0, 0], parts[1].output
    again = cptain("preprocess", file)
    assert "preprocess: 3 of 3 pairs are checked and unchanged" in again.output
    (tmp_path / "lab" / ".records").mkdir()  # as the data folder of another run has it
    assert data_folders(load_run(file)) == [load_run(file).data_folder, tmp_path / "lab"]
    assert "preprocess: 4 files, " in again.output
    dry = cptain("train", file, "--cpu", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "  lab: " in dry.output
    assert "75.0% of what is trained on" in dry.output
    pair = tmp_path / "lab" / "a_text_document.bin"
    ids = np.fromfile(pair, np.uint16)
    ids[-1] = ids[1]  # no end-of-document token in the last document
    ids.tofile(pair)
    assert _last("train", file, "--cpu", "--dry-run").endswith(
        "lab/a_text_document: not what it was when preprocess checked it: run preprocess again"
    )
    checked = cptain("preprocess", file)
    documents = json.loads((load_run(file).data_folder / "manifest.json").read_text())["records"][0]["documents"]
    assert f"1 of {documents} documents ({1 / documents:.1%}) do not end with the tokenizer's end" in checked.output
    assert cptain("train", file, "--cpu", "--dry-run").exit_code == 0


def _at(place: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:place] + value + content[place + len(value) :]


FAULTS: list[tuple[str, Callable[[bytes], bytes], str]] = [
    (".idx", _at(0, b"X"), "no index of a Megatron indexed dataset"),
    (".idx", _at(9, struct.pack("<Q", 2)), "version 2, and 1 is the only one"),
    (".idx", _at(17, b"\x05"), "dtype code 5: supported are 4 (int32) and 8 (uint16)"),
    (".idx", lambda content: content[:-8], "bounds need"),
    (".idx", _at(HEADER, struct.pack("<i", -1)), "a sequence of negative length"),
    (".idx", _at(HEADER, struct.pack("<i", 1)), "its sequences do not lie one after another"),
    (".idx", lambda content: content[:-16] + content[-8:] + content[-16:-8], "its document boundaries do not run from"),
    (".bin", lambda content: content[:-2], "where its .idx file needs"),
    (".bin", _at(4, struct.pack("<H", 500)), "1 of its "),
    (".bin", _at(4, struct.pack("<H", 500)), "none of the tokenizer's 500 (the farthest is 500): it was made with"),
]


def test_a_damaged_pair_is_refused_by_file_and_reason(make_tokenized_run: Callable[..., Path], tmp_path: Path) -> None:
    file = make_tokenized_run(data__tokenized=["lab/a_text_document"])
    pair = tmp_path / "lab" / "a_text_document"
    for end, damage, reason in FAULTS:
        whole = Path(f"{pair}{end}").read_bytes()
        Path(f"{pair}{end}").write_bytes(damage(whole))
        line = _last("preprocess", file)
        assert line.startswith(f"cptain: data.tokenized: {pair}{end}: "), line
        assert reason in line
        Path(f"{pair}{end}").write_bytes(whole)
    assert not (load_run(file).data_folder / "manifest.json").exists()
    assert cptain("preprocess", file).exit_code == 0


def test_what_is_no_pair_or_one_pair_twice_is_refused_by_name(
    make_tokenized_run: Callable[..., Path], tmp_path: Path
) -> None:
    from cptain.errors import CptainError

    lab = tmp_path / "lab"
    deep = {lab / "a_text_document", lab / "sub" / "a_text_document", lab / "sub" / "deeper" / "b_text_document"}
    assert set(find_pairs([f"{lab}/**"])) == set(find_pairs([f"{lab}/**/*"])) == deep
    (lab / "b.bin").symlink_to(lab / "a_text_document.bin")
    for patterns, reason in (
        (["nothing/*"], "nothing/* matches no .bin and .idx file"),
        ([f"{lab}"], f"it is a folder: write {lab}/**/*"),
        ([f"{lab}/b"], f"{lab}/b.idx: no such file, and b.bin belongs to it"),
    ):
        with pytest.raises(CptainError, match=r"^data\.tokenized: ") as refused:
            find_pairs(patterns)
        assert reason in str(refused.value)
    (lab / "b.idx").symlink_to(lab / "a_text_document.idx")
    with pytest.raises(CptainError, match="are one pair: take one name away"):
        find_pairs([f"{lab}/*"])
    file = make_tokenized_run(data__tokenized=["lab/a_text_document"], data__output=str(lab))
    assert "where preprocess writes: move it elsewhere" in _last("preprocess", file)


def test_a_scan_in_pieces_finds_what_one_of_the_whole_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.array([5, 6, 9, 7, 9, 8, 1, 1, 1, 9], np.int32)
    ends = np.array([3, 5, 6, 10])  # the third document ends without the 9

    def scan(size: int) -> tuple[str, int, int, int]:
        ids.tofile(tmp_path / "x.bin")
        facts = TokenizerFacts("", eos=9, length=size, size=size, split_special_tokens=False, tokenizer=None)
        digest, *found = tokenized._scan(str(tmp_path / "x.bin"), ids.dtype, ends, facts, lambda count: None)
        return digest.hexdigest(), *found

    for piece in (4, 8, 12, 16, 1 << 20):
        monkeypatch.setattr(tokenized, "_AT_ONCE", piece)
        ids[0] = 5
        assert scan(10) == (hashlib.sha256(ids.tobytes()).hexdigest(), 1, 0, 0)
        assert scan(8)[1:] == (1, 4, 9)
        ids[0] = -3
        assert scan(10)[1:] == (1, 1, -3)
