"""What Linux tells of its processes under /proc (proc(5)), and how one of ours ends."""

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


def read_of_all(name: str) -> Iterator[tuple[int, bytes]]:
    """The process id and the bytes of /proc/<pid>/`name`, for every process where they can be read.

    A process may end at any moment: one that does is left out. Path.glob cannot do this: where a process ended between
    the listing and the look at it, it raises ProcessLookupError (15 times in 112,000 on a busy node).
    """
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            content = Path("/proc", pid, name).read_bytes()
        except OSError:
            continue
        yield int(pid), content


def stat_fields(stat: str) -> list[str]:
    """The fields of a /proc/<pid>/stat behind the name, which may hold spaces and brackets: state, parent, group,
    session, …; the start is the 20th of them."""
    return stat.rpartition(")")[2].split()


def process_start(pid: int) -> str | None:
    """When a process began, in ticks since boot: a number that is used again has another. None where it is gone."""
    try:
        state, *fields = stat_fields(Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace"))
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def end(status: int) -> None:
    """End this process as Python does, but for taking its modules apart: where torch was imported that takes 0.5 s, and
    threads of torch's and gloo's ended a rank in SIGABRT meanwhile (one of 250 on busy cores, torch 2.13).

    It comes back where something is left to do for Python's own end: a profiler, or output that nobody takes.
    """
    if sys.getprofile() or sys.gettrace():
        return
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return
    os._exit(status)
