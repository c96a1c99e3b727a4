"""preprocess: input files → one .bin/.idx pair each, and manifest.json.

Files are the unit of work: each belongs to one process. A large file is shared by several cores, in proportion to its
size: its process gives its blocks to processes of its own. What is complete and unchanged is skipped by a later run.
"""

import hashlib
import heapq
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from cptain.atomic import remove_stale_partials
from cptain.data.encode import Encoding
from cptain.data.in_use import refuse_if_in_use
from cptain.data.inputs import input_files, named
from cptain.data.manifest import (
    FILE_NAME,
    Record,
    fingerprint,
    lock_file,
    prefix_of,
    read_records,
    remove_record,
    write_manifest,
)
from cptain.data.many_files import answers
from cptain.data.processes import CONTEXT, process_pool
from cptain.data.recipe import Recipe, recipe
from cptain.data.tokenize_file import Read, Task, count_file, half_written, tokenize_file
from cptain.data.tokenized import Pair, check_pairs, tokenized_pairs
from cptain.data.tokenizer import Tokenizer, TokenizerFacts, tokenizer_facts
from cptain.data.vocabulary import check_size, tokenizer_folder
from cptain.errors import FAILED, CptainError, Interrupted
from cptain.model.vocabulary import Over
from cptain.progress import Progress, human
from cptain.run_file import RunFile
from cptain.summary import say, tell

_FOLDERS_SHOWN = 40
_LOOKED_AT = 1 << 20  # bytes of text that show how much of it a model too small cannot hold
_CORES_A_FILE = 32  # the process that reads a file feeds no more, and shares 9 MB of memory with each
_AHEAD = 4  # files for each process that wait in the pool, which holds six objects for each
_Work = Callable[[Task, Tokenizer, int, Read], Record]


def _tasks(run: RunFile, recipe: Recipe, force: bool, files: dict[str, Path]) -> list[Task]:
    """The work on files that have names in the data folder."""

    def task(named: tuple[str, Path]) -> Task:
        name, file = named
        stat = file.stat()
        record = Record(
            input=str(file),
            prefix=prefix_of(name, recipe),
            bytes=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            fingerprint=fingerprint(file, stat.st_size),
            recipe=recipe,
        )
        return Task(record, run.data_folder, Encoding(str(file), recipe, run.data.check_fraction), force)

    return list(answers(task, files.items()))


def _first_tokens(tasks: list[Task], tokenizer: Tokenizer, limit: int) -> Over:
    """How many tokens of the first documents are `limit` or over."""
    over = tokens = size = 0
    texts = (text for task in tasks for block in task.encoding.blocks() for text in task.encoding.parse(block).texts)
    for text in texts:
        ids, _ = tokenizer.encode([text])
        over, tokens, size = over + int((ids >= limit).sum()), tokens + len(ids), size + len(text.encode())
        if size >= _LOOKED_AT:
            break
    return Over(over, tokens, "of the first documents")


def _plan(run: RunFile, force: bool, cache: Path | None) -> tuple[list[Task], TokenizerFacts, int]:
    """What is to be done, by which tokenizer, and how many pairs are there of files or keys that the run has not."""
    files = input_files(run.data.input)
    facts, known = tokenizer_facts(str(tokenizer_folder(run)), cache), read_records(run.data_folder)
    names = named(files, {record.input: record.name for record in known})
    tasks = _tasks(run, recipe(run, facts), force, names)
    check_size(run, facts.size, lambda limit: _first_tokens(tasks, Tokenizer(run.tokenizer, facts=facts), limit))
    wanted = {task.record.prefix for task in tasks}
    others = [record for record in known if record.prefix not in wanted]
    return tasks, facts, sum(1 for record in others if not record.missing_output(run.data_folder))


class _Meter:
    """The bar over all bytes, with tokens a second and the file in hand."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._tokens, self._began = progress, 0, time.monotonic()

    def read(self, name: str, read: int, tokens: int) -> None:
        """Count; see `Read`."""
        self._tokens += tokens
        speed = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self._progress.advance(read, f"{human(speed)} tokens/s  {name}")


# Of a worker process, which comes with all of it when it is forked.
_work: Callable[[Task], Record]
_working = _stopping = False


def _worker(task: Task) -> Record:
    if _stopping:
        raise Interrupted("SIGTERM")  # the pool hands out work it has queued even after a task was interrupted
    global _working
    _working = True
    try:
        return _work(task)
    finally:
        _working = False


def _stop(*_: object) -> None:
    global _stopping
    if not _working:  # there is nothing to clean up
        os._exit(FAILED)
    if not _stopping:
        _stopping = True
        raise Interrupted("SIGTERM")


def _begin_worker(work: _Work, tokenizer: Tokenizer, cores: Callable[[Task], int], queue: Any) -> None:
    global _work
    signal.signal(signal.SIGTERM, _stop)  # the parent's word to stop: clean up on the way out

    def work_on(task: Task) -> Record:
        return work(task, tokenizer, cores(task), lambda read, tokens: queue.put((task.record.prefix, read, tokens)))

    _work = work_on


def _work_through(
    tasks: list[Task], work: _Work, tokenizer: Tokenizer, workers: int, progress: Progress
) -> Iterator[Record]:
    """Do `work` on every file, biggest first, and yield records as files are done."""
    meter, processes = _Meter(progress), min(workers, len(tasks))
    total = max(1, sum(task.record.bytes for task in tasks))

    def cores(task: Task) -> int:
        """The file's share of all cores, by its bytes, so that one large file among small ones does not end alone."""
        return min(_CORES_A_FILE, max(1, round(workers * task.record.bytes / total)))

    if processes <= 1:
        for task in tasks:
            yield work(task, tokenizer, cores(task), partial(meter.read, task.record.prefix))
        return
    queue = CONTEXT.SimpleQueue()
    ended: SimpleQueue[Future[Record]] = SimpleQueue()  # wait() would look at every file that is left, for each
    waiting, left = iter(sorted(tasks, key=lambda task: -task.record.bytes)), len(tasks)
    with process_pool(processes, _begin_worker, work, tokenizer, cores, queue) as pool:

        def submit(count: int) -> None:
            for task in islice(waiting, count):
                pool.submit(_worker, task).add_done_callback(ended.put)

        submit(_AHEAD * processes)
        while left:
            while not queue.empty():
                meter.read(*queue.get())
            with suppress(Empty):
                future = ended.get(timeout=0.2)
                left -= 1
                submit(1)
                yield future.result()


_Work_on = TypeVar("_Work_on", Task, Pair)


def shard(tasks: list[_Work_on], number: int, count: int) -> list[_Work_on]:
    """The `number`-th (from 1) of `count` parts of the files, as even in bytes as whole files allow.

    Every process gets the same parts from the same files: the biggest file first, each to the part that has least.
    """
    parts: list[list[_Work_on]] = [[] for _ in range(count)]
    sizes = [(0, place) for place in range(count)]
    for task in sorted(tasks, key=lambda task: (-task.record.bytes, task.record.prefix)):
        size, place = heapq.heappop(sizes)
        parts[place].append(task)
        heapq.heappush(sizes, (size + task.record.bytes, place))
    return parts[number - 1]


def _whole_hash(file: Path, read: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as raw:
        while chunk := raw.read(8 << 20):
            digest.update(chunk)
            read(len(chunk))
    return digest.hexdigest()


def _changed_inside(records: list[Record], workers: int) -> list[Record]:
    """Those whose input, read whole, is no longer what it was."""
    changed = []
    with (
        Progress("verify inputs", sum(record.bytes for record in records), "B") as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        hashes = pool.map(lambda record: _whole_hash(Path(record.input), progress.advance), records)
        for record, found in zip(records, hashes, strict=True):
            if found != record.sha256:
                progress.say(f"preprocess: {record.input}: its content changed, though size and date did not")
                changed.append(record)
    return changed


def preprocess(
    run: RunFile,
    workers: int,
    force: bool = False,
    part: tuple[int, int] = (1, 1),
    backend: str = "auto",
    verify_inputs: bool = False,
    count_only: bool = False,
) -> bool:
    """Tokenize every input file of the run that is not done, check its pairs of data.tokenized that were not, and write
    manifest.json.

    Args:
        run: the run.
        workers: cores to use.
        force: redo what is done.
        backend: "auto" or "hf"; see `cptain.data.tokenizer`.
        part: (I, N) does the I-th of N parts; the manifest is written by whichever finds every part done.
        verify_inputs: read what is done whole, to see whether it is still the same.
        count_only: count documents and tokens, and write nothing.

    Returns:
        Whether a file was tokenized, or a pair checked.

    Raises:
        CptainError: see `input_files`, `check_size`, `refuse_if_in_use`, `tokenize_file`, `find_pairs` and
            `check_pairs`.
    """
    cache = None if count_only else run.tokenizers_folder
    every, facts, left = _plan(run, force, cache)
    pairs, tasks = tokenized_pairs(run, facts), shard(every, *part)
    checked, read = check_pairs(shard(pairs, *part), workers, force, verify_inputs, not count_only)
    done = [] if force else [record for task in tasks if (record := task.done())]
    changed = _changed_inside(done, workers) if verify_inputs else []
    prefixes = {record.prefix for record in done} - {record.prefix for record in changed}
    done = [record for record in done if record.prefix in prefixes]
    todo = [task for task in tasks if task.record.prefix not in prefixes]
    if done:
        say(f"preprocess: {len(done)} of {len(tasks)} files are done and unchanged", were_done=len(done))
    if not count_only:
        todo = _make_way(run.data_folder, todo, changed)
    if todo:
        tokenizer = Tokenizer(run.tokenizer, cache, backend, facts)
        print(f"preprocess: tokenizer: {tokenizer.backend}", file=sys.stderr)
        total = sum(task.record.bytes for task in tasks)
        with Progress("preprocess", total, "B", done=sum(record.bytes for record in done)) as progress:
            done += _work_through(todo, count_file if count_only else tokenize_file, tokenizer, workers, progress)
    if count_only:
        _say_totals(done + checked, "")
        return False
    if part != (1, 1):
        records = [*(task.done() for task in every), *(pair.done() for pair in pairs)]
        done, checked = [record for record in records if record], []
        missing = len(records) - len(done)
        others = f"; {missing} files of other parts are not done yet" if missing else ""
        line = f"preprocess: part {part[0]} of {part[1]}: {len(tasks)} files done{others}"
        say(line, part=part[0], of_parts=part[1], files_of_part=len(tasks), not_done=missing)
        if missing:
            return bool(todo or read)
    _finish(run, done + checked, left)
    return bool(todo or read)


def _say_totals(records: list[Record], where: str) -> None:
    """A line a folder, then one for all."""

    def totals(some: list[Record]) -> dict[str, int]:
        return {key: sum(getattr(one, key) for one in some) for key in ("documents", "tokens", "text_bytes", "skipped")}

    def figures(some: list[Record]) -> str:
        sums = totals(some)
        of_text = sum(record.tokens for record in some if not record.is_tokenized)
        share = f", {of_text / sums['text_bytes']:.3f} tokens a byte" if sums["text_bytes"] else ""
        counts = f"{len(some)} files, {sums['documents']} documents, {sums['tokens']} tokens ({human(sums['tokens'])})"
        return f"{counts}{share}, {sums['skipped']} bad lines skipped"

    folders: dict[str, list[Record]] = {}
    for record in records:
        folders.setdefault(str(Path(record.prefix).parent), []).append(record)
    for folder in sorted(folders)[:_FOLDERS_SHOWN] if len(folders) > 1 else []:
        print(f"preprocess:   {folder}: {figures(folders[folder])}", file=sys.stderr)
    if len(folders) > _FOLDERS_SHOWN:
        print(f"preprocess:   and {len(folders) - _FOLDERS_SHOWN} folders more", file=sys.stderr)
    say(f"preprocess: {figures(records)}{where}", files=len(records), **totals(records))


def _make_way(data_folder: Path, todo: list[Task], changed: list[Record]) -> list[Task]:
    """Take away what is no longer true once the work begins, or was left by work that was killed.

    Returns:
        The work, with what of it was begun.

    Raises:
        CptainError: see `refuse_if_in_use`.
    """
    refuse_if_in_use(data_folder, [task.record.prefix for task in todo])
    for record in changed:
        remove_record(data_folder, record.prefix)
    begun = {pair for folder in {task.pair.parent for task in todo} for pair in half_written(folder)}
    todo = [replace(task, begun=task.pair in begun) for task in todo]
    if count := sum(task.begun for task in todo):
        print(f"preprocess: {count} files were begun and not finished: done from their start", file=sys.stderr)
    records = {lock_file(data_folder, task.record.prefix).parent for task in todo}
    for folder in (data_folder, *records):
        remove_stale_partials(folder)
    if todo:
        (data_folder / FILE_NAME).unlink(missing_ok=True)  # until every file is done again
    return todo


def _finish(run: RunFile, done: list[Record], left: int) -> None:
    """Every file is done: write the manifest and say so, and how many other pairs are left in the folder."""
    done.sort(key=lambda record: record.prefix)
    for record in done:
        if not record.documents:
            print(f"preprocess: {record.input}: no document in it", file=sys.stderr)
    if not any(record.tokens for record in done):
        key = "data.input" if run.data.input else "data.tokenized"
        raise CptainError(f"{key}: no document in any file: there is nothing to train on")
    write_manifest(run.data_folder, done, run.data.sources)
    if left:
        print(
            f"preprocess: {left} pairs of files that data.input no longer matches, or of another data.key, are left in "
            f"{run.data_folder}: they are not in the manifest and not trained on",
            file=sys.stderr,
        )
    _say_totals(done, f" → {run.data_folder}")
    tell(folder=run.data_folder)
