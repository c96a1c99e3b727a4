"""One input file → its .bin/.idx pair, as Megatron-LM's tools/preprocess_data.py --append-eod writes them.

A pair appears only when it is complete and every line of the file is accounted for. Whoever works on it holds its lock,
so that what another process left half-written there can be removed, whichever host it ran on.
"""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cptain.atomic import PARTIAL, atomic_file
from cptain.data.encode import Encoded, Encoding, encoded
from cptain.data.hashed_file import HashedFile
from cptain.data.in_use import refuse_if_in_use
from cptain.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from cptain.data.manifest import Record, lock_file, read_record, remove_record, write_record
from cptain.data.tokenizer import Tokenizer
from cptain.errors import CptainError
from cptain.lock import lock


@dataclass(frozen=True)
class Task:
    """One input file to tokenize.

    Attributes:
        record: its record before the work, with nothing counted yet.
        data_folder: where its pair goes.
        encoding: how it is encoded.
        force: do it again though it is done.
        begun: something half-written of its pair was there before the work began.
    """

    record: Record
    data_folder: Path
    encoding: Encoding
    force: bool
    begun: bool = False

    @property
    def pair(self) -> Path:
        """The pair, without .bin and .idx."""
        return self.data_folder / self.record.prefix

    def done(self) -> Record | None:
        """The record of the file where it is done and unchanged."""
        record = read_record(self.data_folder, self.record.prefix)
        if record and record.same_input(self.record) and not record.missing_output(self.data_folder):
            return record
        return None

    def refuse_if_taken(self) -> None:
        """Refuse to write a pair that a file of a run with other globs became meanwhile, or that a training reads.

        Raises:
            CptainError: which file, or who trains.
        """
        other = read_record(self.data_folder, self.record.prefix)
        if other and other.input != self.record.input:
            raise CptainError(f"{self.record.input}: {other.input} became {other.prefix} meanwhile: run it again")
        refuse_if_in_use(self.data_folder, [self.record.prefix])


def half_written(folder: Path) -> dict[Path, list[Path]]:
    """What processes that were killed have left in a folder, or some at work are writing, by pair.

    A folder of 20,000 pairs is listed once, not for each of them.
    """
    found: dict[Path, list[Path]] = {}
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            final, partial, _ = name.removeprefix(".").partition(PARTIAL)
            suffix = next((one for one in _SUFFIXES if final.endswith(one)), None)
            if name.startswith(".") and partial and suffix:
                found.setdefault(folder / final.removesuffix(suffix), []).append(folder / name)
    return found


_SUFFIXES = (".bin", ".idx", ".skipped.jsonl")

Read = Callable[[int, int], None]
"""Told, as a file is read, the bytes of it that were read and the tokens written since it was last called."""


def _through(task: Task, tokenizer: Tokenizer, cores: int, take: Callable[[Encoded], None], read: Read) -> Record:
    """Encode a whole file, give every block to `take`, and count; returns the record, without the pair's sizes."""
    file = Path(task.record.input)
    source = HashedFile(file)
    lines = documents = tokens = text_bytes = skipped = blank = 0
    for bytes_read, block in encoded(task.encoding.blocks(source), task.encoding, tokenizer, cores):
        take(block)
        lines += block.lines
        documents += len(block.documents.sequences)
        tokens += len(block.documents.ids)
        text_bytes += block.text_bytes
        skipped += len(block.bad)
        blank += block.blank
        read(bytes_read, len(block.documents.ids))
    stat = file.stat()
    if (stat.st_size, stat.st_mtime_ns) != (task.record.bytes, task.record.mtime_ns):
        raise CptainError(f"{file}: changed while it was read: run it again when nobody writes it")
    if lines != documents + skipped + blank:
        raise CptainError(
            f"{file}: {lines} lines became {documents} documents, {skipped} bad and {blank} blank lines: a defect of "
            "cptain"
        )
    return replace(
        task.record,
        sha256=source.hexdigest(),
        documents=documents,
        tokens=tokens,
        text_bytes=text_bytes,
        lines=lines,
        skipped=skipped,
        blank=blank,
    )


def count_file(task: Task, tokenizer: Tokenizer, cores: int, read: Read) -> Record:
    """Count a file's documents and tokens, and write nothing. Arguments and errors are those of `tokenize_file`."""
    return _through(task, tokenizer, cores, lambda block: None, read)


def tokenize_file(task: Task, tokenizer: Tokenizer, cores: int, read: Read) -> Record:
    """Tokenize one input file into its pair.

    Args:
        task: the file and where its pair goes.
        tokenizer: what encodes it.
        cores: that encode it.
        read: see `Read`.

    Returns:
        The file's record, already on disk.

    Raises:
        CptainError: a file that cannot be read, or a bad line where `on_error` is "fail"; no pair appears then. Or
            another process has it in hand.
    """
    pair, prefix = task.pair, task.record.prefix
    with lock(lock_file(task.data_folder, prefix), f"preprocess: {task.record.input}"):
        done = None if task.force else task.done()
        if done:  # by a process that held the lock until now
            read(done.bytes, 0)
            return done
        task.refuse_if_taken()
        pair.parent.mkdir(parents=True, exist_ok=True)
        for left in half_written(pair.parent).get(pair, ()) if task.begun else ():
            left.unlink(missing_ok=True)
        remove_record(task.data_folder, prefix)
        skipped_file = Path(f"{pair}.skipped.jsonl")
        with ExitStack() as stack:
            idx_partial = stack.enter_context(atomic_file(Path(f"{pair}.idx")))
            bin_partial = stack.enter_context(atomic_file(Path(f"{pair}.bin")))
            writer = IndexedDatasetWriter(bin_partial, token_dtype(tokenizer.vocab_size))
            stack.callback(writer.close)
            skipped = None

            def take(block: Encoded) -> None:
                nonlocal skipped
                writer.add(block.documents)
                if block.bad and skipped is None:
                    partial = stack.enter_context(atomic_file(skipped_file))
                    skipped = stack.enter_context(open(partial, "w", encoding="utf-8"))
                for bad in block.bad:
                    raw = bad.raw.decode("utf-8", "backslashreplace")
                    line = {"line": bad.line, "reason": bad.reason, "raw": raw}
                    assert skipped is not None
                    skipped.write(json.dumps(line, ensure_ascii=False) + "\n")

            record = _through(task, tokenizer, cores, take, read)
            writer.write_index(idx_partial)
            if skipped is None:
                skipped_file.unlink(missing_ok=True)
        record = replace(
            record, bin_bytes=Path(f"{pair}.bin").stat().st_size, idx_bytes=Path(f"{pair}.idx").stat().st_size
        )
        write_record(task.data_folder, record)
        return record
