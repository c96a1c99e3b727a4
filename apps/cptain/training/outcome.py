"""How a training ended: the verdict, and what a chain of jobs remembers of attempts that saved nothing.

Megatron exits with status 0 after many failures (a missing checkpoint among them), and with another after a stop that
was asked for; so the verdict is what the checkpoints' tracker says, and only then the exit status.
"""

import json
import os
import re
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cptain import atomic
from cptain.errors import RESUMABLE, CptainError
from cptain.progress import human
from cptain.run_file import RunFile
from cptain.training.follow import Follower, failure_reason, is_a_signal, last_lines, only_lost_peers
from cptain.training.prepare import Command, deadline
from cptain.training.record import TrainingRecord

_TRIES = 2  # of a chain's jobs at one place
_LAST_WORD = 10.0  # seconds that a node which only lost its peers leaves them to say why, before it ends the job
# What Megatron says when a checkpoint cannot be written: never which file.
_DISK = re.compile("Worker failure|No space left|quota exceeded|PytorchStreamWriter|File too large", re.IGNORECASE)
_NO_WORD = "was killed, and said nothing"


@dataclass(frozen=True)
class Ended:
    """How torchrun ended.

    Attributes:
        status: its exit status.
        signal_name: of the signal that asked the training to stop; empty: none did.
        at_once: it was then ended without saving.
        error_file: where torchrun leaves the first failing rank's error.
        log_file: what the ranks printed.
    """

    status: int
    signal_name: str
    at_once: bool
    error_file: Path
    log_file: Path


class Attempt:
    """<run>/logs/train-failed.json: how many trainings in a row began at a step and saved nothing new.

    Written when a training begins and removed when something is saved, so that one that is killed counts too.
    """

    def __init__(self, run: RunFile, start: int) -> None:
        self._file, self._start = run.logs_folder / "train-failed.json", start

    def _read(self) -> tuple[int, str, bool]:
        """How many attempts there were, the last reason that one gave, and whether that is the last attempt's."""
        try:
            attempt = json.loads(self._file.read_text(encoding="utf-8"))
            if attempt["start"] == self._start:
                return int(attempt["times"]), str(attempt["reason"]), bool(attempt["said"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none, or one that cannot be read: it forbids nothing
        return 0, "", False

    def _write(self, times: int, reason: str, said: bool) -> None:
        atomic.write_json(self._file, {"start": self._start, "times": times, "reason": reason, "said": said})

    def begin(self) -> None:
        """Count a training that begins.

        Raises:
            CptainError: in a chain of jobs, after the second attempt at the same place: the first may have failed for
                a node's sake, a third would fail like the second.
        """
        times, reason, said = self._read()
        if times >= _TRIES and int(os.environ.get("CPTAIN_LINK") or 1) > 1:
            last = reason if said else f"the last {_NO_WORD}" + (f"; before that: {reason}" if reason else "")
            raise CptainError(
                f"train: failed {times} times at step {self._start} with nothing new saved, and is not tried again in "
                f"this chain: {last} (submit.sh train export begins another)"
            )
        self._write(times + 1, reason, said=False)

    def failed(self, reason: str, only_if_unsaid: bool) -> None:
        """Note why; where `only_if_unsaid`, only if no other node has."""
        times, _, said = self._read()
        if not (only_if_unsaid and said):
            self._write(max(1, times), reason, said=True)

    @property
    def failure(self) -> str:
        """Why another node of this attempt failed, as far as it has said; empty: none did."""
        _, reason, said = self._read()
        return reason if said and not reason.startswith("stopped") else ""

    def saved(self) -> None:
        """Something new was saved: nothing is to be remembered."""
        self._file.unlink(missing_ok=True)


def verdict(
    run: RunFile, command: Command, follower: Follower, how: Ended, attempt: Attempt, record: TrainingRecord
) -> None:
    """Say how training ended; raise unless every step is done and saved."""
    saved = record.saved
    if follower.first and follower.last:
        print(
            f"train: step {follower.last.number} of {command.steps}, loss {follower.first.loss:.4f} → "
            f"{follower.last.loss:.4f}, saved at step {saved}",
            file=sys.stderr,
        )
    if saved > command.start:
        attempt.saved()
    if saved >= command.steps and how.status == 0:
        record.end(follower, "done")
        return
    reason = failure_reason(how.error_file, follower.tail)
    if _was_stopped(how, reason, saved > command.start):
        late = (ends := deadline()) and time.time() >= ends
        stopped = f"stopped by {how.signal_name}" if how.signal_name else "stopped at the job's deadline"
        stopped = stopped if how.signal_name or late else "stopped early"
        if how.signal_name and command.nodes and (failure := attempt.failure):
            stopped += f", because another node failed: {failure}"  # the launcher ended this one
        if saved == command.start:
            attempt.failed(f"{stopped} before anything was saved", only_if_unsaid=True)
        record.end(follower, stopped)
        progress = f"saved at step {saved} of {command.steps}" if saved else "nothing saved yet"
        raise CptainError(f"train: {stopped}; {progress}; the same command continues", RESUMABLE)
    _fail(run, command, follower, how, attempt, record, reason)


def _was_stopped(how: Ended, reason: str, new: bool) -> bool:
    """Whether training ended because it was asked to, or by itself with something saved; else it failed.

    A rank that had an error of its own after a signal has failed: a save, most likely.
    """
    if not how.signal_name:
        return how.status == 0 and new
    return how.status == 0 or how.at_once or is_a_signal(reason) or only_lost_peers(reason)


def _fail(
    run: RunFile,
    command: Command,
    follower: Follower,
    how: Ended,
    attempt: Attempt,
    record: TrainingRecord,
    reason: str,
) -> None:
    if _DISK.search(reason):
        free = shutil.disk_usage(run.folder).free
        reason = f"{run.checkpoints_folder}: cannot be written ({human(free)}B free there): {reason}"
    if how.signal_name:
        reason = f"after {how.signal_name}: {reason}"
    if command.nodes:
        reason = f"{socket.gethostname()}: {reason}"
    if lost_peers := command.nodes is not None and only_lost_peers(reason):
        time.sleep(_LAST_WORD)
    if "CPTAIN_LINK" in os.environ:  # set by the job script: what is printed is the job's own log
        print(f"train: the last lines of {how.log_file}:", *last_lines(follower.tail), sep="\n  ", file=sys.stderr)
    attempt.failed(reason, only_if_unsaid=lost_peers)
    record.end(follower, f"failed: {reason}")
    raise CptainError(f"train: {reason} (log: {how.log_file})")
