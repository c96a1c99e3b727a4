"""What stands around documents and tokenizers: frames, links, columns and files that could be taken for others."""

import lzma
from pathlib import Path

import pytest
import zstandard
from conftest import RunFileMaker, cptain
from cptain.data import tokenizer
from cptain.data.hashed_file import HashedFile
from cptain.data.inputs import input_files
from cptain.data.reader import blocks
from cptain.errors import CptainError

LINES = [b'{"text": "%d"}\n' % number for number in range(3)]


def read(file: Path) -> bytes:
    pieces = [bytes(block.content) for block in blocks(HashedFile(file), "text", 1 << 20)]
    return b"\n".join(pieces) + b"\n"


def test_a_zstd_frame_of_any_window_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.zst"
    for window in (27, 29, 31):
        parameters = zstandard.ZstdCompressionParameters(window_log=window, hash_log=6, chain_log=6, search_log=1)
        frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        file.write_bytes(frame.compress(b"".join(LINES)) + frame.flush())
        assert read(file) == b"".join(LINES)


@pytest.mark.parametrize("zeros", [4, 4096, 8192, 10_000])
def test_xz_streams_may_have_padding_between_them(tmp_path: Path, zeros: int) -> None:
    file = tmp_path / "a.jsonl.xz"
    file.write_bytes(b"".join(lzma.compress(line) + bytes(zeros) for line in LINES))
    assert read(file) == b"".join(LINES)


@pytest.mark.parametrize("zeros", [4, 4096, 10_000])
def test_zeros_that_no_format_has_are_lost_data(tmp_path: Path, zeros: int) -> None:
    frame = zstandard.ZstdCompressor().compress(LINES[0])
    xz = lzma.compress(LINES[0])
    for name, content in (
        ("a.jsonl.zst", frame + bytes(zeros) + frame),
        ("b.jsonl.zst", bytes(zeros) + frame),
        ("c.jsonl.xz", bytes(zeros) + xz),
        ("d.jsonl.xz", xz + bytes(zeros + 1) + xz),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CptainError, match=r"corrupt: \d+ zero bytes before byte \d+, where a compressed frame"):
            read(tmp_path / name)
    (tmp_path / "a.jsonl.zst").write_bytes(frame + bytes(zeros))
    assert read(tmp_path / "a.jsonl.zst") == LINES[0]


def test_one_file_through_two_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jsonl").write_bytes(LINES[0])
    (tmp_path / "in").mkdir()
    for name in ("one", "two"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "real")
    with pytest.raises(CptainError, match=r"are one file, .*real/a\.jsonl: take one name away"):
        input_files([f"{tmp_path}/in/*/*.jsonl"])
    assert len(input_files([f"{tmp_path}/in/one/*.jsonl", f"{tmp_path}/in/one/a*"])) == 1


def test_two_columns_of_one_name_are_refused(make_run: RunFileMaker, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    result = cptain("preprocess", make_run(data__input=["in.parquet"]), "--workers", 1)
    assert result.exit_code == 1
    assert 'in.parquet: two columns "text" (data.key): which is meant cannot be said' in result.output


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "tokenizer.model",
            "its tokenizer is sentencepiece's alone, and reading it needs sentencepiece, tiktoken: pip",
        ),
        ("tekken.json", "tekken.json: Mistral's own format, which is not read"),
        ("vocab.bpe", "no tokenizer in this folder"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_by_what_it_is_or_needs(
    make_run: RunFileMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    monkeypatch.setattr(tokenizer, "_is_installed", lambda distribution: distribution == "protobuf")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / name).write_text("{}")
    (tmp_path / "in.jsonl").write_bytes(LINES[0])
    file = make_run(data__input=["in.jsonl"], model__tokenizer=str(tmp_path / "tokenizer"))
    result = cptain("preprocess", file, "--workers", 1)
    assert result.exit_code == 1
    assert says in result.output
