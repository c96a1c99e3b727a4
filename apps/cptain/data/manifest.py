"""data/manifest.json: what every input file became.

A file's own record is written to data/.records/ the moment its .bin and .idx are in place, so that several processes
can share a data folder and a killed run loses only the files in hand; manifest.json is put together from the records
once none is missing. Records outlive what data.input names: a file's own says what its pair is called.
"""

import hashlib
import json
import random
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from cptain import atomic
from cptain.data.many_files import answers
from cptain.data.recipe import Recipe
from cptain.errors import CptainError, one_line

FILE_NAME = "manifest.json"
RECORDS = ".records"  # of a data folder


@dataclass(frozen=True)
class Record:
    """One input file and the pair made of it.

    Attributes:
        input: the input file; of a pair of data.tokenized, its path without .bin and .idx.
        prefix: the pair's path under the data folder, without .bin and .idx; of one of data.tokenized, where it is.
        bytes: size of the input file.
        mtime_ns: modification time of the input file, nanoseconds since the epoch.
        fingerprint: of what is in it, see `fingerprint`.
        recipe: how its text became ids.
        sha256: of all of the input file, hexadecimal.
        documents: documents written.
        tokens: ids written, BOS and EOD included.
        text_bytes: of the texts, in UTF-8.
        lines: of the input file, or rows; each is a document, skipped or blank.
        skipped: bad lines, kept in <prefix>.skipped.jsonl.
        blank: lines of white space.
        bin_bytes: size of the .bin file.
        idx_bytes: size of the .idx file.
        without_eod: documents of data.tokenized that do not end with the tokenizer's end-of-document token.
    """

    input: str
    prefix: str
    bytes: int
    mtime_ns: int
    fingerprint: str
    recipe: Recipe
    sha256: str = ""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    lines: int = 0
    skipped: int = 0
    blank: int = 0
    bin_bytes: int = 0
    idx_bytes: int = 0
    without_eod: int = 0

    def same_input(self, other: "Record") -> bool:
        """Whether both describe the same work: all that is known before it is done."""
        before = [one.name for one in fields(self) if one.default is MISSING]
        return all(getattr(self, name) == getattr(other, name) for name in before)

    @property
    def is_tokenized(self) -> bool:
        """Whether it is a pair of data.tokenized, which lies where it was found."""
        return self.prefix.startswith("/")

    @property
    def kept_name(self) -> str:
        """The prefix, or of a pair of data.tokenized its last part: the same wherever the data lies."""
        return Path(self.prefix).name if self.is_tokenized else self.prefix

    @property
    def name(self) -> str:
        """The prefix without what the recipe adds to it."""
        return self.prefix.removesuffix(prefix_of("", self.recipe))

    def missing_output(self, data_folder: Path) -> str | None:
        """What is wrong with the pair on disk, or None where it is as recorded."""
        for suffix, size in ((".bin", self.bin_bytes), (".idx", self.idx_bytes)):
            file = data_folder / (self.prefix + suffix)
            if not file.is_file():
                return f"{file}: missing"
            if file.stat().st_size != size:
                return f"{file}: {file.stat().st_size} bytes where the manifest has {size}"
        return None


def prefix_of(name: str, recipe: Recipe) -> str:
    """The prefix of the pair of the file that is called `name` in the data folder, as Megatron-LM's tool has it."""
    return f"{name}_{recipe.key}_document"


_PIECE = 1 << 16
_SAMPLES = 8


def fingerprint(file: Path, size: int) -> str:
    """SHA-256, hexadecimal, of a file's size, its first and last 64 KiB and eight pieces of 4 KiB between, which are
    the same for every file of that size: a change that keeps size and date is rare, and this reads no whole file."""
    digest = hashlib.sha256(str(size).encode())
    places = random.Random(size)
    with open(file, "rb", buffering=0) as raw:
        digest.update(raw.read(_PIECE))
        if size > _PIECE:
            for place in sorted(places.randrange(_PIECE, size) for _ in range(_SAMPLES)):
                raw.seek(place)
                digest.update(raw.read(4096))
            raw.seek(max(_PIECE, size - _PIECE))
            digest.update(raw.read(_PIECE))
    return digest.hexdigest()


def _record_file(data_folder: Path, prefix: str) -> Path:
    return data_folder / RECORDS / f"{prefix}.json"


def lock_file(data_folder: Path, prefix: str) -> Path:
    """The lock of the pair `prefix`."""
    return data_folder / RECORDS / f"{prefix}.lock"


def remove_record(data_folder: Path, prefix: str) -> None:
    """Forget a file: its pair is about to change."""
    with suppress(FileNotFoundError):
        _record_file(data_folder, prefix).unlink()


def write_record(data_folder: Path, record: Record) -> None:
    """Record that a file is done."""
    content = {**vars(record), "recipe": vars(record.recipe)}
    atomic.write_text(_record_file(data_folder, record.prefix), _json(content) + "\n")


def _json(value: Any) -> str:
    """JSON on one line, which Python writes ten times as fast as JSON that is indented."""
    return json.dumps(value, ensure_ascii=False)


def read_record(data_folder: Path, prefix: str) -> Record | None:
    """The record of a file that is done, or None. One that cannot be read counts as none: the file is redone."""
    try:
        content = json.loads(_record_file(data_folder, prefix).read_text(encoding="utf-8"))
        return Record(**{**content, "recipe": Recipe(**content["recipe"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_records(data_folder: Path) -> list[Record]:
    """The records of every file that is done, those that data.input no longer names among them."""
    folder = data_folder / RECORDS
    prefixes = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.json"))
    return [record for record in answers(partial(read_record, data_folder), prefixes) if record]


def write_manifest(data_folder: Path, records: list[Record], patterns: list[str]) -> None:
    """Write manifest.json with its totals, for the globs of data.input and data.tokenized, and a line a record;
    they have one recipe."""
    totals = {
        key: sum(getattr(record, key) for record in records)
        for key in ("documents", "tokens", "text_bytes", "lines", "skipped", "blank")
    }
    content = {"input": patterns, "recipe": vars(records[0].recipe), "files": len(records), **totals}
    with atomic.atomic_file(data_folder / FILE_NAME) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write("{\n" + "".join(f"  {_json(key)}: {_json(value)},\n" for key, value in content.items()))
        file.write('  "records": [')
        for place, record in enumerate(records):
            described = {key: value for key, value in vars(record).items() if key != "recipe"}
            file.write(f"{',' if place else ''}\n    {_json(described)}")
        file.write("\n  ]\n}\n")


def read_manifest(data_folder: Path, patterns: list[str]) -> list[Record]:
    """The records of a complete data folder, made from the globs `patterns`.

    Raises:
        CptainError: no manifest, one that cannot be read, or one made from other globs.
    """
    file = data_folder / FILE_NAME
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if "recipe" not in content:
            raise CptainError(f"{file}: written by an earlier version of cptain: run preprocess again")
        if content["input"] != patterns:
            raise CptainError(
                f"{file}: made from data.input and data.tokenized = {json.dumps(content['input'])}: run preprocess "
                "again"
            )
        recipe = Recipe(**content["recipe"])
        records = [Record(**record, recipe=recipe) for record in content["records"]]
        if not records:
            raise ValueError("it has no records")
        return records
    except FileNotFoundError:
        raise CptainError(f"{file}: missing: the data is not ready; run preprocess first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CptainError(f"{file}: cannot be read: {one_line(error)}; run preprocess again") from error
