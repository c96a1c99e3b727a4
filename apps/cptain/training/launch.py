"""train: start torchrun, pass signals on to it, and follow it to its end.

Megatron exits with status 0 after many failures (a missing checkpoint among them), so the verdict is not its exit
status alone: a run is done when the checkpoint's tracker says so.
"""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from cptain.errors import RESUMABLE, CptainError, Interrupted, bad_usage
from cptain.progress import Progress
from cptain.run_file import RunFile
from cptain.training.follow import Follower, failure_reason
from cptain.training.outcome import past_failures, refuse_to_fail_again, verdict
from cptain.training.prepare import Command, deadline

_GRACE = 30.0  # seconds for torchrun to end its ranks after a second signal
_MARK = "CPTAIN_TRAINING"  # a variable that all processes of one training inherit
_LEFTOVERS = 2.0  # seconds for the processes of an ended torchrun to end by themselves


def _environment(run: RunFile, command: Command, error_file: Path) -> dict[str, str]:
    environment = dict(os.environ)
    if command.interface:
        environment.setdefault("GLOO_SOCKET_IFNAME", command.interface)
        environment.setdefault("NCCL_SOCKET_IFNAME", command.interface)
    environment["PYTHONUNBUFFERED"] = "1"
    environment["TORCHELASTIC_ERROR_FILE"] = str(error_file)  # torchrun copies the first failing rank's error here
    environment[_MARK] = str(error_file)
    environment["WANDB_DIR"] = str(run.folder)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if run.parallel.tensor > 1 or run.parallel.context > 1:
        # Before Blackwell, Megatron orders communication by it.
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return environment


def _die_with_parent() -> None:
    """In torchrun, before it starts: get SIGTERM if cptain is killed, so that no rank outlives it."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _ranks(torchrun: int) -> list[int]:
    """The process ids of torchrun's children."""
    ranks = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == torchrun:
                ranks.append(int(stat.parent.name))
    return ranks


def _ask_to_stop(process: "subprocess.Popen[str]") -> None:
    """SIGTERM to every rank, which saves and stops after its step; torchrun itself would kill them after 30 s."""
    for pid in _ranks(process.pid) or [process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _end_what_is_left(process: "subprocess.Popen[str]", error_file: Path) -> None:
    """Once torchrun has ended, end what a killed rank left: Megatron's saving processes, which hold our pipe open.

    They are known by `_MARK`.
    """
    process.wait()
    time.sleep(_LEFTOVERS)
    mark = f"{_MARK}={error_file}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)


def _end_now(process: "subprocess.Popen[str]") -> None:
    """End torchrun, which ends its ranks; by force after a while."""
    process.terminate()
    try:
        process.wait(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        for pid in [*_ranks(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _alone(run: RunFile) -> Iterator[None]:
    """Refuse a second training of the same run: both would write its checkpoints. The lock ends with the process."""
    run.checkpoints_folder.mkdir(parents=True, exist_ok=True)
    with open(run.checkpoints_folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CptainError(f"train: another train is at work on {run.folder}") from None
        except OSError:
            pass  # a file system without locks, as some mounts of Lustre are
        yield


def train(run: RunFile, command: Command) -> None:
    """Start the command, follow it to its end, and raise unless the run is done.

    Raises:
        CptainError: exit status 75 where training stopped early and can be resumed, 1 where it failed, with the reason.
    """
    if command.start > command.steps:
        bad_usage(f"train.steps = {command.steps}: {run.checkpoints_folder} is at step {command.start}, beyond it")
    if command.start == command.steps:
        print(
            f"train: all {command.steps} steps are done ({run.checkpoints_folder}); "
            "to train again, give the run another name",
            file=sys.stderr,
        )
        return
    refuse_to_fail_again(run, command)
    if (ends := deadline()) and ends <= time.time():
        raise CptainError("train: no time is left in this job; the next one continues", RESUMABLE)
    failures, _ = past_failures(run, command.start)
    run.logs_folder.mkdir(parents=True, exist_ok=True)
    node = f"-node{command.nodes.rank}" if command.nodes else ""
    log_file = run.logs_folder / f"train-{time.strftime('%Y%m%d-%H%M%S')}{node}.log"
    source = f"step {command.start} of {run.checkpoints_folder}" if command.start else f"{run.megatron_folder}"
    where = ""
    if command.nodes:
        where = f"node {command.nodes.rank + 1} of {len(command.nodes.hosts)}, rendezvous {command.nodes.endpoint}; "
    print(*command.data, sep="\n", file=sys.stderr)
    print(f"train: from {source} to step {command.steps}; {where}log: {log_file}", file=sys.stderr)
    signalled = ""
    with (
        _alone(run) if command.is_first_node else nullcontext(),
        tempfile.TemporaryDirectory(prefix="cptain-") as scratch,
        open(log_file, "w", encoding="utf-8") as log,
        Progress("train", command.steps, "step", done=command.start) as progress,
    ):
        error_file = Path(scratch) / "error.json"
        log.write(command.shown() + "\n")
        follower = Follower(log, progress, run.train.seq_length)
        process = subprocess.Popen(
            command.argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment(run, command, error_file),
            start_new_session=True,  # Ctrl-C reaches cptain alone, which lets the ranks save
            preexec_fn=_die_with_parent,
        )
        assert process.stdout is not None
        threading.Thread(target=_end_what_is_left, args=(process, error_file), daemon=True).start()
        with ThreadPoolExecutor(1) as reader:  # in this thread a signal would lose the line that it comes amid
            read = reader.submit(follower.follow, process.stdout)
            while True:
                try:
                    read.result()
                    status = process.wait()
                    break
                except Interrupted as interrupt:
                    if signalled:
                        progress.say(f"train: {interrupt.signal_name} again: ending now, without saving")
                        _end_now(process)
                        status = process.returncode
                        break
                    signalled = interrupt.signal_name
                    progress.say(f"train: {signalled}: saving after this step (again: end now)")
                    _ask_to_stop(process)
        reason = failure_reason(error_file, follower.tail)
    verdict(run, command, follower, status, signalled, reason, log_file, failures)
