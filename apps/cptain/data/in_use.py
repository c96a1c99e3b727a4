"""Data that a training reads is not written anew under it.

A training reads the pairs to its end, at places that it worked out at its start: a pair replaced meanwhile is other
text, or a crash. A training therefore holds a lock in the data folder, one a run, and preprocess looks for them before
it touches a pair that is there. New pairs harm nobody.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from cptain.errors import CptainError
from cptain.lock import living_holder, lock

_FOLDER = ".in-use"


@contextmanager
def in_use(data_folder: Path, run_folder: Path) -> Iterator[None]:
    """Keep preprocess from replacing what is in `data_folder` while the run in `run_folder` trains on it.

    The caller holds the run's own lock. So whoever of this run left a lock here is dead, and its lock is taken at once:
    a job that was killed on another host costs the next one a single wait, however many folders it reads.

    A folder that is not there, or that this user may not write to, is used without: its owner cannot be kept from
    anything.
    """
    name = hashlib.sha256(str(run_folder).encode()).hexdigest()[:16]
    try:
        (data_folder / _FOLDER).mkdir(exist_ok=True)
        writable = os.access(data_folder / _FOLDER, os.W_OK)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        writable = False
    with lock(data_folder / _FOLDER / f"{name}.lock", "train", watch=0) if writable else nullcontext():
        yield


def refuse_if_in_use(data_folder: Path, prefixes: list[str]) -> None:
    """Refuse to replace pairs of a folder that a training reads.

    Args:
        data_folder: the folder.
        prefixes: of the pairs that would be written; those that are not there yet may be.

    Raises:
        CptainError: which pair, and who trains.
    """
    held = [holder for file in sorted((data_folder / _FOLDER).glob("*.lock")) if (holder := living_holder(file))]
    there = [
        prefix for prefix in prefixes if any((data_folder / f"{prefix}{end}").exists() for end in (".bin", ".idx"))
    ]
    if held and there:
        more = f" and {len(there) - 1} others" if len(there) > 1 else ""
        raise CptainError(
            f"preprocess: {data_folder / there[0]}{more} would be replaced, and {' and '.join(held)} trains on it: "
            "wait until that is done, or write to another data.output"
        )
