"""Metadata, archives and files of a checkpoint that lie, or are damaged at random: refused with one line."""

import io
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hostile import read_all, refusal, replace_archive, write_sound
from torch.distributed.checkpoint.metadata import Metadata


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def lie(key: str, change: Callable[[Any, Any, Metadata], Any]) -> Callable[[Path], None]:
    """Change a tensor's entry and the place of its last chunk in .metadata."""

    def edit(folder: Path) -> None:
        metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
        place = [place for index, place in metadata.storage_data.items() if index.fqn == key][-1]
        change(metadata.state_dict_metadata[key], place, metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return edit


def setter(place: str, **values: Any) -> Callable[[Any, Any, Metadata], None]:
    def change(entry: Any, storage: Any, metadata: Metadata) -> None:
        target = {"entry": entry, "storage": storage, "first": getattr(entry, "chunks", [None])[0]}[place]
        for name, value in values.items():
            setattr(target, name, value)

    return change


def set_offset(entry: Any, storage: Any, metadata: Metadata) -> None:
    """Both chunks at the same place: they overlap, and leave a hole as large."""
    entry.chunks[1] = entry.chunks[0]


TENS_OF_TB = 10**13


NAMES = ["..", ".", "", "../copy/__0_0.distcp", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", ".metadata/x", 5, None, b"x"]


METADATA_LIES = [
    *(setter("storage", relative_path=name) for name in NAMES),
    *(setter("storage", offset=value) for value in (-1, 1 << 62, 1 << 80, 10**6, 0.0, "0", None, True)),
    *(setter("storage", length=value) for value in (-1, 0, 1, 1 << 62, 10**6, 2.5, None)),
    *(
        setter("entry", size=torch.Size(size))
        for size in ((TENS_OF_TB, 3), (4, TENS_OF_TB), (0, 3), (), (4, 3, 1), (3, 3))
    ),
    *(setter("entry", size=size) for size in ((-4, -3), (4.0, 3), "43", None, (1 << 70, 3), [4, 3])),
    *(setter("entry", chunks=value) for value in ([], None, 7, [1, 2], {"a": 1})),
    *(setter("entry", properties=value) for value in (None, "float32")),
    *(setter("first", offsets=torch.Size(value)) for value in ((1, 0), (0, 1), (3, 0), (0,), (0, 0, 0), (1 << 60, 0))),
    *(setter("first", sizes=torch.Size(value)) for value in ((1, 3), (2, 2), (3, 3), (TENS_OF_TB, 3), (2,), (0, 0))),
    *(setter("first", sizes=value) for value in ((-2, 3), (2.0, 3), None)),
    set_offset,
    lambda entry, storage, metadata: metadata.storage_data.clear(),
    lambda entry, storage, metadata: setattr(metadata, "storage_data", None),
    lambda entry, storage, metadata: setattr(metadata, "state_dict_metadata", [1]),
    lambda entry, storage, metadata: metadata.state_dict_metadata.update({"a\nb": entry}),
    lambda entry, storage, metadata: metadata.state_dict_metadata.update({5: entry}),
    lambda entry, storage, metadata: metadata.state_dict_metadata.update({"x": None}),
    lambda entry, storage, metadata: metadata.state_dict_metadata.update({"new": entry}),
]


@pytest.mark.parametrize("number", range(len(METADATA_LIES)))
def test_metadata_that_lies_about_chunks_files_or_sizes_is_refused(copy: Path, number: int) -> None:
    lie("layers.weight", METADATA_LIES[number])(copy)
    assert refusal(read_all, copy)


def saved(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def nested() -> bytes:
    """A zip whose only member is a sound archive."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("archive/inner.zip", saved(torch.zeros(5)))
    return content.getvalue()


def two_pickles() -> bytes:
    """Two members of one name, of which readers take different ones."""
    content = io.BytesIO(saved(torch.zeros(5)))
    with zipfile.ZipFile(content, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data.pkl", b"cos\nsystem\n(Vtrue\ntR.")
    return content.getvalue()


def compressed() -> bytes:
    content = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(torch.zeros(5)))) as old,
        zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return content.getvalue()


def directory(offset: int, format: str, value: int) -> bytes:
    """Overwrite a field of the entry of data/0 in the directory, which follows the signature."""
    content = bytearray(saved(torch.zeros(5)))
    at = content.rindex(b"archive/data/0") - 46
    struct.pack_into(format, content, at + offset, value)
    return bytes(content)


def end(offset: int, value: int) -> bytes:
    """Overwrite a number in the 64-bit record at the end of the directory, which torch always writes."""
    content = bytearray(saved(torch.zeros(5)))
    struct.pack_into("<Q", content, content.rindex(b"PK\6\6") + offset, value)
    return bytes(content)


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a zip in a zip": nested,
    "two pickles of one name": two_pickles,
    "compressed members": compressed,
    "a storage that begins past the end": lambda: directory(42, "<I", 1 << 30),
    "a storage that begins within another": lambda: directory(42, "<I", 1),
    "a storage of 4 GB": lambda: directory(24, "<I", 0xFFFFFFF0),
    "a storage of 4 GB on disk": lambda: directory(20, "<I", 0xFFFFFFF0),
    "a storage of nothing": lambda: directory(24, "<I", 0),
    "an unknown compression": lambda: directory(10, "<H", 99),
    "a directory of 4 GB": lambda: end(40, 0xFFFFFFF0),
    "a directory of 8 EB": lambda: end(40, 1 << 63),
    "a directory past the end": lambda: end(48, 1 << 40),
    "a directory at the end of all numbers": lambda: end(48, (1 << 64) - 1),
    "a directory of many entries, cut": lambda: saved(torch.zeros(5))[:-30],
    "another shape": lambda: saved(torch.zeros(6)),
    "another dtype": lambda: saved(torch.zeros(5, dtype=torch.bfloat16)),
    "integers": lambda: saved(torch.zeros(5, dtype=torch.int64)),
    "a view that is not contiguous": lambda: saved(torch.zeros(10)[::2]),
    "one value five times": lambda: saved(torch.zeros(1).expand(5)),
    "no tensor": lambda: saved({"a": 1}),
    "a sparse tensor": lambda: saved(torch.zeros(5).to_sparse()),
    "nothing": lambda: b"",
    "zeros": lambda: bytes(1000),
    "the old format of torch.save": lambda: pickle.dumps(torch.zeros(5)),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_chunk_that_is_not_the_archive_of_its_tensor_is_refused(copy: Path, kind: str) -> None:
    replace_archive(copy, "norm.weight", ARCHIVES[kind]())
    assert refusal(read_all, copy)


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "__0_0.distcp")


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: (folder / "__0_0.distcp").symlink_to("/dev/zero"),
        lambda folder: (folder / "__0_0.distcp").symlink_to("__0_0.distcp"),
        lambda folder: (folder / "__0_0.distcp").symlink_to("nowhere"),
        lambda folder: (folder / "__0_0.distcp").symlink_to("/"),
        lambda folder: (folder / "__0_0.distcp").symlink_to("/etc/passwd"),
        lambda folder: (folder / "__0_0.distcp").mkdir(),
        fifo,
    ],
)
def test_a_link_or_a_pipe_in_the_place_of_a_file_is_refused(copy: Path, make: Callable[[Path], None]) -> None:
    (copy / "__0_0.distcp").unlink()
    make(copy)
    assert refusal(read_all, copy)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"null", b'{"sharded_backend": "zarr"}', b"[" * 100_000, b"\xff"]
)
def test_a_checkpoint_of_another_backend_is_refused(copy: Path, content: bytes) -> None:
    (copy / "metadata.json").write_bytes(content)
    assert refusal(read_all, copy)


def mutate(content: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, cut, doubled or moved."""
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at, length = dice.randrange(len(changed)), dice.choice((1, 2, 4, 8, 30))
        kind = dice.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            changed[at : at + length] = dice.choice((b"\xff", b"\0", b"\x7f")) * length
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        else:
            changed[at : at + length] = dice.randbytes(length)
        changed = changed or bytearray(b"\0")
    return bytes(changed)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "common.pt", "metadata.json"])
def test_a_checkpoint_damaged_at_random_is_read_or_refused(copy: Path, name: str) -> None:
    whole, refused = (copy / name).read_bytes(), 0
    for seed in range(400):
        (copy / name).write_bytes(mutate(whole, random.Random(seed)))
        refused += refusal(read_all, copy) is not None
    assert refused > 40
