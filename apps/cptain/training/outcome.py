"""How a training ended: the verdict, and what a chain of jobs remembers of attempts that saved nothing.

Megatron exits with status 0 after many failures (a missing checkpoint among them), and with another after a stop that
was asked for; so the verdict is what the checkpoints' tracker says, and only then the exit status.
"""

import os
import re
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cptain.checkpoint.tracker import iteration_folder
from cptain.errors import RESUMABLE, CptainError
from cptain.progress import human
from cptain.run_file import RunFile
from cptain.summary import say, tell
from cptain.training.attempt import Attempt
from cptain.training.follow import Follower, failure_reason, is_a_signal, last_lines, only_lost_peers
from cptain.training.health import DivergedError
from cptain.training.prepare import Command, deadline
from cptain.training.record import TrainingRecord

_LAST_WORD = 10.0  # seconds that a node which only lost its peers leaves them to say why, before it ends the job
# What Megatron says when a checkpoint cannot be written: never which file.
_DISK = re.compile("Worker failure|No space left|quota exceeded|PytorchStreamWriter|File too large", re.IGNORECASE)
_DIVERGED = f"{DivergedError.__name__}: "


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


def verdict(
    run: RunFile, command: Command, follower: Follower, how: Ended, attempt: Attempt, record: TrainingRecord
) -> None:
    """Say how training ended; raise unless every step is done and saved."""
    saved = record.saved
    if follower.first and follower.last:
        say(
            f"train: step {follower.last.number} of {command.steps}, loss {follower.first.loss:.4f} → "
            f"{follower.last.loss:.4f}, saved at step {saved}",
            step=follower.last.number,
            first_loss=follower.first.loss,
            loss=follower.last.loss,
        )
    tell(steps=command.steps, start=command.start, saved=saved, log=how.log_file)
    if saved > command.start:
        attempt.saved()
    if saved >= command.steps and how.status == 0:
        record.end(follower, "done")
        return
    reason = failure_reason(how.error_file, follower.tail)
    if how.status < 0:  # torchrun itself, which says of its ranks why they ended
        reason = signal.Signals(-how.status).name
    if follower.stuck:
        reason = f"a step did not end in {run.train.step_timeout} (train.step_timeout); the log has the ranks' stacks"
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


def _lost(reason: str, run: RunFile, saved: int) -> str:
    """What is left of a training whose loss is lost, and what to do."""
    good = f"the last good checkpoint is {iteration_folder(run.checkpoints_folder, saved)}"
    return (
        f"{reason}; {good if saved else 'nothing was saved before it'}; lower train.lr, or look at the data that comes "
        "next: the same command goes on from there"
    )


def _fail(
    run: RunFile,
    command: Command,
    follower: Follower,
    how: Ended,
    attempt: Attempt,
    record: TrainingRecord,
    reason: str,
) -> None:
    if diverged := reason.startswith(_DIVERGED):
        reason = _lost(reason.removeprefix(_DIVERGED), run, record.saved)
    elif _DISK.search(reason):
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
    if diverged:
        attempt.diverged(reason, record.saved)
    else:
        attempt.failed(reason, only_if_unsaid=lost_peers)
    record.end(follower, f"failed: {reason}")
    if "CPTAIN_LINK" in os.environ:
        print(f"train: {Attempt(run, record.saved).outlook()}", file=sys.stderr)
    raise CptainError(f"train: {reason} (log: {how.log_file})")
