"""A checkpoint that is read is not removed.

Whoever reads one for long holds a lock of its own beside it. Whoever removes one takes the lock of its removal, and
only then looks for readers; a reader takes its own lock, and only then looks for a removal. One of the two always sees
the other, and the removal gives way. It is a rename: nobody sees half a checkpoint, and what a killed process leaves
of one has a name that only the next removal looks at.
"""

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from cptain.lock import living_holder, lock

_FOLDER = ".in-use"
_REMOVED = ".removed-"
_LOOK = 0.05  # seconds from one look at a removal, which takes a rename, to the next


def _removal(folder: Path) -> Path:
    return folder.parent / _FOLDER / f"{folder.name}.removal"


@contextmanager
def being_read(folder: Path) -> Iterator[None]:
    """Keep `remove` from an iteration's folder, unless it is gone by then.

    A root that this user may not write to is read without: its owner cannot be kept from anything.
    """
    place = folder.parent / _FOLDER
    try:
        place.mkdir(exist_ok=True)
        writable = os.access(place, os.W_OK)
    except OSError:
        writable = False
    mine = place / f"{folder.name}.{secrets.token_hex(8)}.reader"
    with lock(mine, f"read {folder}") if writable else nullcontext():
        while living_holder(_removal(folder)):
            time.sleep(_LOOK)
        yield


def remove(folder: Path) -> bool:
    """Remove an iteration's folder; False where somebody reads it.

    Raises:
        OSError: it cannot be removed.
    """
    with lock(_removal(folder), f"remove {folder}"):
        readers = (folder.parent / _FOLDER).glob(f"{folder.name}.*.reader")
        if any(living_holder(reader) for reader in readers):
            return False
        os.rename(folder, folder.with_name(f"{_REMOVED}{folder.name}"))
    finish_removals(folder.parent)
    return True


def finish_removals(root: Path) -> None:
    """Delete what was removed, by this process or by one that was killed meanwhile."""
    for folder in root.glob(f"{_REMOVED}*"):
        shutil.rmtree(folder)
