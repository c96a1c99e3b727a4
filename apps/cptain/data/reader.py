"""Documents of .jsonl files, plain or compressed, one a line, in blocks of whole lines.

Python's gzip module and zstandard's stream reader stop differently, or not at all, at a file cut short; every format is
therefore decompressed here frame by frame, and a file that ends inside a frame is an error, never a shorter data set.
gzip is read with Intel's isal, three times as fast as zlib; JSON with orjson, and a block that it refuses with Python's
json, whose word counts: the two differ in NaN, lone surrogates and numbers beyond a double.
"""

import bz2
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import orjson
import zstandard
from isal import isal_zlib

from cptain.errors import CptainError, one_line

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz")
_READ = 1 << 18  # bytes of the file at once: few, because one compressed byte may become a thousand
_BLOCK = 8 << 20  # decompressed bytes, about, that are parsed and encoded together
_ERRORS: tuple[Any, ...] = (
    zlib.error,
    isal_zlib.error,
    zstandard.ZstdError,
    lzma.LZMAError,
    OSError,
    ValueError,
    EOFError,
)


@dataclass(frozen=True)
class Block:
    """Consecutive lines of a file.

    Attributes:
        first_line: the number of the first, from 1.
        lines: without their line ends.
        read: bytes of the file itself that were read for them.
    """

    first_line: int
    lines: list[bytes]
    read: int


@dataclass(frozen=True)
class BadLine:
    """A line that is no document.

    Attributes:
        line: its number in the file, from 1.
        reason: why it is none.
        raw: the line as it stands in the file, without its line end.
    """

    line: int
    reason: str
    raw: bytes


@dataclass(frozen=True)
class Documents:
    """The documents of a block.

    Attributes:
        texts: one for each sequence.
        sequences: of each document, how many of the texts are its own; None where each has one.
        lines: of each document, its line in the file; None where they follow one another from `first_line`.
        first_line: the line of the first document.
        bad: lines that are none.
        blank: how many lines are empty, or white space.
    """

    texts: list[str]
    sequences: list[int] | None
    lines: list[int] | None
    first_line: int
    bad: list[BadLine] = field(default_factory=list)
    blank: int = 0

    @property
    def count(self) -> int:
        """How many documents."""
        return len(self.texts) if self.sequences is None else len(self.sequences)

    def line(self, document: int) -> int:
        """The line of a document in the file."""
        return self.first_line + document if self.lines is None else self.lines[document]


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def stem(file: Path) -> str:
    """The file's name without .jsonl and what says how it is compressed."""
    return next(file.name.removesuffix(suffix) for suffix in reversed(SUFFIXES) if file.name.endswith(suffix))


def _new_decompressor(file: Path) -> _Decompressor | None:
    if file.name.endswith(".gz"):
        return isal_zlib.decompressobj(wbits=31)  # 31: gzip framing, checksum verified
    if file.name.endswith(".zst"):
        return zstandard.ZstdDecompressor().decompressobj()
    if file.name.endswith(".bz2"):
        return bz2.BZ2Decompressor()
    if file.name.endswith(".xz"):
        return lzma.LZMADecompressor()
    return None


def _decompressed(file: Path) -> Iterator[tuple[bytes, int]]:
    """Decompressed bytes, with the bytes of the file itself that were read for them."""
    with open(file, "rb", buffering=0) as raw:
        decompressor, inside, position = _new_decompressor(file), False, 0
        while chunk := raw.read(_READ):
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
                except _ERRORS as error:
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


def blocks(file: Path, max_line_bytes: int) -> Iterator[Block]:
    """Every line of `file`, in blocks.

    Args:
        file: the file; its name says how it is compressed.
        max_line_bytes: a longer line is an error: it would not fit in memory.

    Raises:
        CptainError: the file cannot be read, is corrupt or truncated, or a line is too long.
    """
    parts: list[bytes] = []
    size = read = 0
    line = 1
    try:
        for data, of_file in _decompressed(file):
            read += of_file
            if line == 1 and not size:
                data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            parts.append(data)
            size += len(data)
            if size > max_line_bytes and size > _BLOCK and b"\n" not in data:
                raise CptainError(
                    f"{file}:{line}: or a line soon after has over {max_line_bytes} bytes (data.max_document_bytes): "
                    "is there one line a document?"
                )
            if size < _BLOCK or b"\n" not in data:
                continue
            whole = b"".join(parts)
            end = whole.rfind(b"\n") + 1
            lines = whole[: end - 1].split(b"\n")
            yield Block(line, lines, read)
            line += len(lines)
            parts, size, read = [whole[end:]], len(whole) - end, 0
    except OSError as error:
        raise CptainError(f"{file}: cannot be read: {error.strerror}") from error
    whole = b"".join(parts)
    lines = whole.split(b"\n")
    if not lines[-1]:
        lines.pop()
    if lines or read:
        yield Block(line, lines, read)


def _text(line: bytes, key: str) -> tuple[list[str] | None, str]:
    """The texts of a line (several where the key holds a list), or None and the reason."""
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
    texts = value[key] if isinstance(value[key], list) else [value[key]]
    for text in texts:
        if not isinstance(text, str):
            inside = "in its list " if isinstance(value[key], list) else ""
            return None, f'"{key}" is not a string {inside}but {type(text).__name__}'
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return None, f'"{key}" holds a lone surrogate (character {error.start})'
    return texts, ""


def parse(block: Block, key: str, max_document_bytes: int, strip: bool = False) -> Documents:
    """The documents of a block.

    Args:
        block: the lines.
        key: of the text in each line's object. A list of strings is one document of several sequences.
        max_document_bytes: a longer line is a bad one.
        strip: cut white space off both ends of each text, and leave out what is empty then, as the lab's fork of
            Megatron-LM does.
    """
    fits = max(map(len, block.lines), default=0) <= max_document_bytes
    try:
        values = [orjson.loads(line)[key] for line in block.lines] if fits else None
    except (orjson.JSONDecodeError, KeyError, TypeError):
        values = None
    if values is not None and not strip and all(type(value) is str for value in values):
        return Documents(values, None, None, block.first_line)
    texts: list[str] = []
    sequences: list[int] = []
    lines: list[int] = []
    bad: list[BadLine] = []
    blank = 0
    for number, raw in enumerate(block.lines, block.first_line):
        line = raw.removesuffix(b"\r")
        if not line.strip():
            blank += 1
            continue
        if len(line) > max_document_bytes:
            found, reason = None, f"{len(line)} bytes, over data.max_document_bytes = {max_document_bytes}"
        else:
            found, reason = _text(line, key)
        if found is None:
            bad.append(BadLine(number, reason, line))
        else:
            if strip:
                found = [stripped for text in found if (stripped := text.strip())]
            texts += found
            sequences.append(len(found))
            lines.append(number)
    one_each = all(count == 1 for count in sequences)
    return Documents(texts, None if one_each else sequences, lines, block.first_line, bad, blank)
