"""What preprocess makes of input files: every way to write documents, and what is wrong in some."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import zstandard
from conftest import cptain, leftovers, write_jsonl
from cptain.data.tokenizer import Tokenizer
from cptain.run_file import load_run
from test_preprocess import data_folder, manifest, pairs, read_pair


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
