"""data.tokenized: .bin/.idx pairs that are there already, checked once and trained on where they lie.

A pair is read whole, some MB at a time: its hash, whether every id is one of the tokenizer's, and which documents lack
the end-of-document token, come from one pass. Its record has the pair's path in the place of a path under the data
folder, so that everything that reads a manifest finds it. What is refused here would be a crash or, worse, other text
in a training: Megatron itself looks at the first 9 bytes of an .idx file and believes the rest.
"""

import glob
import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cptain import atomic
from cptain.data.indexed_dataset import MAGIC
from cptain.data.inputs import every_folder_opens
from cptain.data.manifest import RECORDS, Record, fingerprint
from cptain.data.many_files import answers
from cptain.data.recipe import Recipe, recipe
from cptain.data.split import DTYPES, HEADER, HEADER_BYTES
from cptain.data.tokenizer import TokenizerFacts
from cptain.errors import CptainError, one_line
from cptain.progress import Progress
from cptain.run_file import RunFile
from cptain.summary import say

_KEY = "data.tokenized"
_FOLDER = ".tokenized"  # of the data folder: what was found out about pairs
_AT_ONCE = 16 << 20  # bytes of a .bin file: a thread's memory, beside 20 bytes a sequence


def find_pairs(patterns: list[str]) -> list[Path]:
    """The pairs that globs match, without .bin and .idx; a pattern without a wildcard is one pair.

    Raises:
        CptainError: a pattern that matches none, a file of a pair without the other, or one pair under two names.
        OSError: a folder that cannot be listed.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        every_folder_opens(pattern)
        if Path(pattern).name == "**":  # what glob takes for a * where a suffix follows
            pattern += "/*"
        ends = {end: glob.glob(f"{pattern}{end}", recursive=True) for end in (".bin", ".idx")}
        pairs = sorted({Path(file.removesuffix(end)) for end, files in ends.items() for file in files})
        if not pairs:
            hint = f": it is a folder: write {pattern}/**/*" if Path(pattern).is_dir() else ""
            raise CptainError(f"{_KEY}: {pattern} matches no .bin and .idx file{hint}")
        found.update(dict.fromkeys(pairs))
    real: dict[str, Path] = {}
    for pair in sorted(found):
        try:
            str(pair).encode()
        except UnicodeEncodeError:
            raise CptainError(f"{_KEY}: {os.fsencode(pair)!r}: a name that is not UTF-8: rename it") from None
        for end, other in ((".bin", ".idx"), (".idx", ".bin")):
            if not Path(f"{pair}{end}").is_file():
                raise CptainError(f"{_KEY}: {pair}{end}: no such file, and {pair.name}{other} belongs to it")
        if (first := real.setdefault(os.path.realpath(f"{pair}.bin"), pair)) != pair:
            raise CptainError(f"{_KEY}: {first} and {pair} are one pair: take one name away")
    return sorted(found)


def folders_of_pairs(run: RunFile) -> list[Path]:
    """The data folders of other runs that pairs of a run lie in, whose own preprocess may make them anew."""
    parents = {pair.parent for pair in find_pairs(run.data.tokenized)}
    above = {folder for parent in parents for folder in (parent, *parent.parents)}
    return sorted(folder for folder in above if (folder / RECORDS).is_dir())


def pair_fingerprint(pair: Path) -> str:
    """`cptain.data.manifest.fingerprint` of both files."""
    files = [Path(f"{pair}{end}") for end in (".bin", ".idx")]
    return hashlib.sha256("".join(fingerprint(file, file.stat().st_size) for file in files).encode()).hexdigest()


def changed_pair(record: Record) -> str | None:
    """What is wrong with a pair since it was checked: for training, which reads no whole file before it starts."""
    if pair_fingerprint(Path(record.prefix)) != record.fingerprint:
        return f"{_KEY}: {record.prefix}: not what it was when preprocess checked it"
    return None


@dataclass(frozen=True)
class Pair:
    """A pair to check.

    Attributes:
        record: its record before, with nothing counted yet.
        data_folder: of the run.
        facts: of the tokenizer that its ids should be of.
    """

    record: Record
    data_folder: Path
    facts: TokenizerFacts

    @property
    def _file(self) -> Path:
        name = hashlib.sha256(self.record.prefix.encode()).hexdigest()[:16]
        return self.data_folder / _FOLDER / f"{name}.json"

    def done(self) -> Record | None:
        """The pair's record, where it was checked with this tokenizer and is unchanged."""
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            record = Record(**{**content, "recipe": Recipe(**content["recipe"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None
        # The other options of a recipe are of text.
        if record.recipe.tokenizer != self.record.recipe.tokenizer:
            return None
        record = replace(record, recipe=self.record.recipe)
        unchanged = record.same_input(self.record) and not record.missing_output(self.data_folder)
        return record if unchanged else None

    def keep(self, record: Record) -> None:
        """Record that it was checked."""
        atomic.write_json(self._file, asdict(record))


def tokenized_pairs(run: RunFile, facts: TokenizerFacts) -> list[Pair]:
    """The pairs of a run.

    Raises:
        CptainError: see `find_pairs`; or a pair lies in the run's own data folder.
    """
    made = recipe(run, facts)
    own = os.path.realpath(run.data_folder)

    def pair(prefix: Path) -> Pair:
        if Path(os.path.realpath(f"{prefix}.bin")).is_relative_to(own):
            raise CptainError(f"{_KEY}: {prefix} lies in {run.data_folder}, where preprocess writes: move it elsewhere")
        stat = os.stat(f"{prefix}.bin")
        record = Record(str(prefix), str(prefix), stat.st_size, stat.st_mtime_ns, pair_fingerprint(prefix), recipe=made)
        return Pair(record, run.data_folder, facts)

    return list(answers(pair, find_pairs(run.data.tokenized)))


def check_pairs(
    pairs: list[Pair], workers: int, force: bool = False, whole: bool = False, keep: bool = True
) -> tuple[list[Record], int]:
    """Check pairs that were not, a thread a pair: reading, hashing and comparing all let other threads run.

    Args:
        pairs: which.
        workers: threads.
        force: check again what was checked.
        whole: the same, and say where the content changed though size and date did not.
        keep: the record of what was checked.

    Returns:
        Their records, and how many were read.

    Raises:
        CptainError: a pair that cannot be trained on with this tokenizer; names file and reason.
    """
    known = {pair.record.prefix: None if force else pair.done() for pair in pairs}
    if unchanged := sum(record is not None for record in known.values()):
        say(f"preprocess: {unchanged} of {len(pairs)} pairs are checked and unchanged", pairs_were_checked=unchanged)
    todo = [pair for pair in pairs if whole or known[pair.record.prefix] is None]
    if not todo:
        return [record for record in known.values() if record], 0
    with (
        Progress("check tokenized", sum(pair.record.bytes for pair in todo), "B") as progress,
        ThreadPoolExecutor(workers) as pool,
    ):

        def check(pair: Pair) -> Record:
            record = _check(pair, lambda count: progress.advance(count, pair.record.prefix))
            before = known[record.prefix]
            if before and before.sha256 != record.sha256:
                progress.say(f"preprocess: {record.prefix}: its content changed, though size and date did not")
            if keep:
                pair.keep(record)
            return record

        for record in pool.map(check, todo):
            known[record.prefix] = record
    records = [record for record in known.values() if record]
    for record in records:
        _say_of(record)
    return records, len(todo)


def _say_of(record: Record) -> None:
    if record.without_eod:
        share = record.without_eod / record.documents
        print(
            f"preprocess: {record.prefix}: {record.without_eod:,} of {record.documents:,} documents ({share:.1%}) do "
            "not end with the tokenizer's end-of-document token",
            file=sys.stderr,
        )


def _refuse(file: str, reason: str) -> CptainError:
    return CptainError(f"{_KEY}: {file}: {reason}")


def _read_index(file: str) -> tuple[np.dtype[Any], npt.NDArray[np.int64], npt.NDArray[np.int64], bytes]:
    """The dtype of ids, where each sequence ends in ids, the sequence numbers of document boundaries, and a SHA-256."""
    with open(file, "rb") as raw:
        content = raw.read()
    if len(content) < HEADER_BYTES or not content.startswith(MAGIC):
        raise _refuse(file, "no index of a Megatron indexed dataset: it does not begin with MMIDIDX")
    _, version, code, sequences, boundaries = struct.unpack_from(HEADER, content)
    if version != 1:
        raise _refuse(file, f"version {version}, and 1 is the only one that Megatron reads")
    if code not in DTYPES:
        raise _refuse(file, f"dtype code {code}: supported are 4 (int32) and 8 (uint16)")
    size = HEADER_BYTES + 12 * sequences + 8 * boundaries
    if len(content) != size:
        raise _refuse(
            file, f"{len(content)} bytes, where {sequences:,} sequences and {boundaries:,} bounds need {size}"
        )
    lengths = np.frombuffer(content, "<i4", sequences, HEADER_BYTES)
    offsets = np.frombuffer(content, "<i8", sequences, HEADER_BYTES + 4 * sequences)
    bounds = np.frombuffer(content, "<i8", boundaries, HEADER_BYTES + 12 * sequences)
    if sequences and lengths.min() < 0:
        raise _refuse(file, "a sequence of negative length")
    ends = np.cumsum(lengths, dtype=np.int64)
    if not np.array_equal(offsets, (ends - lengths) * DTYPES[code].itemsize):
        raise _refuse(file, "its sequences do not lie one after another in the .bin file")
    if not boundaries or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise _refuse(file, f"its document boundaries do not run from 0 up to {sequences:,}, its sequences")
    return DTYPES[code], ends, bounds, hashlib.sha256(content).digest()


def _check(pair: Pair, read: Callable[[int], None]) -> Record:
    """Read a pair whole. Errors are those of `check_pairs`."""
    index, binary = (f"{pair.record.prefix}{end}" for end in (".idx", ".bin"))
    try:
        dtype, ends, bounds, of_index = _read_index(index)
        tokens = int(ends[-1]) if len(ends) else 0
        if (size := os.path.getsize(binary)) != tokens * dtype.itemsize:
            raise _refuse(binary, f"{size} bytes, where its .idx file needs {tokens * dtype.itemsize}")
        starts = np.concatenate([[0], ends])[bounds]
        of_documents = starts[1:][np.diff(starts) > 0]  # where each that has ids ends
        digest, without, over, farthest = _scan(binary, dtype, of_documents, pair.facts, read)
        stat = os.stat(binary)
        digest.update(of_index)
    except OSError as error:
        raise _refuse(error.filename or pair.record.prefix, f"cannot be read: {one_line(error)}") from error
    if over:
        raise _refuse(
            binary,
            f"{over:,} of its {tokens:,} ids are none of the tokenizer's {pair.facts.size:,} (the farthest is "
            f"{farthest}): it was made with another tokenizer",
        )
    if (stat.st_size, stat.st_mtime_ns) != (pair.record.bytes, pair.record.mtime_ns):
        raise _refuse(binary, "changed while it was read: run it again when nobody writes it")
    documents = len(bounds) - 1
    return replace(
        pair.record,
        sha256=digest.hexdigest(),
        documents=documents,
        tokens=tokens,
        lines=documents,
        bin_bytes=size,
        idx_bytes=os.path.getsize(index),
        without_eod=without,
    )


def _scan(
    file: str, dtype: np.dtype[Any], ends: npt.NDArray[np.int64], facts: TokenizerFacts, read: Callable[[int], None]
) -> tuple[Any, int, int, int]:
    """A .bin file's SHA-256 under way, how many of the documents that end at `ends` lack EOD, how many ids are none of
    the tokenizer's, and the farthest of those."""
    digest, at, without, over, farthest = hashlib.sha256(), 0, 0, 0, 0
    with open(file, "rb", buffering=0) as raw:
        while len(ids := np.fromfile(raw, dtype, _AT_ONCE // dtype.itemsize)):
            digest.update(ids.data)
            lowest, highest = int(ids.min()), int(ids.max())
            if lowest < 0 or highest >= facts.size:
                over += int(np.count_nonzero((ids < 0) | (ids >= facts.size)))
                farthest = max(farthest, highest) if highest >= facts.size else farthest or lowest
            first, stop = np.searchsorted(ends, (at + 1, at + len(ids) + 1))
            without += int(np.count_nonzero(ids[ends[first:stop] - 1 - at] != facts.eos))
            at += len(ids)
            read(ids.nbytes)
    return digest, without, over, farthest
