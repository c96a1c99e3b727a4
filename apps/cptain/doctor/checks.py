"""How checks are made: each in a process of its own, with a time limit, so that none can keep the others.

A file system or a GPU that hangs holds its process in the kernel, where no signal reaches it; such a process is left
behind. So this forks by itself: Python's own process pools wait for theirs at the end.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cptain.errors import CptainError, one_line
from cptain.run_file import RunFile
from cptain.scheduling.sites import Site

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Found:
    """What a check found.

    Attributes:
        state: "warn" costs time or may go wrong; "fail" will.
        means: what was found, and what follows from it.
        remedy: what to do, where it is not "ok".
    """

    state: State
    means: str
    remedy: str = ""


@dataclass(frozen=True)
class Subject:
    """What is looked at: this machine, and where one is given a run, on its site.

    Attributes:
        run: the run.
        site: where it will run.
        site_name: for people.
        in_job: this is a node of a job; the user's keys are with the jobs that need them, and not here.
    """

    run: RunFile | None = None
    site: Site | None = None
    site_name: str = ""
    in_job: bool = False

    @property
    def nodes(self) -> int:
        """That a training takes."""
        return self.run.jobs.nodes if self.run else 1

    def work_dir(self) -> Path | None:
        """Where the run is written: the nearest folder that is there."""
        if self.run is None:
            return None
        return next(folder for folder in (self.run.work_dir, *self.run.work_dir.parents) if folder.exists())


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: for people.
        look: does it; what it raises is what it found.
        seconds: how long it may take.
    """

    name: str
    look: Callable[[Subject], Found]
    seconds: float = 8.0


@dataclass(frozen=True)
class Result:
    """What a check found, with its name."""

    name: str
    state: State
    means: str
    remedy: str


def ok(means: str) -> Found:
    """Nothing is wrong."""
    return Found("ok", means)


def warn(means: str, remedy: str) -> Found:
    """Something costs time, or may go wrong."""
    return Found("warn", means, remedy)


def fail(means: str, remedy: str) -> Found:
    """Something will go wrong."""
    return Found("fail", means, remedy)


def _found(check: Check, subject: Subject) -> Found:
    try:
        return check.look(subject)
    except CptainError as error:
        return fail(str(error).replace("\n", "; "), "change what it names, and cptain doctor again")
    except OSError as error:
        return fail(f"{error.filename or check.name}: {error.strerror or one_line(error)}", "ask the site's support")
    except Exception as error:
        return warn(
            f"could not be looked at: {type(error).__name__}: {one_line(error)}",
            "report it: a defect of cptain",
        )


def _start(check: Check, subject: Subject) -> tuple[int, int]:
    """Begin a check; the process's id, and where its answer is read."""
    answer, own = os.pipe()
    pid = os.fork()
    if pid:
        os.close(own)
        return pid, answer
    try:
        os.setpgid(0, 0)  # with what it starts, so that it can be ended with it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_WRONLY)
        for standard in (1, 2):  # what libraries print is not the answer
            os.dup2(nothing, standard)
        content = json.dumps(asdict(_found(check, subject))).encode()
        while content:
            content = content[os.write(own, content) :]
    finally:
        os._exit(0)


def _answer(check: Check, pid: int, answer: int, until: float) -> Found:
    content = b""
    while select.select([answer], [], [], max(0.0, until - time.monotonic()))[0]:
        if piece := os.read(answer, 1 << 16):
            content += piece
            continue
        with suppress(ValueError, TypeError):
            return Found(**json.loads(content))
        return fail("its process ended without an answer", "dmesg | tail, which says who killed it")
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return fail(
        f"no answer in {check.seconds:g} s: what it looks at hangs",
        "leave this node out, and tell the site's support (dmesg | tail)",
    )


def look(checks: tuple[Check, ...], subject: Subject) -> list[Result]:
    """Make checks, all at once; one that hangs or dies is a fail, and no reason for the others to wait."""
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    started = [(check, *_start(check, subject)) for check in checks]
    results = []
    for check, pid, answer in started:
        found = _answer(check, pid, answer, began + check.seconds)
        os.close(answer)
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        results.append(Result(check.name, found.state, found.means, found.remedy))
    return results
