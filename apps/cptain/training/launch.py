"""train: start torchrun, pass a request to stop on to its ranks, and follow it to its end.

One training of a run at a time: the first node holds the run's lock, and a link of a chain waits for one whose node was
killed until it shows no sign of life. Signals are only noted (`stopping`); everything is done in one loop.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

from cptain.checkpoint.in_use import being_read
from cptain.data.in_use import in_use
from cptain.data.trained_on import tokens_of_tables
from cptain.data.validation import data_folders
from cptain.errors import RESUMABLE, CptainError, bad_usage
from cptain.lock import WATCHED, lock
from cptain.processes import read_of_all, stat_fields
from cptain.progress import Progress
from cptain.run_file import RunFile
from cptain.summary import say
from cptain.training import measured
from cptain.training.attempt import Attempt
from cptain.training.follow import Follower
from cptain.training.keep import keeping
from cptain.training.metrics import Metrics, check_wandb_is_installed
from cptain.training.nodes import read_nodes
from cptain.training.outcome import Ended, verdict
from cptain.training.prepare import Command, deadline, prepare
from cptain.training.record import TrainingRecord
from cptain.training.saved import SavedCheckpoints
from cptain.training.start import begin_from, branched_from, check_files
from cptain.training.stopping import Stop

_GRACE = 10.0  # seconds for torchrun to end once its ranks have
_MARK = "CPTAIN_TRAINING"  # a variable that all processes of one training inherit
_LEFTOVERS = 2.0  # seconds for the processes of an ended torchrun to end by themselves
# What --deterministic-mode asks for. Without them the fork ends (NCCL's), torch ends (cuBLAS's), and Transformer Engine
# takes an attention whose backward pass adds in any order.
DETERMINISTIC = {
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
_LOOK = 0.2  # seconds between two looks at what signals ask for


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
    if run.train.deterministic:
        environment |= DETERMINISTIC
    return environment


def _die_with_parent() -> None:
    """In torchrun, before it starts: get SIGTERM if cptain is killed, so that no rank outlives it."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _ranks(torchrun: int) -> list[int]:
    """The process ids of torchrun's children."""
    return [pid for pid, stat in read_of_all("stat") if int(stat_fields(stat.decode(errors="replace"))[1]) == torchrun]


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
    for pid, environment in read_of_all("environ"):
        if mark in environment.split(b"\0"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _end_now(process: "subprocess.Popen[str]") -> None:
    """End the ranks and torchrun by force: a rank amid a step would take no other word for it."""
    for pid in _ranks(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.terminate()
    try:
        process.wait(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()


def train(run: RunFile, cpu: bool = False, nproc_per_node: int | None = None, accepted: tuple[str, ...] = ()) -> None:
    """Train a run on this node until it is done, fails, or is stopped.

    Args:
        run: the run.
        cpu: see `prepare`.
        nproc_per_node: see `prepare`.
        accepted: see `prepare`.

    Raises:
        CptainError: exit status 75 where training stopped early and can be resumed, 1 where it failed, with the reason.
    """
    check_wandb_is_installed(run)
    nodes = read_nodes()
    first = nodes is None or nodes.rank == 0
    with ExitStack() as held:
        if first:
            held.enter_context(lock(run.folder / ".train.lock", f"train: {run.folder}", watch=WATCHED))
            if run.train.from_:  # which the other run may remove meanwhile
                held.enter_context(being_read(branched_from(run.train.from_)))
            for folder in data_folders(run):
                held.enter_context(in_use(folder, run.folder))
        command = prepare(run, cpu, nproc_per_node, accepted=accepted)
        if command.start > command.steps:
            bad_usage(f"train.steps = {command.steps}: {run.checkpoints_folder} is at step {command.start}, beyond it")
        if command.start == command.steps:
            say(
                f"train: all {command.steps} steps are done ({run.checkpoints_folder}); "
                "to train again, give the run another name",
                steps=command.steps,
                start=command.start,
                saved=command.start,
            )
            return
        if (ends := deadline()) and ends <= time.time():
            raise CptainError("train: no time is left in this job; the next one continues", RESUMABLE)
        attempt = Attempt(run, command.start)
        lines = check_files(command.source, nodes.rank if nodes else 0, command.node_count)
        if first:  # the others wait for it where they join
            attempt.begin()
            begin_from(run, command.start or None, command.repair_tracker)
            for line in (*command.lines, *lines):
                print(f"train: {line}", file=sys.stderr)
        _follow_to_the_end(run, command, attempt)


def _follow_to_the_end(run: RunFile, command: Command, attempt: Attempt) -> None:
    run.logs_folder.mkdir(parents=True, exist_ok=True)
    first = command.nodes is None or command.nodes.rank == 0  # which sees what Megatron says of saving
    node = f"-node{command.nodes.rank}" if command.nodes else ""
    log_file = run.logs_folder / f"train-{time.strftime('%Y%m%d-%H%M%S')}{node}.log"
    source = f"step {command.start} of {command.source.parent}" if command.start else f"{command.source.parent}"
    where = ""
    if command.nodes:
        where = f"node {command.nodes.rank + 1} of {len(command.nodes.hosts)}, rendezvous {command.nodes.endpoint}; "
    print(f"train: from {source} to step {command.steps}; {where}log: {log_file}", file=sys.stderr)
    record = TrainingRecord(run, command)
    with (
        tempfile.TemporaryDirectory(prefix="cptain-") as scratch,
        open(log_file, "wb", buffering=0) as log,
        Progress("train", command.steps, "step", done=command.start) as progress,
        keeping(run, command.start, progress.say) if first else nullcontext(lambda saved: None) as keep,
        Stop().listening() as stop,
    ):
        error_file = Path(scratch) / "error.json"
        metrics = Metrics(run, progress.say, command.start, tokens_of_tables(run, command.data))
        saved = SavedCheckpoints(run.checkpoints_folder, progress.say)
        follower = Follower(log, progress, run.train.seq_length, metrics, saved.add)
        follower.keep(command.shown() + "\n")
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

        def look() -> None:
            record.look(follower)
            keep(follower.saved)

        with ThreadPoolExecutor(1) as reader:
            read = reader.submit(follower.follow, process.stdout)
            try:
                _attend(process, read, stop, progress, look)
            except BaseException:
                _end_now(process)
                raise
            read.result()
        metrics.close()
        saved.close()
        status = process.wait()
        if command.planned and follower.last:
            with suppress(OSError):  # a disk that takes no more is said where it matters
                measured.append(run, command.planned, log_file)
        how = Ended(status, stop.signal_name, stop.at_once, error_file, log_file)
        verdict(run, command, follower, how, attempt, record)


def _attend(
    process: "subprocess.Popen[str]",
    read: "Future[None]",
    stop: Stop,
    progress: Progress,
    look: Callable[[], None],
) -> None:
    """Until all output is read: do what signals ask for, and `look` at what the output says."""
    asked = ended = False
    while not wait([read], timeout=_LOOK).done:
        look()
        if stop.signal_name and not asked:
            asked = True
            progress.say(f"train: {stop.signal_name}: saving after this step (again, 15 s later: end now)")
            _ask_to_stop(process)
        if stop.at_once and not ended:
            ended = True
            progress.say(f"train: {stop.signal_name} again: ending now, without saving")
            _end_now(process)
