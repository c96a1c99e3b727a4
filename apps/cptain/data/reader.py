"""Documents of .jsonl, .jsonl.gz and .jsonl.zst files, one a line, each with its line number.

Python's gzip module and zstandard's stream reader stop differently, or not at all, at a file cut short; both formats
are therefore decompressed here frame by frame, and a file that ends inside a frame is an error, never a shorter data
set.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zstandard

from cptain.errors import CptainError, one_line

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Document:
    """One line of an input file.

    Attributes:
        line: its number, from 1.
        text: the text, or None where the line is bad.
        reason: why the line is bad, else "".
        raw: the line as it stands in the file, without its line end.
    """

    line: int
    text: str | None
    reason: str
    raw: bytes


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def stem(file: Path) -> str:
    """The file's name without .jsonl, .jsonl.gz or .jsonl.zst."""
    return next(file.name.removesuffix(suffix) for suffix in reversed(SUFFIXES) if file.name.endswith(suffix))


def _new_decompressor(file: Path) -> _Decompressor | None:
    if file.name.endswith(".gz"):
        return zlib.decompressobj(wbits=31)  # 31: gzip framing, checksum verified
    if file.name.endswith(".zst"):
        return zstandard.ZstdDecompressor().decompressobj()
    return None


def _blocks(file: Path) -> Iterator[tuple[bytes, int]]:
    """Decompressed bytes, with the bytes of the file itself that were read for them."""
    with open(file, "rb", buffering=0) as raw:
        decompressor, inside, position = _new_decompressor(file), False, 0
        while chunk := raw.read(_CHUNK):
            size = len(chunk)
            if decompressor is None:
                yield chunk, size
                continue
            out = []
            while chunk:
                if not inside and not chunk.strip(b"\0"):
                    break  # zero padding behind the last frame, as tar and tape leave it
                inside = True
                try:
                    out.append(decompressor.decompress(chunk))
                except (zlib.error, zstandard.ZstdError) as error:
                    raise CptainError(
                        f"{file}: corrupt at byte {position + size - len(chunk)} or after: {one_line(error)}"
                    ) from error
                if not decompressor.eof:
                    break
                chunk = decompressor.unused_data
                decompressor, inside = _new_decompressor(file) or decompressor, False
            position += size
            yield b"".join(out), size
        if inside:
            raise CptainError(f"{file}: truncated: the file ends at byte {position}, inside a compressed frame")


def _lines(file: Path) -> Iterator[tuple[bytes, int]]:
    """Lines without their \\n, with the bytes of the file read since the line before."""
    tail: list[bytes] = []
    read = 0
    for block, size in _blocks(file):
        read += size
        *complete, last = block.split(b"\n")
        for line in complete:
            yield b"".join((*tail, line)) if tail else line, read
            tail, read = [], 0
        if last:
            tail.append(last)
    if tail or read:
        yield b"".join(tail), read


def _parse(line: bytes, key: str) -> tuple[str | None, str]:
    """The text, or None and the reason."""
    try:
        value: Any = json.loads(line)
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start} of the line)"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {one_line(error)}"
    if not isinstance(value, dict):
        return None, f"not a JSON object but {type(value).__name__}"
    if key not in value:
        return None, f'no key "{key}"'
    text = value[key]
    if not isinstance(text, str):
        return None, f'"{key}" is not a string but {type(text).__name__}'
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return None, f'"{key}" holds a lone surrogate (character {error.start})'
    return text, ""


def documents(file: Path, key: str) -> Iterator[tuple[Document, int]]:
    """Every line of `file` that is not blank, as a document, with the bytes of the file read for it.

    Raises:
        CptainError: the file cannot be read, is corrupt or truncated.
    """
    try:
        for number, (line, read) in enumerate(_lines(file), start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            line = line.removesuffix(b"\r")
            if line.strip():
                text, reason = _parse(line, key)
                yield Document(number, text, reason, line), read
    except OSError as error:
        raise CptainError(f"{file}: cannot be read: {error.strerror}") from error
