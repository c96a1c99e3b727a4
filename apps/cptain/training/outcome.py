"""How a training ended: the verdict, and what a chain of jobs remembers of failures."""

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

from cptain import atomic
from cptain.checkpoint.torch_dist import TRACKER, read_tracker
from cptain.errors import RESUMABLE, CptainError
from cptain.progress import human
from cptain.run_file import RunFile
from cptain.training.follow import Follower, last_lines, only_lost_peers
from cptain.training.prepare import Command, deadline

_TRIES = 2  # of a chain's jobs at one place


_LAST_WORD = 10.0  # seconds that a node which only lost its peers leaves them to say why, before it ends the job


def _failure_file(run: RunFile) -> Path:
    return run.logs_folder / "train-failed.json"


def past_failures(run: RunFile, start: int) -> tuple[int, str]:
    """How many trainings in a row have failed with nothing new saved, and why the last did.

    Args:
        run: the run.
        start: steps done before, by all of them.
    """
    try:
        failure = json.loads(_failure_file(run).read_text(encoding="utf-8"))
        if failure["start"] == failure["saved"] == start:
            return int(failure["times"]), str(failure["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or one that cannot be read: it forbids nothing
    return 0, ""


def refuse_to_fail_again(run: RunFile, command: Command) -> None:
    """In a chain of jobs, go on after a failure, which may have been a node's; not after a second at the same place."""
    times, reason = past_failures(run, command.start)
    if times >= _TRIES and int(os.environ.get("CPTAIN_LINK") or 1) > 1:
        raise CptainError(
            f"train: failed {times} times at step {command.start} with nothing new saved, and is not tried again in "
            f"this chain: {reason} (submit.sh train export begins another)"
        )


def verdict(
    run: RunFile,
    command: Command,
    follower: Follower,
    status: int,
    signalled: str,
    reason: str,
    log_file: Path,
    failures: int,
) -> None:
    """Say how training ended; raise unless every step is done and saved."""
    saved = command.start
    if (run.checkpoints_folder / TRACKER).exists():
        saved = read_tracker(run.checkpoints_folder) or 0
    if follower.first and follower.last:
        print(
            f"train: step {follower.last.number} of {command.steps}, loss {follower.first.loss:.4f} → "
            f"{follower.last.loss:.4f}, saved at step {saved}",
            file=sys.stderr,
        )
    if saved >= command.steps and status == 0:
        _failure_file(run).unlink(missing_ok=True)
        return
    if signalled or (status == 0 and saved > command.start):
        _failure_file(run).unlink(missing_ok=True)
        late = (ends := deadline()) and time.time() >= ends
        how = f"by {signalled}" if signalled else "at the job's deadline" if late else "early"
        progress = f"saved at step {saved} of {command.steps}" if saved else "nothing saved yet"
        raise CptainError(f"train: stopped {how}; {progress}; the same command continues", RESUMABLE)
    if "Worker failure" in reason:  # all that Megatron says when a checkpoint cannot be written
        free = shutil.disk_usage(run.checkpoints_folder).free
        reason = f"{run.checkpoints_folder}: cannot be written ({human(free)}B free there): {reason}"
    if command.nodes:
        reason = f"{socket.gethostname()}: {reason}"
    if lost_peers := command.nodes is not None and only_lost_peers(reason):
        time.sleep(_LAST_WORD)
    if "CPTAIN_LINK" in os.environ:  # set by the job script: what is printed is the job's own log
        print(f"train: the last lines of {log_file}:", *last_lines(follower.tail), sep="\n  ", file=sys.stderr)
    if (
        not lost_peers or past_failures(run, command.start)[0] == failures
    ):  # the node that has the reason may have said it
        failure = {"start": command.start, "saved": saved, "times": failures + 1, "reason": reason}
        atomic.write_json(_failure_file(run), failure)
    raise CptainError(f"train: {reason} (log: {log_file})")
