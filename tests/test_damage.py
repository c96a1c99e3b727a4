"""One bit that is not what was written: export, verify and train say where, and none goes on with it."""

import os
import random
import shutil
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import RunFileMaker, as_if_trained, cptain
from cptain.checkpoint.checksums import Member, Passing, combined
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.errors import CptainError
from cptain.run_file import load_run

KEY = "decoder.layers.mlp.linear_fc2.weight"


def flip(file: Path, byte: int, bit: int = 0) -> None:
    with open(file, "r+b") as opened:
        opened.seek(byte)
        value = opened.read(1)[0]
        opened.seek(byte)
        opened.write(bytes([value ^ 1 << bit]))


def place(folder: Path, key: str) -> tuple[Path, int, int, int, int]:
    """The file of a tensor's first chunk, where the archive begins and ends in it, and where its values do."""
    with TorchDistReader(folder) as reader:
        chunk = reader._tensors[key].chunks[0]
        found = reader._find(key, reader._tensors[key], chunk)
        begin, length = chunk.place.offset, chunk.place.length
        return folder / chunk.place.file, begin, begin + length, found.storage.begin, found.storage.end


def where(folder: Path, part: str, key: str) -> tuple[Path, int]:
    """A byte of a part of the archive that holds a tensor's first chunk."""
    file, begin, end, first, last = place(folder, key)
    content = file.read_bytes()
    directory = content.index(b"PK\1\2", last, end)
    crc = content.rindex(b"PK\1\2", directory, end) + 16
    return file, {
        "first value": first,
        "last value": last - 1,
        "some value": (first + last) // 2 + 12345,
        "pickle": begin + content[begin:first].index(b"_rebuild") + 3,
        "checksum in the directory": crc,
        "name in the directory": content.index(b"data.pkl", directory) + 1,
        "version": content.index(b"archive/version", begin) + len(b"archive/version"),
    }[part]


PARTS = (
    "first value",
    "last value",
    "some value",
    "pickle",
    "checksum in the directory",
    "name in the directory",
    "version",
)


@pytest.mark.parametrize("part", PARTS)
def test_one_bit_flipped_in_a_shard_is_refused_by_export_verify_and_train(
    make_ready_run: RunFileMaker, model: Path, part: str
) -> None:
    file = make_ready_run()
    as_if_trained(file, 1)
    run = load_run(file)
    folder = run.checkpoints_folder / "iter_0000001"
    shard, byte = where(folder, part, KEY)
    flip(shard, byte)
    for command in (("export", file), ("verify", model, folder), ("train", file, "--cpu")):
        result = cptain(*command)
        assert result.exit_code == 1, result.output
        line = result.output.strip().splitlines()[-1]
        assert f"{shard}: {KEY}: " in line or ("directory" in part and f"{shard}: not as it was saved" in line)
    assert not run.hf_folder.exists() or not list(run.hf_folder.iterdir())


def test_a_bit_flipped_in_the_padding_of_the_vocabulary_is_found_too(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run()
    as_if_trained(file, 1)
    folder = load_run(file).checkpoints_folder / "iter_0000001"
    shard, *_, end = place(folder, "embedding.word_embeddings.weight")
    flip(shard, end - 1)
    assert "embedding.word_embeddings.weight: damaged" in cptain("export", file).output


def test_whatever_bit_of_an_archive_is_flipped_its_values_are_those_written_or_refused(
    ready_run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(load_run(ready_run).megatron_folder / "release", tmp_path / "release"))
    key = "decoder.final_layernorm.weight"
    shard, begin, end, first, last = place(folder, key)

    def values() -> list[float]:
        with TorchDistReader(folder) as reader:
            buffer = torch.empty(last - first, dtype=torch.uint8)
            reader.read(key, (), 0, reader.shape(key)[0], buffer)
            reader.check_members(1)
        return buffer.tolist()

    sound, dice, refused = values(), random.Random(0), 0
    for byte in range(begin, end):
        bit = dice.randrange(8)
        flip(shard, byte, bit)
        line = ""
        try:
            found = values()
        except CptainError as error:
            line, found = str(error), sound
            refused += 1
        assert found == sound, byte
        assert not line or f"{shard}: {key}: " in line
        flip(shard, byte, bit)
    assert refused > (end - begin) / 2


@pytest.mark.parametrize("pieces", [1, 2, 7, 100])
def test_checksums_of_pieces_in_any_order_are_that_of_the_whole(pieces: int) -> None:
    dice = random.Random(pieces)
    content = dice.randbytes(10_000)
    cuts = [0, *sorted(dice.sample(range(1, len(content)), pieces - 1)), len(content)]
    ranges = list(pairwise(cuts))
    dice.shuffle(ranges)

    def rest(begin: int, end: int) -> int:
        return zlib.crc32(content[begin:end])

    for keep in (pieces, pieces // 2):
        for crc, right in ((zlib.crc32(content), True), (zlib.crc32(content) ^ 1, False)):
            passing = Passing(Member(0, len(content), crc), "a tensor")
            for begin, end in ranges[:keep]:
                passing.add(begin, content[begin:end])
            assert passing.is_whole(rest) is right
    overlapping = Passing(Member(0, len(content), zlib.crc32(content)), "a tensor")
    for begin, end in ((0, 100), (50, 200), (0, 100), (150, 151)):
        overlapping.add(begin, content[begin:end])
    assert overlapping.is_whole(rest)
    assert combined(zlib.crc32(b"ab"), zlib.crc32(b""), 0) == zlib.crc32(b"ab")


def test_an_export_of_one_other_bit_is_not_done_though_size_and_date_are_the_same(
    make_ready_run: RunFileMaker,
) -> None:
    file = make_ready_run()
    shard = as_if_trained(file) / "model.safetensors"
    assert " → " in cptain("export", file).output
    content, stat = shard.read_bytes(), shard.stat()
    flip(shard, len(content) - 5)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert " → " in cptain("export", file).output
    assert shard.read_bytes() == content
    assert "is done: it is what would be written" in cptain("export", file).output
