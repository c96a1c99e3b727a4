"""preprocess: what Megatron's own reader finds in the pairs, and what bad input does."""

import bz2
import ctypes
import gzip
import json
import lzma
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from conftest import RunFileMaker, cptain, cptain_process, leftovers, wait_until_half_written, write_jsonl
from cptain.data import reader
from cptain.data.blend import blend
from cptain.data.inputs import input_files
from cptain.data.manifest import Record
from cptain.data.preprocess import _tasks, shard
from cptain.data.recipe import Recipe
from cptain.data.tokenizer import Tokenizer
from cptain.errors import CptainError
from cptain.run_file import MixPart, load_run


def read_pair(prefix: Path) -> list[list[int]]:
    """The documents of a pair, by Megatron's own IndexedDataset, in a process of its own."""
    script = """
import json, sys
from cptain.megatron.importing import before_import
before_import(cpu=True)
from megatron.core.datasets.indexed_dataset import IndexedDataset
data = IndexedDataset(sys.argv[1])
index = data.document_indices
documents = [[int(i) for s in range(index[d], index[d + 1]) for i in data[s]] for d in range(len(index) - 1)]
print(json.dumps([str(data.index.dtype.__name__), documents]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(prefix)], capture_output=True, text=True, check=True)
    dtype, documents = json.loads(done.stdout.splitlines()[-1])
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


@pytest.fixture
def text(tmp_path: Path, make_run: RunFileMaker, ready_run: Path) -> Any:
    """A function that writes bytes as an input file and returns a run file for it, whose tokenizer transformers has
    been asked about."""

    def write(content: bytes, name: str = "x.jsonl", **changes: Any) -> Path:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
        file = make_run(data__input=["in/**/*.jsonl*"], **changes)
        if "data__output" not in changes:
            shutil.copytree(data_folder(ready_run) / ".tokenizer", data_folder(file) / ".tokenizer", dirs_exist_ok=True)
        return file

    return write


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b'{"text": "one"}\r\n{"text": "two"}\r\n'),
        ("x.jsonl", b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}'),
        ("x.jsonl", b'{"text": "no", "text": "one"}\n   \n{"other": [1, null], "text": "two"}\n\n'),
        ("x.jsonl", b'{"n": -%s, "text": "one"}\n{"n": [NaN, 1e400, -Infinity], "text": "two"}\n' % (b"9" * 5000)),
        ("x.jsonl.gz", gzip.compress(b'{"text": "one"}\n{"te') + gzip.compress(b'xt": "two"}\n') + b"\0" * 512),
        ("x.jsonl.gz", gzip.compress(b"") + gzip.compress(b'{"text": "one"}\n{"text": "two"}')),
        ("x.jsonl.zst", zstandard.compress(b'{"text": "one"}\n{"te') + zstandard.compress(b'xt": "two"}\n')),
    ],
    ids=[
        "crlf",
        "bom and no last newline",
        "duplicate key and blank lines",
        "numbers beyond double",
        "gzip members",
        "empty member",
        "zstd frames",
    ],
)
def test_every_way_to_write_two_documents_gives_two_documents(text: Any, name: str, content: bytes) -> None:
    file = text(content, name)
    result = cptain("preprocess", file)
    assert result.exit_code == 0, result.output
    reference = text(b'{"text": "one"}\n{"text": "two"}\n', "z.jsonl")
    assert cptain("preprocess", reference).exit_code == 0
    found = pairs(data_folder(file))
    assert found["x_text_document.bin"] == found["z_text_document.bin"]
    assert found["x_text_document.idx"] == found["z_text_document.idx"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "tw', "not JSON: Unterminated string starting at: line 1 column 10 (char 9)"),
        (b'{"txt": "two"}', 'no key "text"'),
        (b'{"text": null}', '"text" is not a string but NoneType'),
        (b'{"text": ["two", 2]}', '"text" is not a string in its list but int'),
        (b'["two"]', "not a JSON object but list"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 10 of the line)"),
        ('{"text": "UTF-16"}'.encode("utf-16"), "not UTF-8 (byte 0 of the line)"),
        (b'{"text": "\\ud800"}', '"text" holds a lone surrogate (character 0)'),
        (b"[" * 100000, "not JSON: maximum recursion depth exceeded"),
    ],
)
def test_a_bad_line_fails_with_file_and_line_or_is_kept_in_a_side_file(text: Any, line: bytes, reason: str) -> None:
    file = text(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    failed = cptain("preprocess", file)
    assert failed.exit_code == 1
    (last,) = [one for one in failed.output.splitlines() if one.startswith("cptain: ")]
    assert last.startswith(f"cptain: {file.parent}/in/x.jsonl:2: {reason}")
    assert pairs(data_folder(file)) == {}
    assert leftovers(file.parent) == []

    skipped = cptain("preprocess", file, "--set", "data.on_error=skip")
    assert skipped.exit_code == 0
    assert "2 documents" in skipped.output
    assert "1 bad lines skipped" in skipped.output
    assert manifest(file)["skipped"] == 1
    (kept,) = (data_folder(file) / "x_text_document.skipped.jsonl").read_text().splitlines()
    entry = json.loads(kept)
    assert entry["line"] == 2
    assert entry["reason"].startswith(reason)
    assert entry["raw"] == line.decode("utf-8", "backslashreplace")
    assert len(read_pair(data_folder(file) / "x_text_document")) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_truncated_or_corrupt_file_is_an_error_and_never_a_shorter_data_set(text: Any, workers: int) -> None:
    random = np.random.default_rng(0)
    lines = b"".join(json.dumps({"text": random.bytes(300).hex()}).encode() + b"\n" for _ in range(9000))
    write_jsonl(text(b"", "good.jsonl").parent / "in" / "good.jsonl", ["good"])
    with_checksum = zstandard.ZstdCompressor(write_checksum=True)  # as the zstd program writes
    for name, whole in (("x.jsonl.gz", gzip.compress(lines)), ("x.jsonl.zst", with_checksum.compress(lines))):
        file = text(whole[:-7], name)
        result = cptain("preprocess", file, "--workers", workers)
        assert result.exit_code == 1
        assert f"{name}: truncated: the file ends at byte {len(whole) - 7}, inside a compressed frame" in result.output
        middle = len(whole) // 2
        file = text(whole[:middle] + bytes(64) + whole[middle + 64 :], name)
        result = cptain("preprocess", file, "--workers", workers, "--set", "data.on_error=skip")
        assert result.exit_code == 1
        assert f"{name}: corrupt at byte" in result.output
        assert not (data_folder(file) / "x_text_document.bin").exists()
        assert not (data_folder(file) / "manifest.json").exists()
        (file.parent / "in" / name).unlink()


def test_an_empty_file_is_named_and_only_nothing_at_all_is_an_error(text: Any) -> None:
    file = text(b"", "empty.jsonl")
    result = cptain("preprocess", file)
    assert result.exit_code == 1
    assert "cptain: data.input: no document in any file: there is nothing to train on" in result.output
    write_jsonl(file.parent / "in" / "y.jsonl", ["two"])
    result = cptain("preprocess", file)
    assert result.exit_code == 0
    assert f"{file.parent}/in/empty.jsonl: no document in it" in result.output
    assert [record["documents"] for record in manifest(file)["records"]] == [0, 1]


def test_globs_that_match_nothing_or_clash_are_named(make_run: RunFileMaker, tmp_path: Path) -> None:
    result = cptain("preprocess", make_run(data__input=["nothing/*.jsonl"]))
    assert result.exit_code == 1
    kinds = ".jsonl, .jsonl.gz, .jsonl.zst, .jsonl.bz2, .jsonl.xz, .parquet"
    assert f"cptain: data.input: {tmp_path}/nothing/*.jsonl matches no {kinds} file" in result.output
    (tmp_path / "a.txt").write_text("x")
    result = cptain("preprocess", make_run(data__input=["*.txt"]))
    assert "a.txt" not in result.output
    assert "file (1 other files)" in result.output
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    write_jsonl(tmp_path / "a.jsonl.gz", ["x"])
    result = cptain("preprocess", make_run(data__input=["a.jsonl*"]))
    assert "a.jsonl and " in result.output
    assert "a.jsonl.gz would both become a: rename one" in result.output


def test_a_match_that_is_no_readable_file_is_never_left_out_without_a_word(
    make_run: RunFileMaker, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "in" / "good.jsonl", ["x"])
    file, odd = make_run(data__input=["in/**/*"]), tmp_path / "in" / "odd.jsonl"
    makers: list[Callable[[], object]] = [
        lambda: odd.symlink_to("nothing"),
        lambda: odd.symlink_to("odd.jsonl"),
        lambda: os.mkfifo(odd),
    ]
    for make in makers:
        make()
        result = cptain("preprocess", file)
        assert result.exit_code == 1
        assert result.output.startswith(f"cptain: data.input: {odd}: no regular file, or a link to nothing")
        odd.unlink()
    secret = tmp_path / "in" / "secret"
    write_jsonl(secret / "x.jsonl", ["x"])
    secret.chmod(0)
    process = cptain_process("preprocess", file, preexec_fn=obey_permissions)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, f"cptain: {secret}: Permission denied\n")
    secret.chmod(0o755)
    for name, said in ((b".jsonl", "has no name before its suffix"), (b"\xff.jsonl", "a name that is not UTF-8")):
        (Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name))).write_bytes(b'{"text": "x"}\n')
        result = cptain("preprocess", file, "--set", "data.input=['in/*', 'in/.json*']")
        assert f"{said}: rename it" in result.output
        (Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name))).unlink()
    folder = cptain("preprocess", file, "--set", "data.input=['in']")
    assert f"it is a folder: write {tmp_path}/in/**/*" in folder.output


def test_files_of_several_globs_are_named_from_their_common_folder(tmp_path: Path) -> None:
    for name in ("one/a.jsonl", "two/x/a.jsonl"):
        write_jsonl(tmp_path / name, ["x"])
    found = input_files([f"{tmp_path}/one/**/*.jsonl", f"{tmp_path}/two/x/a.jsonl"])
    assert sorted(found) == ["one/a", "two/x/a"]


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
    file = text(b"".join(b'{"text": "%d %s"}\n' % (i, b"word " * 100) for i in range(40000)))
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


# Exactness


def trained(kind: str, folder: Path, texts: list[str]) -> Path:
    """A tokenizer of a family, trained on `texts`, as transformers saves it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    if kind == "byte-level BPE":  # Llama 3, Qwen, GPT
        tokenizer = Tokenizer(models.BPE(ignore_merges=True))
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        )
        pattern += r"\s+(?!\S)|\s+"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "byte-fallback BPE":  # Llama 2, Gemma
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special)
    elif kind == "Metaspace BPE":  # Mistral
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special)
    else:  # Unigram with NFKC: llm-jp
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=special, unk_token="<unk>")
    tokenizer.decoder = {
        "byte-level BPE": decoders.ByteLevel(),
        "byte-fallback BPE": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    }.get(kind, decoders.Metaspace())
    tokenizer.train_from_iterator([text[:500] for text in texts], trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


FAMILIES = ["byte-level BPE", "byte-fallback BPE", "Metaspace BPE", "Unigram with NFKC"]
ODD = [
    *"aeiouAEI 0129'’.,!?-_/\\\"\n\r\t\u00a0\u3000\u200b\u200d\ufeff\u0301",
    *"あいうカタｶﾅ漢字一龍𠮷、。①Ⅳ㍿",
    *"éßſıİ😀👩🏽ไทยहि",
]
ODD += ["'s", "'ſ", "'S", "  ", "\n\n", "</s>", "<s>", "<unk>", "ing", "the", "http://", "123456"]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_transformers_on_text_and_on_noise(
    family: str, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    folder = trained(family, tmp_path / "tokenizer", texts)
    tokenizer = Tokenizer(str(folder))
    random = np.random.default_rng(7)
    noise = ["".join(random.choice(ODD, size=int(random.integers(0, 40)))) for _ in range(3000)]
    every = [*texts, *noise]
    ids, lengths = tokenizer.encode(every)
    expected = AutoTokenizer.from_pretrained(str(folder))(every)["input_ids"]
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    differ = [text for text, part, wanted in zip(every, parts, expected, strict=True) if part.tolist() != wanted]
    assert not differ, differ[:3]
    assert tokenizer.vocab_size == len(AutoTokenizer.from_pretrained(str(folder)))
    backend = "fastokens" if family in ("byte-level BPE", "byte-fallback BPE") else "splintr-rs"
    assert tokenizer.backend.startswith(backend)
    assert backend == "fastokens" or "fastokens does not take it" in tokenizer.backend
    with capsys.disabled():
        print(f" {family}: {len(every)} texts, {len(ids)} ids, {tokenizer.backend[:40]}", end="")


def test_a_library_that_errs_on_a_probe_is_not_used(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained("Unigram with NFKC", tmp_path / "tokenizer", texts)

    def load(serialized: str) -> Any:
        def encode(texts: list[str]) -> Any:
            ids, lengths = right(texts)
            return np.where(ids == ids.max(), 0, ids), lengths

        right = splintr(serialized)
        return encode

    from cptain.data.tokenizer import _splintr as splintr

    monkeypatch.setattr("cptain.data.tokenizer._splintr", load)
    backend = Tokenizer(str(folder)).backend
    assert backend.startswith("tokenizers, of Hugging Face (fastokens does not take it: ")
    assert "; splintr-rs does not take it: its ids differ for " in backend


def test_ids_that_differ_from_hugging_face_s_end_the_run_at_the_document(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fastokens is made to err on one word, as an unknown defect of it might."""
    file = text(b"".join(b'{"text": "%s"}\n' % (b"wrong" if number == 700 else b"right") for number in range(1000)))
    encode = Tokenizer.encode

    def wrong(self: Tokenizer, texts: list[str]) -> Any:
        ids, lengths = encode(self, texts)
        ids = ids.copy()
        if "wrong" in texts:
            ids[int(lengths[: texts.index("wrong") + 1].sum()) - 1] ^= 1
        return ids, lengths

    monkeypatch.setattr(Tokenizer, "encode", wrong)
    unseen = cptain("preprocess", file, "--workers", 1, "--set", "data.check_fraction=0")
    assert unseen.exit_code == 0
    seen = cptain("preprocess", file, "--workers", 1, "--force", "--set", "data.check_fraction=1")
    assert seen.exit_code == 1
    assert f"{file.parent}/in/x.jsonl:701: fastokens" in seen.output
    assert "gives other ids than Hugging Face here" in seen.output


def test_the_line_of_a_differing_document_is_told_among_lists_too(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = text(b'{"text": ["a", "b"]}\n{"text": []}\n{"text": ["c", "d", "wrong"]}\n{"text": "e"}\n')
    monkeypatch.setattr(Tokenizer, "check", lambda tokenizer, text, ids: text != "wrong")
    seen = cptain("preprocess", file, "--workers", 1, "--set", "data.check_fraction=1")
    assert seen.exit_code == 1
    assert f"{file.parent}/in/x.jsonl:3: fastokens" in seen.output


def test_documents_too_long_for_hugging_face_s_library_are_not_compared(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = text(b'{"text": "%s"}\n{"text": "short"}\n' % (b"long" * 300_000))
    compared: list[str] = []
    monkeypatch.setattr(Tokenizer, "check", lambda tokenizer, text, ids: compared.append(text) or True)
    assert cptain("preprocess", file, "--workers", 1, "--set", "data.check_fraction=1").exit_code == 0
    assert compared == ["short"]


def test_merges_are_kept_in_the_older_form_only_where_it_loads_as_the_same_tokenizer(model: Path) -> None:
    from cptain.data.tokenizer import _short
    from tokenizers import Tokenizer, models

    def merges(vocabulary: list[str], pairs: list[tuple[str, str]]) -> Any:
        ids = {word: number for number, word in enumerate(vocabulary)}
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs))
        short = _short(tokenizer)
        assert Tokenizer.from_str(short).to_str() == tokenizer.to_str()
        return json.loads(short)["model"]["merges"]

    assert merges(["a", "b", "ab"], [("a", "b")]) == ["a b"]
    assert merges(["a", " ", "a "], [("a", " ")]) == [["a", " "]]
    assert merges(["#version", "b", "#versionb"], [("#version", "b")]) == [["#version", "b"]]
    unigram = Tokenizer(models.Unigram([("a", -1.5)], 0))
    assert _short(unigram) == unigram.to_str()


def test_what_transformers_says_of_a_tokenizer_is_asked_once(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = text(b'{"text": "x"}\n')
    assert cptain("preprocess", file).exit_code == 0
    (kept,) = (data_folder(file) / ".tokenizer").iterdir()
    monkeypatch.setattr("cptain.data.tokenizer._ask_transformers", lambda folder: pytest.fail("asked again"))
    assert cptain("preprocess", file, "--force").exit_code == 0
    kept.write_text("{")
    monkeypatch.undo()
    assert cptain("preprocess", file, "--force").exit_code == 0
    assert json.loads(json.loads(kept.read_text())["tokenizer"])["model"]["type"] == "BPE"


# Inputs


def test_every_compression_gives_the_same_data(text: Any) -> None:
    content = b"".join(json.dumps({"text": f"{number} 文書 " * 50}).encode() + b"\n" for number in range(2000))
    for name, compressed in {
        "a.jsonl": content,
        "b.jsonl.gz": gzip.compress(content[:50000]) + gzip.compress(content[50000:]),
        "c.jsonl.zst": zstandard.ZstdCompressor().compress(content),
        "d.jsonl.bz2": bz2.compress(content[:70000]) + bz2.compress(content[70000:]),
        "e.jsonl.xz": lzma.compress(content),
    }.items():
        file = text(compressed, name)
    assert cptain("preprocess", file).exit_code == 0
    found = pairs(data_folder(file))
    assert len({value for key, value in found.items() if key.endswith(".bin")}) == 1
    assert len({value for key, value in found.items() if key.endswith(".idx")}) == 1
    assert len(found) == 10
    for name in ("d.jsonl.bz2", "e.jsonl.xz"):
        whole = (file.parent / "in" / name).read_bytes()
        (file.parent / "in" / name).write_bytes(whole[:-20])
        result = cptain("preprocess", file)
        assert result.exit_code == 1
        assert f"{name}: truncated: the file ends at byte {len(whole) - 20}" in result.output
        (file.parent / "in" / name).write_bytes(whole)


def test_processes_on_one_file_write_what_one_process_writes(text: Any) -> None:
    file = text(b"".join(json.dumps({"text": f"{number} words " * 300}).encode() + b"\n" for number in range(8000)))
    assert cptain("preprocess", file, "--workers", 1).exit_code == 0
    one = pairs(data_folder(file))
    assert cptain("preprocess", file, "--workers", 4, "--force").exit_code == 0
    assert pairs(data_folder(file)) == one
    assert manifest(file)["documents"] == 8000
    text(b'{"text": "small"}\n', "small.jsonl")  # beside which the large one gets more than one process
    assert cptain("preprocess", file, "--workers", 4, "--force").exit_code == 0
    assert one.items() < pairs(data_folder(file)).items()


def test_a_list_of_texts_is_one_document_of_several_sequences(text: Any) -> None:
    file = text(b'{"text": ["one", "two"]}\n{"text": []}\n{"text": "three"}\n')
    assert cptain("preprocess", file).exit_code == 0
    first, empty, last = read_pair(data_folder(file) / "x_text_document")
    tokenizer = Tokenizer(load_run(file).tokenizer)
    one, two, three = tokenizer.exact(["one", "two", "three"])
    assert first == [*one, *two, tokenizer.eod]
    assert empty == []
    assert last == [*three, tokenizer.eod]


def test_strip_cuts_white_space_as_the_fork_does(text: Any) -> None:
    file = text(b'{"text": "  one \\n"}\n{"text": " \\t "}\n{"text": "two"}\n', data__strip=True)
    assert cptain("preprocess", file).exit_code == 0
    tokenizer = Tokenizer(load_run(file).tokenizer)
    one, two = tokenizer.exact(["one", "two"])
    assert read_pair(data_folder(file) / "x_text_document") == [[*one, tokenizer.eod], [], [*two, tokenizer.eod]]
    again = cptain("preprocess", file, "--set", "data.strip=false")
    assert "files are done" not in again.output
    assert read_pair(data_folder(file) / "x_text_document")[0] != [*one, tokenizer.eod]


def test_every_line_is_accounted_for(text: Any) -> None:
    file = text(b'{"text": "a"}\n\n \r\n{"text": ""}\nbad\n{"text": NaN}\n{"text": "b"}', data__on_error="skip")
    assert cptain("preprocess", file).exit_code == 0
    counts = {key: manifest(file)[key] for key in ("lines", "documents", "skipped", "blank")}
    assert counts == {"lines": 7, "documents": 3, "skipped": 2, "blank": 2}


def test_a_line_beyond_the_limit_is_told_before_it_fills_the_memory(text: Any) -> None:
    file = text(b'{"text": "' + b"x" * 300_000 + b'"}\n{"text": "y"}\n', data__max_document_bytes=100_000)
    result = cptain("preprocess", file)
    assert result.exit_code == 1
    assert "x.jsonl:1: 300012 bytes, over data.max_document_bytes = 100000" in result.output
    assert cptain("preprocess", file, "--set", "data.on_error=skip").exit_code == 0
    assert manifest(file)["documents"] == 1
    again = cptain("preprocess", file, "--set", "data.on_error=skip", "--set", "data.max_document_bytes=1000000")
    assert "2 documents" in again.output
    endless = text(gzip.compress(b"x" * 40_000_000), "x.jsonl.gz", data__max_document_bytes=10_000_000)
    (endless.parent / "in" / "x.jsonl").unlink()
    result = cptain("preprocess", endless)
    assert result.exit_code == 1
    assert "x.jsonl.gz:1: over 10000000 bytes (data.max_document_bytes), and its end is not in sight" in result.output


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_a_line_of_a_gigabyte_ends_the_run_with_its_place_and_little_memory(text: Any, kind: str) -> None:
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}[kind]
    content = compress(b'{"text": "one"}\n{"text": "') + compress(b"x" * (64 << 20)) * 16 + compress(b'"}\n')
    file = text(content, f"x.jsonl{kind}")
    # A process counts the memory of the one that began it as its own: hence one small process between.
    between = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "cptain", "preprocess", sys.argv[1], "--workers", "1"])
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", between, str(file)], capture_output=True, text=True, check=True)
    status, peak = map(int, done.stdout.split())
    assert status == 1
    place = f"{file.parent}/in/x.jsonl{kind}:2"
    assert done.stderr.splitlines()[-1].startswith(f"cptain: {place}: over 33554432 bytes (data.max_document_bytes), ")
    assert peak < 700 << 10
    assert pairs(data_folder(file)) == {}


def test_a_parquet_file_gives_what_the_same_lines_give(text: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    values = [f"{number} 文書 " * 50 for number in range(2000)]
    file = text(b"".join(json.dumps({"text": value}).encode() + b"\n" for value in values), "lines.jsonl")
    pyarrow.parquet.write_table(
        pyarrow.table({"id": list(range(2000)), "text": values}),
        file.parent / "in" / "rows.parquet",
        row_group_size=300,
    )
    settings = "data.input=['in/*']"
    assert cptain("preprocess", file, "--set", settings).exit_code == 0
    found = pairs(data_folder(file))
    assert found["rows_text_document.bin"] == found["lines_text_document.bin"]
    assert found["rows_text_document.idx"] == found["lines_text_document.idx"]
    missing = cptain("preprocess", file, "--set", settings, "--set", "data.key=body")
    assert missing.exit_code == 1
    assert 'rows.parquet: no column "body" (data.key): it has id, text' in missing.output
    whole = (file.parent / "in" / "rows.parquet").read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2] + bytes(2000) + whole[len(whole) // 2 + 2000 :]):
        (file.parent / "in" / "rows.parquet").write_bytes(damaged)
        result = cptain("preprocess", file, "--set", settings)
        assert result.exit_code == 1
        assert "rows.parquet: corrupt, or no parquet file: " in result.output


def test_rows_that_are_no_text_are_bad_lines(text: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    file = text(b'{"text": "x"}\n', data__on_error="skip")
    column = pyarrow.array([["one", "two"], None, [], ["three", None]], type=pyarrow.list_(pyarrow.string()))
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file.parent / "in" / "lists.parquet")
    raw = pyarrow.array([b"fine", b"\xff"], type=pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), file.parent / "in" / "strings.parquet")
    binary = pyarrow.array([b"fine", "文".encode()], type=pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": binary}), file.parent / "in" / "binary.parquet")
    assert cptain("preprocess", file, "--set", "data.input=['in/*.parquet']").exit_code == 0
    bytes_, lists, strings = manifest(file)["records"]
    assert (bytes_["documents"], bytes_["skipped"]) == (2, 0)
    assert (lists["lines"], lists["documents"], lists["skipped"]) == (4, 2, 2)
    assert (strings["lines"], strings["documents"], strings["skipped"]) == (2, 1, 1)
    side = (data_folder(file) / "lists_text_document.skipped.jsonl").read_text().splitlines()
    assert [(bad["line"], bad["reason"]) for bad in map(json.loads, side)] == [
        (2, '"text" is not a string but NoneType'),
        (4, '"text" is not a string in its list but NoneType'),
    ]
    side = (data_folder(file) / "strings_text_document.skipped.jsonl").read_text().splitlines()
    assert [(bad["line"], bad["reason"]) for bad in map(json.loads, side)] == [(2, '"text" is not UTF-8')]


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
