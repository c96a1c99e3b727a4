"""A lock that says who holds it, for folders that the nodes of a cluster share.

flock reaches no other node on many parallel file systems. A symbolic link is made in one step or not at all on every
one, and its target holds the words: host, PID namespace, process, that process's start, since when, and a random number
that makes them unlike those of any other lock. A thread of the holder touches the link every `_BEAT` seconds. A dead
process of this host is known at once; a holder elsewhere counts as dead when it has not touched its link for long.

Whoever removes a dead holder's link must not hit the next holder's, which may have come in between. So a link is only
ever removed under a guard, a link beside it that is named by a hash of its words W: whoever has made the guard reads
the link again, and removes it if it still says W. Nobody else can remove W then, and no later link says W.
"""

import hashlib
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cptain.errors import CptainError
from cptain.processes import process_start

STALE_AFTER = 900.0  # seconds without a touch, by the clocks of two hosts, which may differ
WATCHED = 90.0  # seconds without a touch, by this host's clock alone; other nodes may see a touch a minute late
_BEAT = 20.0  # seconds
_PATIENCE = 3.0  # seconds: a killed process takes a moment to be gone
_LOOK = 0.1  # seconds from one look at a link to the next


class Held(CptainError):
    """Another process, which lives, has the lock."""


def this_place() -> tuple[str, str]:
    """The host and the PID namespace, within which a process's number means something."""
    return socket.gethostname(), str(os.stat("/proc/self/ns/pid").st_ino)


class _Words(NamedTuple):
    host: str
    namespace: str
    pid: str
    start: str
    since: str  # seconds since the epoch
    nonce: str

    @property
    def are_of_this_place(self) -> bool:
        return (self.host, self.namespace) == this_place()

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(int(self.since)))
        return f"process {self.pid} on host {self.host} (since {since})"


def _new_words() -> str:
    pid = os.getpid()
    return "|".join((*this_place(), str(pid), str(process_start(pid)), str(int(time.time())), secrets.token_hex(8)))


def _living(words: str, link: Path) -> _Words | None:
    """Who made a link that says `words`, where it lives as far as one look can tell."""
    try:
        maker = _Words(*words.split("|"))
        pid, _ = int(maker.pid), int(maker.since)
        if maker.are_of_this_place:
            lives = process_start(pid) == maker.start
        else:
            lives = time.time() - link.lstat().st_mtime < STALE_AFTER
        return maker if lives else None
    except (TypeError, ValueError, FileNotFoundError):  # no words of ours; or just released
        return None


def _make(link: Path, words: str) -> bool:
    """Make a link in one step; False where it is there."""
    try:
        os.symlink(words, link)
        return True
    except FileExistsError:
        return False
    except OSError as error:  # it names the words, not the link
        raise OSError(error.errno, error.strerror, str(link)) from error


def _remove(link: Path, words: str) -> bool:
    """Remove a link if it says `words`; False where another process is about to. A guard whose maker died is a link
    like any other, and is removed in the same way."""
    guard = link.with_name(f".{link.name}.stale-{hashlib.sha256(words.encode()).hexdigest()[:16]}")
    mine = _new_words()
    try:
        if os.readlink(link) != words:
            return True
        if _make(guard, mine):
            if os.readlink(link) == words:
                link.unlink()
            return True
        other = os.readlink(guard)
    except FileNotFoundError:
        return True
    finally:
        with suppress(FileNotFoundError):
            if os.readlink(guard) == mine:
                guard.unlink()
    return _living(other, guard) is None and _remove(guard, other) and _remove(link, words)


def _is_touched(file: Path, held: str, seconds: float) -> bool:
    """Whether a holder elsewhere shows a sign of life while its link is watched. FileNotFoundError: it was released."""
    first, end = file.lstat().st_mtime_ns, time.monotonic() + seconds
    while time.monotonic() < end and os.readlink(file) == held:
        if file.lstat().st_mtime_ns != first:
            return True
        time.sleep(_LOOK)
    return False


def _take(file: Path, words: str, what: str, watch: float | None) -> None:
    """Make the link `file` as soon as no living process has it. Arguments and errors are those of `lock`."""
    patience = time.monotonic() + _PATIENCE
    file.parent.mkdir(parents=True, exist_ok=True)
    while not _make(file, words):
        try:
            held = os.readlink(file)
            holder = _living(held, file)
            if holder and watch is not None and not holder.are_of_this_place:
                if watch:
                    print(f"{what}: {holder} was at it: waiting {watch:.0f} s for a sign of its life", file=sys.stderr)
                holder = holder if _is_touched(file, held, watch) else None
                watch = None if holder else watch
        except FileNotFoundError:
            continue  # just released
        if holder is None and _remove(file, held):
            continue
        if time.monotonic() > patience:
            raise Held(f"{what}: {holder or 'another process'} is at it: wait until it is done, or stop it")
        time.sleep(_LOOK)


@contextmanager
def _touching(file: Path, words: str) -> Iterator[None]:
    """Touch the link while the block runs, so that other nodes see that this process lives."""
    done = threading.Event()

    def touch() -> None:
        while not done.wait(_BEAT):
            with suppress(OSError):
                if os.readlink(file) == words:
                    os.utime(file, follow_symlinks=False)

    thread = threading.Thread(target=touch, name=f"lock {file}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def lock(file: Path, what: str, watch: float | None = None) -> Iterator[None]:
    """Hold the lock `file`.

    Args:
        file: the link that is the lock; its folder is made.
        what: what is done under it, for the message to whoever comes second.
        watch: where the holder is on another host and has touched its link within `STALE_AFTER`, watch for so many
            seconds whether it does so again, and take the lock if not: it may have been killed a moment ago. `WATCHED`
            is long enough to know; 0 is for a lock that only the holder of another one takes. None: not at all.

    Raises:
        Held: another process holds it.
    """
    words = _new_words()
    try:
        _take(file, words, what, watch)
        with _touching(file, words):
            yield
    finally:
        with suppress(OSError):
            _remove(file, words)


def living_holder(file: Path) -> str | None:
    """The process that holds the lock `file`, for people: "process 12 on host a (since 2026-01-02 03:04)"; None where
    nobody does, or nobody who lives."""
    try:
        holder = _living(os.readlink(file), file)
    except OSError:
        return None
    return None if holder is None else str(holder)
