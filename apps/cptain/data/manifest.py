"""data/manifest.json: what every input file became.

A file's own record is written to data/.records/ the moment its .bin and .idx are in place, so that several processes
can share a data folder and a killed run loses only the files in hand; manifest.json is put together from the records
once none is missing.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cptain import atomic
from cptain.errors import CptainError, one_line

FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class Record:
    """One input file and the pair made of it.

    Attributes:
        input: the input file.
        prefix: the pair's path under the data folder, without .bin and .idx.
        bytes: size of the input file.
        mtime_ns: modification time of the input file, nanoseconds since the epoch.
        key: the key of the texts.
        on_error: what was done with bad lines.
        strip: whether white space was cut off the texts.
        tokenizer: hash of the tokenizer (`cptain.data.tokenizer.tokenizer_hash`).
        documents: documents written.
        tokens: ids written, BOS and EOD included.
        lines: of the input file; each is a document, skipped or blank.
        skipped: bad lines, kept in <prefix>.skipped.jsonl.
        blank: lines of white space.
        bin_bytes: size of the .bin file.
        idx_bytes: size of the .idx file.
    """

    input: str
    prefix: str
    bytes: int
    mtime_ns: int
    key: str
    on_error: str
    strip: bool
    tokenizer: str
    documents: int
    tokens: int
    lines: int
    skipped: int
    blank: int
    bin_bytes: int
    idx_bytes: int

    def same_input(self, other: "Record") -> bool:
        """Whether both describe the same work: file, options and tokenizer."""
        keys = ("input", "prefix", "bytes", "mtime_ns", "key", "on_error", "strip", "tokenizer")
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    def missing_output(self, data_folder: Path) -> str | None:
        """What is wrong with the pair on disk, or None where it is as recorded."""
        for suffix, size in ((".bin", self.bin_bytes), (".idx", self.idx_bytes)):
            file = data_folder / (self.prefix + suffix)
            if not file.is_file():
                return f"{file}: missing"
            if file.stat().st_size != size:
                return f"{file}: {file.stat().st_size} bytes where the manifest has {size}"
        return None


def _record_file(data_folder: Path, prefix: str) -> Path:
    return data_folder / ".records" / f"{prefix}.json"


def write_record(data_folder: Path, record: Record) -> None:
    """Record that a file is done."""
    atomic.write_json(_record_file(data_folder, record.prefix), asdict(record))


def read_record(data_folder: Path, prefix: str) -> Record | None:
    """The record of a file that is done, or None. One that cannot be read counts as none: the file is redone."""
    try:
        return Record(**json.loads(_record_file(data_folder, prefix).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_manifest(data_folder: Path, records: list[Record], patterns: list[str]) -> None:
    """Write manifest.json with its totals, for the globs of data.input."""
    totals = {
        key: sum(getattr(record, key) for record in records)
        for key in ("documents", "tokens", "lines", "skipped", "blank")
    }
    content = {"input": patterns, "files": len(records), **totals, "records": [asdict(record) for record in records]}
    atomic.write_json(data_folder / FILE_NAME, content)


def read_manifest(data_folder: Path, patterns: list[str]) -> list[Record]:
    """The records of a complete data folder, made from the globs `patterns`.

    Raises:
        CptainError: no manifest, one that cannot be read, or one made from other globs.
    """
    file = data_folder / FILE_NAME
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if content["input"] != patterns:
            raise CptainError(f"{file}: made from data.input = {json.dumps(content['input'])}: run preprocess again")
        return [Record(**record) for record in content["records"]]
    except FileNotFoundError:
        raise CptainError(f"{file}: missing: the data is not ready; run preprocess first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CptainError(f"{file}: cannot be read: {one_line(error)}; run preprocess again") from error
