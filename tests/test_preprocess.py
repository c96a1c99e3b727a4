"""preprocess: what Megatron's own reader finds in the pairs, and what bad input does."""

import ctypes
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain, cptain_process, leftovers, wait_until_half_written, write_jsonl
from cptain.data import reader
from cptain.data.blend import blend
from cptain.data.inputs import input_files
from cptain.data.manifest import Record
from cptain.data.preprocess import _tasks, shard
from cptain.data.recipe import Recipe
from cptain.errors import CptainError
from cptain.run_data import MixPart
from cptain.run_file import load_run


@cache
def megatron_s_reader() -> "subprocess.Popen[str]":
    """Megatron's own IndexedDataset in a process that answers until these tests end: its import takes 3 s."""
    script = """
import json, sys
answers, sys.stdout = sys.stdout, sys.stderr
from cptain.megatron.importing import before_import
before_import(cpu=True)
from megatron.core.datasets.indexed_dataset import IndexedDataset
for line in sys.stdin:
    data = IndexedDataset(json.loads(line))
    index = data.document_indices
    documents = [[int(i) for s in range(index[d], index[d + 1]) for i in data[s]] for d in range(len(index) - 1)]
    print(json.dumps([str(data.index.dtype.__name__), documents]), file=answers, flush=True)
"""
    return subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_pair(prefix: Path) -> list[list[int]]:
    """The documents of a pair, by Megatron's own IndexedDataset."""
    process = megatron_s_reader()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(str(prefix)) + "\n")
    process.stdin.flush()
    dtype, documents = json.loads(process.stdout.readline())
    assert dtype == "uint16"  # the tests' vocabulary is small
    return documents  # type: ignore[no-any-return]


def data_folder(run_file: Path) -> Path:
    return load_run(run_file).data_folder


def manifest(run_file: Path) -> dict[str, Any]:
    return json.loads((data_folder(run_file) / "manifest.json").read_text())  # type: ignore[no-any-return]


def pairs(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".bin", ".idx")
    }


def test_megatron_reads_back_the_tokenizers_own_ids_with_bos_and_eod(
    ready_run: Path, model: Path, text_folder: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    found = read_pair(data_folder(ready_run) / "sub/a_text_document")
    lines = gzip.decompress((text_folder / "sub/a.jsonl.gz").read_bytes()).splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    assert found == [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in documents]
    assert all(ids[0] == tokenizer.bos_token_id for ids in found)


def test_input_folders_are_kept_and_the_manifest_counts_every_file(ready_run: Path, texts: list[str]) -> None:
    content = manifest(ready_run)
    assert [record["prefix"] for record in content["records"]] == [
        "a_text_document",
        "sub/a_text_document",
        "sub/deeper/b_text_document",
    ]
    assert (content["files"], content["documents"], content["skipped"]) == (3, len(texts), 0)
    for record in content["records"]:
        pair = data_folder(ready_run) / record["prefix"]
        assert record["tokens"] * 2 == record["bin_bytes"] == os.path.getsize(f"{pair}.bin")
        assert len(read_pair(pair)) == record["documents"]


def test_many_workers_write_what_one_writes(make_run: RunFileMaker, ready_run: Path) -> None:
    file = make_run()
    assert cptain("preprocess", file, "--workers", 3).exit_code == 0
    assert pairs(data_folder(file)) == pairs(data_folder(ready_run))


def test_a_second_run_skips_what_is_done_and_force_redoes_it(text: Any) -> None:
    file = text(b'{"text": "one"}\n')
    write_jsonl(file.parent / "in" / "y.jsonl", ["two"])
    assert cptain("preprocess", file, "--workers", 1).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in data_folder(file).rglob("*.bin")}
    again = cptain("preprocess", file)
    assert "2 of 2 files are done and unchanged" in again.output
    assert {path: path.stat().st_mtime_ns for path in data_folder(file).rglob("*.bin")} == before
    (file.parent / "in" / "y.jsonl").write_bytes(b'{"text": "changed"}\n')
    (data_folder(file) / "x_text_document.bin").write_bytes(b"")  # damaged since
    third = cptain("preprocess", file)
    assert "done and unchanged" not in third.output
    assert len(read_pair(data_folder(file) / "y_text_document")[0]) == manifest(file)["records"][1]["tokens"]
    assert "done and unchanged" not in cptain("preprocess", file, "--force").output


def test_another_tokenizer_or_key_redoes_a_file(text: Any, model: Path, tmp_path: Path) -> None:
    file = text(b'{"text": "one", "body": "two"}\n')
    assert cptain("preprocess", file).exit_code == 0
    assert "done" not in cptain("preprocess", file, "--set", "data.key=body").output
    assert (data_folder(file) / "x_body_document.idx").exists()
    shutil.copytree(model, tmp_path / "other")
    config = tmp_path / "other" / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    assert "done" not in cptain("preprocess", file, "--set", f"model.tokenizer='{tmp_path}/other'").output


def test_a_missing_tokenizer_or_model_folder_is_named(text: Any, tmp_path: Path) -> None:
    file = text(b'{"text": "x"}\n', model__hf="no/such/folder/here")
    result = cptain("preprocess", file)
    assert (result.exit_code, result.output) == (1, f"cptain: {tmp_path}/no/such/folder/here: no such model folder\n")
    (tmp_path / "bare").mkdir()
    result = cptain("preprocess", file, "--set", "model.tokenizer=./bare")
    assert result.exit_code == 1
    assert f"cptain: {tmp_path}/bare: no tokenizer in this folder" in result.output


def test_a_full_disk_leaves_nothing_half_written(text: Any) -> None:
    file = text(b"".join(b'{"text": "%d %s"}\n' % (i, b"word " * 50) for i in range(3000)))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    process = cptain_process("preprocess", file, "--workers", 1, preexec_fn=limit)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "x_text_document.bin: cannot be written: File too large" in output.splitlines()[-1]
    assert pairs(data_folder(file)) == {}
    assert leftovers(file.parent) == []


def obey_permissions() -> None:
    """In a child of root: give up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH for good, so that folders are closed."""
    pr_capbset_drop = 24
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(pr_capbset_drop, capability, 0, 0, 0)


def test_a_read_only_output_folder_is_one_line(text: Any, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    file = text(b'{"text": "x"}\n', data__output=str(locked / "data"))
    process = cptain_process("preprocess", file, preexec_fn=obey_permissions)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.splitlines()[-1] == f"cptain: {locked}/data: Permission denied"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_the_next_run_continues(
    text: Any, workers: int, signal_number: signal.Signals
) -> None:
    file = text(b"".join(b'{"text": "%d %s"}\n' % (i, b"word " * 100) for i in range(160000)))
    write_jsonl(file.parent / "in" / "small.jsonl", ["small"] * 10)
    process = cptain_process("preprocess", file, "--workers", workers)
    wait_until_half_written(file.parent)
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert output.splitlines()[-1] == f"cptain: stopped by {signal_number.name}; the same command continues"
    assert leftovers(file.parent) == []
    assert not (data_folder(file) / "x_text_document.bin").exists()
    (file.parent / "in" / "x.jsonl").write_bytes(b'{"text": "short now"}\n')
    assert cptain("preprocess", file).exit_code == 0
    assert manifest(file)["documents"] == 11


def test_a_killed_run_leaves_no_final_name_and_the_next_removes_its_debris(text: Any) -> None:
    file = text(b"".join(b'{"text": "%d %s"}\n' % (i, b"word " * 100) for i in range(40000)))
    process = cptain_process("preprocess", file, "--workers", 1)
    wait_until_half_written(data_folder(file))
    process.kill()
    process.communicate(timeout=60)
    assert pairs(data_folder(file)) == {}
    assert leftovers(data_folder(file))
    (file.parent / "in" / "x.jsonl").write_bytes(b'{"text": "short now"}\n')
    assert "1 files were begun and not finished: done from their start" in cptain("preprocess", file).output
    assert leftovers(file.parent) == []


RECIPE = Recipe("text", False, "fail", 1, "hash", 1, False)


def record(input: str, tokens: int) -> Record:
    return Record(input, input, 1, 1, "fingerprint", RECIPE, tokens=tokens)


def weights(mix: Any, records: list[Record]) -> list[float]:
    return [weight for weight, _ in blend(mix, records)]


def test_files_blend_by_tokens_alike_or_by_tables() -> None:
    records = [record("/d/en/a.jsonl", 10), record("/d/en/sub/b.jsonl", 30), record("/d/ja/c.jsonl", 5)]
    assert weights("tokens", records) == [10, 30, 5]
    assert weights("uniform", records) == [1, 1, 1]
    tables = [MixPart(input="/d/en/**/*.jsonl", weight=3), MixPart(input="/d/ja/*.jsonl", weight=1)]
    assert weights(tables, records) == [0.75, 2.25, 1]


@pytest.mark.parametrize(
    ("globs", "message"),
    [
        (["/d/en/*"], "/d/ja/c.jsonl is matched by no table"),
        (["/d/**/*", "/d/ja/*"], r"c.jsonl is matched by /d/\*\*/\* and /d/ja/\*"),
        (["/d/*/*", "/d/nothing/*"], r"/d/nothing/\* matches no file"),
    ],
)
def test_tables_that_do_not_cover_every_file_once_are_refused(globs: list[str], message: str) -> None:
    records = [record("/d/en/a.jsonl", 10), record("/d/ja/c.jsonl", 5)]
    with pytest.raises(CptainError, match=message):
        weights([MixPart(input=glob, weight=1) for glob in globs], records)


def test_content_that_changed_behind_size_and_date_is_found(text: Any) -> None:
    size = 1_000_000
    file = text(b'{"text": "' + b"x" * size + b'"}\n')
    source = file.parent / "in" / "x.jsonl"
    assert cptain("preprocess", file).exit_code == 0
    before = pairs(data_folder(file))
    stat = source.stat()

    def change(place: int) -> None:
        content = bytearray(source.read_bytes())
        content[place] = ord("y")
        source.write_bytes(content)
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    change(5000)  # in the part that every run looks at
    assert "done and unchanged" not in cptain("preprocess", file).output
    assert pairs(data_folder(file)) != before
    before = pairs(data_folder(file))
    for place in range(100_000, 900_000, 1000):  # until one is found that it does not look at
        change(place)
        if "1 of 1 files are done and unchanged" in cptain("preprocess", file).output:
            break
    assert pairs(data_folder(file)) == before
    found = cptain("preprocess", file, "--verify-inputs")
    assert f"preprocess: {source}: its content changed, though size and date did not" in found.output
    assert pairs(data_folder(file)) != before
    again = cptain("preprocess", file, "--verify-inputs")
    assert "1 of 1 files are done and unchanged" in again.output


def test_count_only_counts_and_writes_nothing(make_run: RunFileMaker, ready_run: Path) -> None:
    file = make_run()
    counted = cptain("preprocess", file, "--count-only", "--workers", 2)
    assert counted.exit_code == 0
    content = manifest(ready_run)
    share = content["tokens"] / content["text_bytes"]
    assert f"{content['documents']} documents, {content['tokens']} tokens" in counted.output.splitlines()[-1]
    assert f"{share:.3f} tokens a byte, 0 bad lines skipped" in counted.output.splitlines()[-1]
    assert "preprocess:   sub/deeper: 1 files, " in counted.output
    assert not data_folder(file).exists()


def test_parts_are_alike_in_bytes_and_files_that_come_later_are_the_only_ones_done(text: Any) -> None:
    for number in range(12):
        file = text(b'{"text": "some words"}\n' * (1 + number * 50), f"{number:02}.jsonl")
    said = []
    for part in (2, 3, 1):
        assert not (data_folder(file) / "manifest.json").exists()
        result = cptain("preprocess", file, "--shard", f"{part}/3")
        assert result.exit_code == 0, result.output
        said += [line for line in result.output.splitlines() if "part " in line]
    assert said == [
        "preprocess: part 2 of 3: 4 files done; 8 files of other parts are not done yet",
        "preprocess: part 3 of 3: 4 files done; 4 files of other parts are not done yet",
        "preprocess: part 1 of 3: 4 files done",
    ]
    files = input_files(load_run(file).data.input)
    parts = [shard(_tasks(load_run(file), RECIPE, False, files), number, 3) for number in (1, 2, 3)]
    sizes = [sum(task.record.bytes for task in part) for part in parts]
    assert max(sizes) < 1.1 * min(sizes)
    assert manifest(file)["files"] == 12
    in_parts = pairs(data_folder(file))
    assert cptain("preprocess", file, "--force").exit_code == 0
    assert pairs(data_folder(file)) == in_parts
    written = {path: path.stat().st_mtime_ns for path in data_folder(file).rglob("*.bin")}
    text(b'{"text": "new"}\n', "later.jsonl")
    assert "12 of 13 files are done and unchanged" in cptain("preprocess", file).output
    assert manifest(file)["files"] == 13
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_file_that_is_written_to_meanwhile_is_an_error(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = text(b'{"text": "one"}\n')
    source = file.parent / "in" / "x.jsonl"
    parse = reader.parse

    def parse_and_append(*arguments: Any) -> Any:
        with open(source, "ab") as appended:
            appended.write(b'{"text": "two"}\n')
        return parse(*arguments)

    monkeypatch.setattr(reader, "parse", parse_and_append)
    result = cptain("preprocess", file, "--workers", 1)
    assert result.exit_code == 1
    assert f"{source}: changed while it was read: run it again when nobody writes it" in result.output
    assert pairs(data_folder(file)) == {}


def test_two_million_tiny_documents_are_two_million_documents(text: Any) -> None:
    file = text(b'{"text":"a"}\n' * 2_000_000, data__check_fraction=0.0001)
    assert cptain("preprocess", file, "--workers", 2).exit_code == 0
    assert manifest(file)["documents"] == 2_000_000
    assert os.path.getsize(data_folder(file) / "x_text_document.idx") == 34 + 2_000_000 * (4 + 8 + 8) + 8
