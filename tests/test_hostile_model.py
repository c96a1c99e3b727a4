"""A model's safetensors that lie, or are damaged at random: refused with one line."""

import json
import random
import shutil
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from cptain.checkpoint.safetensors_folder import SafetensorsReader
from safetensors.torch import save_file
from test_hostile import refusal
from test_hostile_checkpoint import mutate


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with a small model.safetensors."""
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0)}, tmp_path / "model.safetensors")
    return tmp_path


def read_weights(folder: Path) -> None:
    with SafetensorsReader(folder) as reader:
        for name in reader.names():
            shape, dtype = reader.shape(name), reader.dtype(name)
            reader.read(name, 0, shape[0] if shape else 1, torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8))


A, B = (
    '"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}',
    '"b":{"dtype":"F32","shape":[4],"data_offsets":[24,40]}',
)


HEADERS = [
    f"{{{A}}}",  # bytes that belong to no tensor
    f"{{{A},{B},{B}}}",
    f"{{{A},{A.replace('24', '16')},{B}}}",
    f"{{{A},{B.replace('24,40', '20,36')}}}",
    f"{{{A},{B.replace('24,40', '0,16')}}}",
    f"{{{A},{B.replace('24,40', '40,24')}}}",
    f"{{{A},{B.replace('24,40', '28,44')}}}",
    f"{{{A},{B.replace('24,40', '24,40,56')}}}",
    f"{{{A},{B.replace('24,40', '24')}}}",
    f"{{{A},{B.replace('24,40', '24.0,40.0')}}}",
    f"{{{A},{B.replace('24,40', chr(34) + '24' + chr(34) + ',40')}}}",
    f"{{{A},{B.replace('[4]', '[-4]')}}}",
    f"{{{A},{B.replace('[4]', '[-2,-2]')}}}",
    f"{{{A},{B.replace('[4]', '[4.0]')}}}",
    f"{{{A},{B.replace('[4]', '[true,4]')}}}",
    f"{{{A},{B.replace('[4]', '4')}}}",
    f"{{{A},{B.replace('[4]', 'null')}}}",
    f"{{{A},{B.replace('[4]', '[10000000000000]')}}}",
    f"{{{A},{B.replace('[4]', '[4294967296,4294967296,4]')}}}",
    f"{{{A},{B.replace('[4]', '[' + '9' * 5000 + ']')}}}",
    f"{{{A},{B.replace('F32', 'F33')}}}",
    f"{{{A},{B.replace('F32', 'I32')}}}",
    f"{{{A},{B.replace(chr(34) + 'F32' + chr(34), '[]')}}}",
    f"{{{A},{B.replace(chr(34) + 'F32' + chr(34), chr(34) + chr(92) + 'n' + chr(34))}}}",
    f"{{{A},{B.replace(chr(34) + 'b', chr(34) + chr(92) + 'u001b[2J')}}}",
    f'{{{A},"b":5}}',
    f'{{{A},"b":{{}}}}',
    "[]",
    "null",
    "5",
    "",
    "{",
    "[" * 100_000,
    '{"a":' * 50_000,
    "\xff",
]


@pytest.mark.parametrize("number", range(len(HEADERS)))
def test_a_safetensors_header_that_lies_is_refused(weights: Path, number: int) -> None:
    header = HEADERS[number].encode("latin-1")
    (weights / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(40))
    assert refusal(read_weights, weights)


@pytest.mark.parametrize("length", [0, 1, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_header_length_that_lies_is_refused_even_in_a_file_as_large(weights: Path, length: int) -> None:
    file = weights / "model.safetensors"
    with open(file, "r+b") as raw:
        raw.write(struct.pack("<Q", length))
        raw.truncate(min(length + 100, 1 << 42))  # a hole: nothing is written
    assert refusal(read_weights, weights)


SHARDS: list[Any] = [
    "../x",
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/b",
    "a\nb",
    "\x1b[2J",
    "a\0b",
    "x" * 5000,
    5,
    None,
    [],
    {},
]


@pytest.mark.parametrize("shard", SHARDS)
def test_an_index_that_names_anything_but_a_file_beside_it_is_refused(weights: Path, shard: Any) -> None:
    index = weights / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard, "b": "model.safetensors"}}))
    assert refusal(read_weights, weights)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": 5}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": "model.safetensors", "a": "other.safetensors", "b": "model.safetensors"}}',
        '{"weight_map": {"a": "model.safetensors", "c": "model.safetensors"}}',
        '{"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}',
        '{"weight_map": {"a": "model.safetensors", "b": "copy.safetensors"}}',
        "[" * 100_000,
    ],
)
def test_an_index_that_lies_is_refused(weights: Path, text: str) -> None:
    shutil.copy(weights / "model.safetensors", weights / "copy.safetensors")
    (weights / "model.safetensors.index.json").write_text(text)
    assert refusal(read_weights, weights)


def test_a_model_damaged_at_random_is_read_or_refused(weights: Path) -> None:
    whole, refused = (weights / "model.safetensors").read_bytes(), 0
    for seed in range(400):
        (weights / "model.safetensors").write_bytes(mutate(whole, random.Random(seed)))
        refused += refusal(read_weights, weights) is not None
    assert refused > 40
