"""Files and folders that appear under their final names only when they are complete.

Everything is written beside its final name, flushed to disk, then renamed: rename is atomic within one file system, so
a reader sees the old thing, the new thing or nothing. What a killed process leaves behind carries `PARTIAL` in its name
with the host, the PID namespace and the process that wrote it, and the next writer of the same name removes it once
that process is gone.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cptain.errors import CptainError
from cptain.lock import this_place
from cptain.processes import process_start

PARTIAL = ".partial"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_PARTIAL_NAME = re.compile(rf"^\.(?P<final>.+){re.escape(PARTIAL)}-(?P<host>.+)-(?P<namespace>\d+)-(?P<pid>\d+)$")


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}{PARTIAL}-{'-'.join(this_place())}-{os.getpid()}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_stale_partials(folder: Path) -> None:
    """Remove what killed processes left in `folder`. What was written on another host or in another PID namespace
    stays: whether its writer lives cannot be known here."""
    for path in folder.glob(f".*{PARTIAL}-*"):
        match = _PARTIAL_NAME.match(path.name)
        if not match or (match["host"], match["namespace"]) != this_place():
            continue
        if process_start(int(match["pid"])) is None:
            _remove(path)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename is not, until the folder itself is on disk)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(final: Path, error: BaseException) -> None:
    """Raise the one-line error of a disk that takes no more; a write() that fails does not say on which file."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        raise CptainError(f"{final}: cannot be written: {error.strerror}") from error


@contextmanager
def atomic_file(final: Path, make_folder: bool = True) -> Iterator[Path]:
    """Yield a path to write; on success fsync it and rename it to `final`, on any exception remove it."""
    if make_folder:
        final.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(final)
    try:
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, final)
        fsync_folder(final.parent)
    except BaseException as error:
        _remove(partial)
        _cannot_write(final, error)
        raise


def _take_name(partial: Path, final: Path, replaced: Path) -> None:
    """Rename a folder to `final`, and what has that name to `replaced`; other processes may be doing the same."""
    while True:
        try:
            os.rename(partial, final)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        _remove(replaced)
        with suppress(FileNotFoundError):
            os.rename(final, replaced)


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success fsync its files and rename it to `final`, on any exception remove it.

    A folder already there is replaced: it is moved aside before the rename and removed after, so that `final` is never
    a mixture of both. On any exception it keeps its name.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_partials(final.parent)
    partial, replaced = _partial(final), _partial(final.with_name(f"{final.name}.replaced"))
    try:
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as written:
                    os.fsync(written.fileno())
        fsync_folder(partial)
        _take_name(partial, final, replaced)
        fsync_folder(final.parent)
    except BaseException as error:
        with suppress(OSError):  # nothing was moved aside, or the name is taken
            os.rename(replaced, final)
        if final.exists():
            _remove(replaced)
        _remove(partial)
        _cannot_write(final, error)
        raise
    _remove(replaced)  # whatever has the name now: another process may be replacing it in turn


def write_text(final: Path, text: str, make_folder: bool = True) -> None:
    """Write a small file atomically; `make_folder`: and its folder, where there is none."""
    with atomic_file(final, make_folder) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(final: Path, value: Any, make_folder: bool = True) -> None:
    """Write a small JSON file atomically, indented for people."""
    write_text(final, json.dumps(value, indent=2, ensure_ascii=False) + "\n", make_folder)
