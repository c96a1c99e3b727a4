"""Documents of .jsonl files, plain or compressed, one a line, and of parquet files, one a row, in blocks.

Python's gzip module and zstandard's stream reader stop differently, or not at all, at a file cut short; every format is
therefore decompressed here frame by frame, and a file that ends inside a frame is an error, never a shorter data set.
gzip is read with Intel's isal, three times as fast as zlib; JSON with orjson, and a block that it refuses with Python's
json, whose word counts: the two differ in NaN, lone surrogates and numbers beyond a double.
"""

import bz2
import json
import lzma
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
import zstandard
from isal import isal_zlib

from cptain.data.hashed_file import HashedFile
from cptain.errors import CptainError, one_line

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".parquet")
_READ = 1 << 18  # bytes of the file at once, where they are compressed; else four times as many
_PIECE = 1 << 12  # of those, decompressed at once: few, because zstd may make 30,000 bytes of one
_BLOCK = 8 << 20  # decompressed bytes, about, that are parsed and encoded together
_LARGEST_WINDOW = 1 << 31  # of zstd: the format's on 64 bits (--long=31); memory is taken as a frame asks for it
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
    """Consecutive lines of a file, or rows.

    Attributes:
        first_line: the number of the first, from 1.
        count: how many.
        content: the lines, without the last one's line end, good until the next block is asked for; or a list of what
            the rows hold under the key.
        read: bytes of the file itself that were read for them.
    """

    first_line: int
    count: int
    content: bytes | memoryview | list[Any]
    read: int


@dataclass(frozen=True)
class BadLine:
    """A line that is no document.

    Attributes:
        line: its number in the file, from 1.
        reason: why it is none.
        raw: the line as it stands in the file, without its line end; the value of a row as JSON.
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

    def of_text(self, text: int) -> int:
        """The document that a text belongs to."""
        return text if self.sequences is None else bisect_right(list(accumulate(self.sequences)), text)

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
    name = file.name
    return next(name.removesuffix(suffix) for suffix in reversed(SUFFIXES) if name.endswith(suffix))


def _new_decompressor(file: Path) -> _Decompressor | None:
    if file.name.endswith(".gz"):
        return isal_zlib.decompressobj(wbits=31)  # 31: gzip framing, checksum verified
    if file.name.endswith(".zst"):
        return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
    if file.name.endswith(".bz2"):
        return bz2.BZ2Decompressor()
    if file.name.endswith(".xz"):
        return lzma.LZMADecompressor()
    return None


def _check_padding(file: Path, position: int, zeros: int, frames: int) -> None:
    """Refuse zero bytes before a frame, which a disk leaves where it lost data; .xz alone has them between streams, by
    fours (The .xz File Format, 2.2)."""
    if zeros and not (file.suffix == ".xz" and frames and zeros % 4 == 0):
        raise CptainError(
            f"{file}: corrupt: {zeros} zero bytes before byte {position}, where a compressed frame begins"
        )


def _decompressed(source: HashedFile) -> Iterator[tuple[bytes | memoryview, int]]:
    """Decompressed bytes, good until the next, with the bytes of the file itself that were read for them."""
    file = source.file
    decompressor, inside, position = _new_decompressor(file), False, 0
    zeros = frames = 0
    for chunk in source.chunks(_READ if decompressor else 4 * _READ):
        if decompressor is None:
            yield chunk, len(chunk)
            continue
        for start in range(0, len(chunk), _PIECE):
            piece = bytes(chunk[start : start + _PIECE])
            length = untold = len(piece)
            while piece:
                if not inside:
                    bare = piece.lstrip(b"\0")
                    zeros += len(piece) - len(bare)
                    if not (piece := bare):
                        break  # zero padding behind the last frame, as tar and tape leave it
                    _check_padding(file, position + length - len(piece), zeros, frames)
                inside, zeros = True, 0
                try:
                    out = decompressor.decompress(piece)
                except _ERRORS as error:
                    raise CptainError(
                        f"{file}: corrupt at byte {position + length - len(piece)} or after: {one_line(error)}"
                    ) from error
                yield out, untold
                untold = 0
                if not decompressor.eof:
                    break
                piece, frames = decompressor.unused_data, frames + 1
                decompressor, inside = _new_decompressor(file) or decompressor, False
            position += length
            if untold:
                yield b"", untold
    if inside:
        raise CptainError(f"{file}: truncated: the file ends at byte {position}, inside a compressed frame")


def blocks(source: HashedFile, key: str, max_line_bytes: int) -> Iterator[Block]:
    """Every line or row of a file, in blocks.

    Args:
        source: the file; its name says what it is.
        key: of the texts: a parquet file's column. The lines of a .jsonl file come whole.
        max_line_bytes: a longer line is an error: it would not fit in memory.

    Raises:
        CptainError: the file cannot be read, is corrupt or truncated, has no such column, or a line is too long.
    """
    try:
        yield from _rows(source, key) if source.file.suffix == ".parquet" else _line_blocks(source, max_line_bytes)
    except OSError as error:
        raise CptainError(f"{source.file}: cannot be read: {error.strerror or one_line(error)}") from error


def _line_blocks(source: HashedFile, max_line_bytes: int) -> Iterator[Block]:
    held, size, read, line, unended = bytearray(2 * _BLOCK), 0, 0, 1, 0
    for data, of_file in _decompressed(source):
        begins, size, read = size, size + len(data), read + of_file
        if size > len(held):  # a new one, since somebody may still look at the last block
            held = held[:begins] + bytearray(size)
        held[begins:size] = data
        end = held.rfind(b"\n", begins, size)
        unended = size - 1 - end if end >= 0 else unended + len(data)
        if unended > max(max_line_bytes, _BLOCK):
            raise CptainError(
                f"{source.file}:{line + _line_ends(held, 0, size)}: over {max_line_bytes} bytes "
                "(data.max_document_bytes), and its end is not in sight: is there one line a document?"
            )
        if size < _BLOCK or end < 0:
            continue
        start = _mark(held) if line == 1 else 0
        block = Block(line, _line_ends(held, start, end + 1), memoryview(held)[start:end], read)
        yield block
        left = held[end + 1 : size]
        held = bytearray(2 * _BLOCK) if len(held) > 4 * _BLOCK else held
        held[: len(left)] = left
        size, read, line = len(left), 0, line + block.count
    whole = bytes(held[_mark(held) if line == 1 else 0 : size])
    if whole or read:
        count = whole.count(b"\n") + (len(whole) > 0 and whole[-1:] != b"\n")
        yield Block(line, count, whole.removesuffix(b"\n"), read)


def _line_ends(held: bytearray, start: int, end: int) -> int:
    """How many, which bytes.count tells at a quarter of the speed: one process does this for all that share a file's
    blocks."""
    return int(np.count_nonzero(np.frombuffer(held, np.uint8)[start:end] == 10))


def _mark(held: bytearray) -> int:
    """The length of the byte order mark that a file may begin with."""
    return 3 if held.startswith(b"\xef\xbb\xbf") else 0


def _rows(source: HashedFile, key: str) -> Iterator[Block]:
    file = source.file
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CptainError(f"{file}: reading it needs pyarrow: pip install 'cptain[parquet]'") from None
    for _ in source.chunks(_BLOCK):
        pass
    size, row, read = file.stat().st_size, 1, 0
    try:
        with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
            if key not in table.schema_arrow.names:
                raise CptainError(f'{file}: no column "{key}" (data.key): it has {", ".join(table.schema_arrow.names)}')
            if table.schema_arrow.names.count(key) > 1:
                raise CptainError(f'{file}: two columns "{key}" (data.key): which is meant cannot be said: rename one')
            rows = max(1, table.metadata.num_rows)
            groups = range(table.metadata.num_row_groups)
            total = sum(table.metadata.row_group(group).total_byte_size for group in groups)
            for batch in table.iter_batches(max(1, min(1 << 16, _BLOCK * rows // max(1, total))), columns=[key]):
                count = len(batch)
                row += count
                upto = size * (row - 1) // rows
                yield Block(row - count, count, _values(batch.column(0)), upto - read)
                read = upto
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's word, not pyarrow's
            raise
        raise CptainError(f"{file}: corrupt, or no parquet file: {one_line(error)}") from error
    if row - 1 != table.metadata.num_rows:
        raise CptainError(f"{file}: {row - 1} rows, where its footer says {table.metadata.num_rows}")


def _values(column: Any) -> list[Any]:
    """What a column of a batch holds; bytes for a string that is not UTF-8."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


Found = tuple[list[str] | None, str]  # the texts, several where the key holds a list; or None and the reason


def _too_long(size: int, limit: int) -> Found:
    return None, f"{size} bytes, over data.max_document_bytes = {limit}"


def _of_line(line: bytes, key: str, limit: int) -> Found:
    """The texts of a line."""
    if len(line) > limit:
        return _too_long(len(line), limit)
    try:
        # Decoded here, because json takes bytes for UTF-16 where they look like it; and an integer of over 4300 digits,
        # which Python would refuse, is nothing that anyone looks at.
        value: Any = json.loads(line.decode("utf-8-sig"), parse_int=lambda digits: 0)
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start} of the line)"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {one_line(error)}"
    if not isinstance(value, dict):
        return None, f"not a JSON object but {type(value).__name__}"
    if key not in value:
        return None, f'no key "{key}"'
    return _strings(value[key], key)


def _of_row(value: Any, key: str, limit: int) -> Found:
    """The texts of what a row holds in the column."""
    if isinstance(value, bytes):  # as some programs write their text
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None, f'"{key}" is not UTF-8'
    texts, reason = _strings(value, key)
    size = sum(len(text.encode()) for text in texts or ())
    return _too_long(size, limit) if size > limit else (texts, reason)


def _strings(value: Any, key: str) -> Found:
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            inside = "in its list " if isinstance(value, list) else ""
            return None, f'"{key}" is not a string {inside}but {type(text).__name__}'
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return None, f'"{key}" holds a lone surrogate (character {error.start})'
    return texts, ""


def _at_once(block: Block, content: list[Any], key: str, limit: int) -> list[str] | None:
    """The texts of a block in which every line or row is one string, or None."""
    if isinstance(block.content, list):
        values, limit = content, limit // 4  # a character has at most four bytes
        fits = all(type(value) is str and len(value) <= limit for value in values)
        return values if fits else None
    if max(map(len, content), default=0) > limit:
        return None
    try:
        values = [orjson.loads(line)[key] for line in content]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return values if all(type(value) is str for value in values) else None


def parse(block: Block, key: str, max_document_bytes: int, strip: bool = False) -> Documents:
    """The documents of a block.

    Args:
        block: the lines or rows.
        key: of the text in each line's object. A list of strings is one document of several sequences.
        max_document_bytes: a longer line is a bad one.
        strip: cut white space off both ends of each text, and leave out what is empty then, as the lab's fork of
            Megatron-LM does.
    """
    rows = isinstance(block.content, list)
    content: list[Any] = block.content if isinstance(block.content, list) else bytes(block.content).split(b"\n")
    content = content[: block.count]  # of no byte at all, split makes one line
    texts = None if strip else _at_once(block, content, key, max_document_bytes)
    if texts is not None:
        return Documents(texts, None, None, block.first_line)
    texts = []
    sequences: list[int] = []
    lines: list[int] = []
    bad: list[BadLine] = []
    blank = 0
    for number, item in enumerate(content, block.first_line):
        if not rows:
            item = item.removesuffix(b"\r")
            if not item.strip():
                blank += 1
                continue
        found, reason = (_of_row if rows else _of_line)(item, key, max_document_bytes)
        if found is None:
            raw = item if isinstance(item, bytes) else json.dumps(item, ensure_ascii=False, default=str).encode()
            bad.append(BadLine(number, reason, raw))
        else:
            if strip:
                found = [stripped for text in found if (stripped := text.strip())]
            texts += found
            sequences.append(len(found))
            lines.append(number)
    one_each = all(count == 1 for count in sequences)
    return Documents(texts, None if one_each else sequences, lines, block.first_line, bad, blank)
