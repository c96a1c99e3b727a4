"""train: check everything that can be checked, start torchrun, follow it, and tell the truth about how it ended.

Megatron exits with status 0 after many failures (a missing checkpoint among them), so the verdict is not its exit
status alone: a run is done when the checkpoint's tracker says so.
"""

import ctypes
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from cptain import atomic
from cptain.architecture import Architecture, model_folder, read_architecture
from cptain.checkpoint.convert import check_converted_from
from cptain.checkpoint.export import check_checkpoint
from cptain.checkpoint.torch_dist import TRACKER, TorchDistReader, iteration_folder, read_tracker
from cptain.data.blend import write_blend
from cptain.data.manifest import Record, read_manifest
from cptain.data.steps import train_steps
from cptain.errors import RESUMABLE, CptainError, Interrupted, bad_usage
from cptain.progress import Progress, human
from cptain.run_file import RunFile
from cptain.training.flags import check_parallel, check_tokenizer, megatron_flags
from cptain.training.follow import Follower, failure_reason, last_lines, only_lost_peers
from cptain.training.nodes import Nodes, check_slots, own_address, read_nodes

_GRACE = 30.0  # seconds for torchrun to end its ranks after a second signal
_MARK = "CPTAIN_TRAINING"  # a variable that all processes of one training inherit
_LEFTOVERS = 2.0  # seconds for the processes of an ended torchrun to end by themselves
_TRIES = 2  # of a chain's jobs at one place
_LAST_WORD = 10.0  # seconds that a node which only lost its peers leaves them to say why, before it ends the job
_DRY_RUN_GPU_BYTES = 80 << 30  # where there is no GPU to ask


@dataclass(frozen=True)
class Command:
    """A training that is ready to start.

    Attributes:
        torchrun: the launcher's own arguments.
        script: the training script.
        flags: Megatron's, with their values.
        steps: optimizer steps in all.
        start: steps done before.
        nodes: the job's, where there are several.
        interface: the network interface towards the other nodes.
    """

    torchrun: list[str]
    script: Path
    flags: list[tuple[str, ...]]
    steps: int
    start: int
    nodes: Nodes | None = None
    interface: str = ""

    @property
    def is_first_node(self) -> bool:
        """Whether this node is the one of the job that writes what all share."""
        return self.nodes is None or self.nodes.rank == 0

    @property
    def argv(self) -> list[str]:
        """The whole command."""
        return [*self.torchrun, str(self.script), *(word for flag in self.flags for word in flag)]

    def shown(self) -> str:
        """The command for people and shells, one flag a line."""
        lines = [shlex.join([*self.torchrun, str(self.script)]), *(shlex.join(flag) for flag in self.flags)]
        return " \\\n  ".join(lines)


def _gpus() -> tuple[int, int]:
    """How many GPUs this process may use, and the bytes of the smallest.

    Without a CUDA context, which costs GPU memory.
    """
    import torch

    count = torch.cuda.device_count()
    if not count:
        return 0, 0
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return count, min(int(line) for line in answer.split()) << 20
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise CptainError(f"nvidia-smi does not say how much memory the GPUs have: {error}") from error


def _check_data(run: RunFile, tokenizer_folder: Path) -> list[Record]:
    records = read_manifest(run.data_folder, run.data.input)
    check_tokenizer(run, records, tokenizer_folder)
    for record in records:
        if wrong := record.missing_output(run.data_folder):
            raise CptainError(f"{wrong}: run preprocess again")
    return records


def _start(run: RunFile, architecture: Architecture) -> int | None:
    """The iteration that training resumes from, or None where it begins with the converted checkpoint.

    Raises:
        CptainError: the one that is needed is missing, incomplete, or not of this model.
    """
    resume = (run.checkpoints_folder / TRACKER).exists()
    root = run.checkpoints_folder if resume else run.megatron_folder
    try:
        iteration = read_tracker(root)
    except CptainError as error:
        raise error if resume else CptainError(f"{error} (run convert first)") from error
    with TorchDistReader(iteration_folder(root, iteration)) as reader:
        check_checkpoint(reader, architecture)
        reader.check_objects()
    if not resume:
        check_converted_from(root, architecture, model_folder(run.model.hf))
    return iteration if resume else None


def prepare(run: RunFile, cpu: bool = False, nproc_per_node: int | None = None, dry_run: bool = False) -> Command:
    """Check the run's inputs and build its command.

    Args:
        run: the run.
        cpu: train on the CPU, over gloo.
        nproc_per_node: processes; default: this machine's GPUs, or with `cpu` as many as hold one copy of the model.
        dry_run: do without a GPU where there is none.

    Raises:
        CptainError: anything missing, damaged or impossible, before a process is started.
    """
    architecture = read_architecture(model_folder(run.model.hf))
    nodes = read_nodes()
    count = len(nodes.hosts) if nodes else 1
    gpu_bytes = None
    if cpu:
        processes = nproc_per_node or math.ceil(run.parallel.model_size / count)
        if run.train.precision == "fp8":
            bad_usage('train.precision = "fp8": not on the CPU; allowed there: "fp32", "bf16"')
        if run.parallel.context > 1:
            bad_usage(f"parallel.context = {run.parallel.context}: not on the CPU, where Megatron's attention allows 1")
    else:
        gpus, gpu_bytes = _gpus()
        if not gpus and not dry_run:
            raise CptainError("no GPU found (inside a container, --nv is needed); --cpu trains without one")
        processes = nproc_per_node or gpus or run.parallel.model_size
        if gpus and processes > gpus:
            bad_usage(f"--nproc-per-node {processes}: there are {gpus} GPUs")
        gpu_bytes = gpu_bytes or _DRY_RUN_GPU_BYTES
        if nodes and (cores := os.environ.get("CPTAIN_CORES_PER_GPU")):
            check_slots(nodes, int(cores), processes)
    check_parallel(run, architecture, processes * count)
    tokenizer_folder = model_folder(run.tokenizer)
    records = _check_data(run, tokenizer_folder)
    start = _start(run, architecture)
    steps = train_steps(run, records)
    script = run.train.script or Path(__file__).with_name("pretrain.py")
    if not script.is_file():
        bad_usage(f"train.script = {script}: no such file")
    flags = megatron_flags(
        run,
        architecture,
        tokenizer_folder=tokenizer_folder,
        data_args=write_blend(run, records),
        steps=steps,
        resume=start is not None,
        gpu_bytes=gpu_bytes,
    )
    if cpu:
        flags = [("--cpu",), *flags]
    if deadline := _deadline():
        # Megatron counts in whole minutes; pretrain.py sets its clock so that they end at the deadline.
        flags += [("--exit-duration-in-mins", str(max(1, math.ceil((deadline - time.time()) / 60))))]
    flags += [(argument,) for argument in run.train.megatron_args]
    address, interface = own_address(nodes) if nodes else ("", "")
    rendezvous = nodes.torchrun(address) if nodes else ["--standalone"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", str(processes)]
    return Command(torchrun, script, flags, steps, start or 0, nodes, interface)


def _deadline() -> float | None:
    """When a job script wants training to be over, in seconds since the epoch."""
    value = os.environ.get("CPTAIN_DEADLINE")
    try:
        return float(value) if value else None
    except ValueError:
        bad_usage(f"CPTAIN_DEADLINE={value}: allowed: seconds since the epoch")


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


def _failure_file(run: RunFile) -> Path:
    return run.logs_folder / "train-failed.json"


def _failures(run: RunFile, start: int) -> tuple[int, str]:
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


def _refuse_to_fail_again(run: RunFile, command: Command) -> None:
    """In a chain of jobs, go on after a failure, which may have been a node's; not after a second at the same place."""
    times, reason = _failures(run, command.start)
    if times >= _TRIES and int(os.environ.get("CPTAIN_LINK") or 1) > 1:
        raise CptainError(
            f"train: failed {times} times at step {command.start} with nothing new saved, and is not tried again in "
            f"this chain: {reason} (submit.sh train export begins another)"
        )


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
    _refuse_to_fail_again(run, command)
    if (deadline := _deadline()) and deadline <= time.time():
        raise CptainError("train: no time is left in this job; the next one continues", RESUMABLE)
    failures, _ = _failures(run, command.start)
    run.logs_folder.mkdir(parents=True, exist_ok=True)
    node = f"-node{command.nodes.rank}" if command.nodes else ""
    log_file = run.logs_folder / f"train-{time.strftime('%Y%m%d-%H%M%S')}{node}.log"
    source = f"step {command.start} of {run.checkpoints_folder}" if command.start else f"{run.megatron_folder}"
    where = ""
    if command.nodes:
        where = f"node {command.nodes.rank + 1} of {len(command.nodes.hosts)}, rendezvous {command.nodes.endpoint}; "
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
    _verdict(run, command, follower, status, signalled, reason, log_file, failures)


def _verdict(
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
        late = (deadline := _deadline()) and time.time() >= deadline
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
    if not lost_peers or _failures(run, command.start)[0] == failures:  # the node that has the reason may have said it
        failure = {"start": command.start, "saved": saved, "times": failures + 1, "reason": reason}
        atomic.write_json(_failure_file(run), failure)
    raise CptainError(f"train: {reason} (log: {log_file})")
