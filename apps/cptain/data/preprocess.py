"""preprocess: input files → one .bin/.idx pair each, as Megatron-LM's tools/preprocess_data.py --append-eod writes
them.

Files are the unit of work: each is tokenized by one process, and its pair appears only when it is complete. What is
complete and unchanged is skipped by a later run.
"""

import glob
import heapq
import json
import math
import multiprocessing
import os
import random
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cptain.atomic import atomic_file, remove_stale_partials
from cptain.data import reader
from cptain.data.indexed_dataset import EncodedDocuments, IndexedDatasetWriter, token_dtype, with_eod
from cptain.data.manifest import FILE_NAME, Record, read_record, write_manifest, write_record
from cptain.data.tokenizer import Tokenizer
from cptain.errors import CptainError, Interrupted
from cptain.progress import Progress, human
from cptain.run_file import RunFile

_WILDCARD = ("*", "?", "[")


@dataclass(frozen=True)
class _Task:
    """One input file to tokenize: its record before the work, with nothing counted yet."""

    record: Record
    data_folder: Path
    check_fraction: float
    max_document_bytes: int


def _fixed_part(pattern: str) -> Path:
    """The folder of a glob before its first wildcard."""
    parts = Path(pattern).parts
    wild = next((place for place, part in enumerate(parts) if any(sign in part for sign in _WILDCARD)), len(parts) - 1)
    return Path(*parts[:wild])


def input_files(patterns: list[str]) -> dict[str, Path]:
    """The files that the globs match, by the path their pair gets: folders kept below the globs' common folder, suffix
    cut.

    Raises:
        CptainError: a glob that matches nothing, or two files with one name for their pairs.
    """
    matched: dict[Path, None] = {}
    for pattern in patterns:
        files = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
        wanted = [file for file in files if file.is_file() and file.name.endswith(reader.SUFFIXES)]
        if not wanted:
            other = f" ({len(files)} other files)" if files else ""
            raise CptainError(f"data.input: {pattern} matches no {', '.join(reader.SUFFIXES)} file{other}")
        matched.update(dict.fromkeys(wanted))
    root = Path(os.path.commonpath([_fixed_part(pattern) for pattern in patterns]))
    by_name: dict[str, Path] = {}
    for file in sorted(matched):
        name = str(file.relative_to(root).with_name(reader.stem(file)))
        if name in by_name:
            raise CptainError(f"data.input: {by_name[name]} and {file} would both become {name}: rename one")
        by_name[name] = file
    return by_name


def _tasks(run: RunFile, tokenizer: Tokenizer) -> list[_Task]:
    tasks = []
    for name, file in input_files(run.data.input).items():
        stat = file.stat()
        record = Record(
            input=str(file),
            prefix=f"{name}_{run.data.key}_document",
            bytes=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            key=run.data.key,
            on_error=run.data.on_error,
            strip=run.data.strip,
            tokenizer=tokenizer.hash,
            documents=0,
            tokens=0,
            lines=0,
            skipped=0,
            blank=0,
            bin_bytes=0,
            idx_bytes=0,
        )
        tasks.append(_Task(record, run.data_folder, run.data.check_fraction, run.data.max_document_bytes))
    return tasks


def _encode(task: _Task, block: reader.Block, tokenizer: Tokenizer) -> tuple[reader.Documents, EncodedDocuments]:
    """Parse and encode a block, and compare a sample of it with Hugging Face's own ids."""
    documents = reader.parse(block, task.record.key, task.max_document_bytes, task.record.strip)
    if documents.bad and task.record.on_error == "fail":
        bad = documents.bad[0]
        raise CptainError(f'{task.record.input}:{bad.line}: {bad.reason} (data.on_error = "skip" goes on without)')
    ids, lengths = tokenizer.encode(documents.texts)
    sample = random.Random(block.first_line)  # the same documents at every run
    count = len(documents.texts)
    for place in sample.sample(range(count), min(count, math.ceil(count * task.check_fraction))):
        end = int(lengths[: place + 1].sum())
        if not tokenizer.check(documents.texts[place], ids[end - int(lengths[place]) : end]):
            line = documents.line(place) if documents.sequences is None else block.first_line
            raise CptainError(
                f"{task.record.input}:{line}: {tokenizer.backend} gives other ids than Hugging Face here "
                "(--backend hf is slower and exact; please tell us of it)"
            )
    dtype = token_dtype(tokenizer.vocab_size)
    return documents, with_eod(ids, lengths, documents.sequences, tokenizer.eod, dtype)


def _encoded(
    task: _Task, tokenizer: Tokenizer, threads: int
) -> Iterator[tuple[reader.Block, reader.Documents, EncodedDocuments]]:
    """The blocks of a file in their order, encoded ahead in `threads` threads."""
    blocks = reader.blocks(Path(task.record.input), task.max_document_bytes)
    if threads == 1:
        for block in blocks:
            yield block, *_encode(task, block, tokenizer)
        return
    ahead: deque[tuple[reader.Block, Future[tuple[reader.Documents, EncodedDocuments]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for block in blocks:
                ahead.append((block, pool.submit(_encode, task, block, tokenizer)))
                while len(ahead) > threads + 1 or (ahead and ahead[0][1].done()):
                    first, encoded = ahead.popleft()
                    yield first, *encoded.result()
            for first, encoded in ahead:
                yield first, *encoded.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def tokenize_file(task: _Task, tokenizer: Tokenizer, threads: int, read: Callable[[int], None]) -> Record:
    """Tokenize one input file into its pair.

    Args:
        task: the file and where its pair goes.
        tokenizer: what encodes it.
        threads: that encode.
        read: told the bytes of the input file that were read since it was last called.

    Returns:
        The file's record, already on disk.

    Raises:
        CptainError: a file that cannot be read, or a bad line where `on_error` is "fail"; no pair appears then.
    """
    record, file = task.record, Path(task.record.input)
    pair = task.data_folder / record.prefix
    skipped_file = Path(f"{pair}.skipped.jsonl")
    pair.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_partials(pair.parent)
    skipped: list[reader.BadLine] = []
    lines = blank = 0
    with atomic_file(Path(f"{pair}.idx")) as idx_partial, atomic_file(Path(f"{pair}.bin")) as bin_partial:
        writer = IndexedDatasetWriter(bin_partial, token_dtype(tokenizer.vocab_size))
        try:
            for block, documents, encoded in _encoded(task, tokenizer, threads):
                writer.add(encoded)
                skipped += documents.bad
                blank += documents.blank
                lines += len(block.lines)
                read(block.read)
            writer.write_index(idx_partial)
        finally:
            writer.close()
        if lines != writer.documents + len(skipped) + blank:
            raise CptainError(
                f"{file}: {lines} lines became {writer.documents} documents, {len(skipped)} bad and {blank} blank "
                "lines: a defect of cptain"
            )
    if skipped:
        with atomic_file(skipped_file) as partial:
            kept = [
                {"line": bad.line, "reason": bad.reason, "raw": bad.raw.decode("utf-8", "backslashreplace")}
                for bad in skipped
            ]
            partial.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept), encoding="utf-8")
    else:
        skipped_file.unlink(missing_ok=True)
    done = replace(
        record,
        documents=writer.documents,
        tokens=writer.tokens,
        lines=lines,
        skipped=len(skipped),
        blank=blank,
        bin_bytes=Path(f"{pair}.bin").stat().st_size,
        idx_bytes=Path(f"{pair}.idx").stat().st_size,
    )
    write_record(task.data_folder, done)
    return done


# Of a worker process. The first two come with the fork, so that the tokenizer is loaded once.
_tokenizer: Tokenizer
_queue: Any
_threads: int
_working = _stopping = False


def _worker(task: _Task) -> Record:
    if _stopping:
        raise Interrupted("SIGTERM")  # the pool hands out work it has queued even after a task was interrupted
    global _working
    _working = True
    try:
        return tokenize_file(task, _tokenizer, _threads, _queue.put)
    finally:
        _working = False


def _stop(*_: object) -> None:
    global _stopping
    _stopping = True
    if _working:  # between two tasks there is nothing to clean up, and the pool ends the process itself
        raise Interrupted("SIGTERM")


def _worker_signals() -> None:
    """Ctrl-C is the parent's to handle; SIGTERM is the parent's word to stop, and cleans up on the way out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)


def _parallel(
    tasks: list[_Task], tokenizer: Tokenizer, workers: int, threads: int, progress: Progress
) -> Iterator[Record]:
    """Tokenize in `workers` processes, biggest file first, and yield records as files are done."""
    global _tokenizer, _queue, _threads
    _threads = threads
    context = multiprocessing.get_context("fork")
    _tokenizer, _queue = tokenizer, context.SimpleQueue()
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_worker_signals)
    pending: set[Future[Record]] = set()
    try:
        pending = {
            executor.submit(_worker, task) for task in sorted(tasks, key=lambda task: task.record.bytes, reverse=True)
        }
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not _queue.empty():
                progress.advance(_queue.get())
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise CptainError(
            "a preprocess worker died (killed, or out of memory): run it again, with fewer --workers"
        ) from None
    finally:
        for process in list((executor._processes or {}).values()) if pending else []:
            process.terminate()
        executor.shutdown(wait=True, cancel_futures=True)


def shard(tasks: list[_Task], number: int, count: int) -> list[_Task]:
    """The `number`-th (from 1) of `count` parts of the files, as even in bytes as whole files allow.

    Every process gets the same parts from the same files: the biggest file first, each to the part that has least.
    """
    parts: list[list[_Task]] = [[] for _ in range(count)]
    sizes = [(0, place) for place in range(count)]
    for task in sorted(tasks, key=lambda task: (-task.record.bytes, task.record.prefix)):
        size, place = heapq.heappop(sizes)
        parts[place].append(task)
        heapq.heappush(sizes, (size + task.record.bytes, place))
    return parts[number - 1]


def _done(task: _Task) -> Record | None:
    """The record of a file that is done and unchanged."""
    record = read_record(task.data_folder, task.record.prefix)
    if record and record.same_input(task.record) and not record.missing_output(task.data_folder):
        return record
    return None


def preprocess(
    run: RunFile, workers: int, force: bool = False, part: tuple[int, int] = (1, 1), backend: str = "auto"
) -> None:
    """Tokenize every input file of the run that is not done, and write manifest.json.

    Args:
        run: the run.
        workers: cores to use.
        force: redo what is done.
        backend: "auto" or "hf"; see `cptain.data.tokenizer`.
        part: (I, N) does the I-th of N parts; the manifest is written by whichever finds every part done.

    Raises:
        CptainError: see `input_files` and `tokenize_file`.
    """
    tokenizer = Tokenizer(run.tokenizer, run.data_folder / ".tokenizer", backend)
    every = _tasks(run, tokenizer)
    tasks = shard(every, *part)
    done, todo = [], []
    for task in tasks:
        record = None if force else _done(task)
        if record:
            done.append(record)
        else:
            todo.append(task)
    if done:
        print(f"preprocess: {len(done)} of {len(tasks)} files are done and unchanged", file=sys.stderr)
    if todo:
        (run.data_folder / FILE_NAME).unlink(missing_ok=True)  # until every file is done again
        print(f"preprocess: tokenizer: {tokenizer.backend}", file=sys.stderr)
        total = sum(task.record.bytes for task in tasks)
        with Progress("preprocess", total, "B", done=sum(record.bytes for record in done)) as progress:
            # A core for each file; where there are fewer files, threads share those that are over.
            processes = min(workers, len(todo))
            threads = max(1, workers // processes)
            if processes == 1:
                for task in todo:
                    done.append(tokenize_file(task, tokenizer, threads, progress.advance))
            else:
                done.extend(_parallel(todo, tokenizer, processes, threads, progress))
    if part != (1, 1):
        records = [_done(task) for task in every]
        done = [record for record in records if record]
        missing = len(records) - len(done)
        others = f"; {missing} files of other parts are not done yet" if missing else ""
        print(f"preprocess: part {part[0]} of {part[1]}: {len(tasks)} files done{others}", file=sys.stderr)
        if missing:
            return
    _finish(run, done)


def _finish(run: RunFile, done: list[Record]) -> None:
    """Every file is done: write the manifest and say so."""
    done.sort(key=lambda record: record.prefix)
    for record in done:
        if not record.documents:
            print(f"preprocess: {record.input}: no document in it", file=sys.stderr)
    if not any(record.tokens for record in done):
        raise CptainError("data.input: no document in any file: there is nothing to train on")
    write_manifest(run.data_folder, done, run.data.input)
    documents, tokens = sum(record.documents for record in done), sum(record.tokens for record in done)
    skipped, total_tokens = sum(record.skipped for record in done), f"{tokens} tokens ({human(tokens)})"
    print(
        f"preprocess: {len(done)} files, {documents} documents, {total_tokens}, {skipped} bad lines skipped"
        f" → {run.data_folder}",
        file=sys.stderr,
    )
