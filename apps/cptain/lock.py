"""A lock that says who holds it, for folders that the nodes of a cluster share.

flock reaches no other node on many parallel file systems. A symbolic link is made in one step or not at all on every
one, and its target holds the words: host, PID namespace, process and that process's start. A dead process of this host
is known at once; a holder elsewhere counts as dead when it has not touched its link for `STALE_AFTER` seconds.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cptain.errors import CptainError

STALE_AFTER = 900.0
_BETWEEN_BEATS = 30.0
_PATIENCE = 3.0  # a killed process takes a moment to be gone


class Held(CptainError):
    """Another process, which lives, has the lock."""


def process_start(pid: int) -> str | None:
    """When a process began, in ticks since boot: a number that is used again has another. None where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _where() -> tuple[str, str]:
    return socket.gethostname(), os.readlink("/proc/self/ns/pid")


def _holder_lives(words: str, file: Path) -> bool:
    try:
        host, namespace, pid, start = words.split("|")
        if (host, namespace) == _where():
            return process_start(int(pid)) == start
        return time.time() - file.lstat().st_mtime < STALE_AFTER
    except ValueError:
        return False  # no words of ours
    except FileNotFoundError:
        return False  # just released


@contextmanager
def lock(file: Path, what: str, watch: bool = False) -> Iterator[Callable[[], None]]:
    """Hold the lock `file`.

    Args:
        file: the link that is the lock; its folder is made.
        what: what is done under it, for the message to whoever comes second.

    Yields:
        What to call every few seconds to minutes, so that other nodes see that this process lives.

    Raises:
        Held: another process holds it.
    """
    words = "|".join((*_where(), str(os.getpid()), str(process_start(os.getpid()))))
    began = time.monotonic()
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.symlink(words, file)
            break
        except FileNotFoundError:
            continue  # another process has just removed the folder
        except FileExistsError:
            pass
        except OSError as error:  # it names the words, not the link
            raise OSError(error.errno, error.strerror, str(file)) from error
        try:
            held = os.readlink(file)
        except OSError:
            continue  # released between the two
        if not _holder_lives(held, file):
            aside = file.with_name(f".{file.name}.stale-{os.getpid()}")
            with suppress(FileNotFoundError):  # another process was first
                os.rename(file, aside)
                aside.unlink()
        elif time.monotonic() - began > _PATIENCE:
            host, _, pid, _ = held.split("|")
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.lstat().st_ctime))
            raise Held(f"{what}: process {pid} on {host} is at it (seen {since}): wait until it is done, or stop it")
        else:
            time.sleep(0.1)
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > _BETWEEN_BEATS:
            last = time.monotonic()
            with suppress(OSError):
                os.utime(file, follow_symlinks=False)

    try:
        yield beat
    finally:
        with suppress(OSError):
            if os.readlink(file) == words:
                file.unlink()
