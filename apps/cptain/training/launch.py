"""train: check everything that can be checked, start torchrun, follow it, and tell the truth about how it ended.

Megatron exits with status 0 after many failures (a missing checkpoint among them), so the verdict is not its exit
status alone: a run is done when the checkpoint's tracker says so.
"""

import ctypes
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from cptain.architecture import Architecture, model_folder, read_architecture
from cptain.checkpoint.convert import check_converted_from
from cptain.checkpoint.export import check_checkpoint
from cptain.checkpoint.torch_dist import TRACKER, TorchDistReader, iteration_folder, read_tracker
from cptain.data.blend import write_blend
from cptain.data.manifest import Record, read_manifest
from cptain.errors import RESUMABLE, CptainError, Interrupted, bad_usage
from cptain.progress import Progress, human
from cptain.run_file import RunFile
from cptain.training.flags import check_parallel, check_tokenizer, megatron_flags, train_steps
from cptain.training.log import Step, parse_step, parse_validation

_GRACE = 30.0  # seconds for torchrun to end its ranks after a second signal
_DRY_RUN_GPU_BYTES = 80 << 30  # where there is no GPU to ask
_ERROR_LINE = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)")
_USAGE_LINE = re.compile(r"^\S+\.py: error: (.+)")
_ERROR_LOG_LINE = re.compile(r"^ERROR:[\w.]+:\s*(.+)")
_SIGNAL_LINE = re.compile(r"Signal \d+ \((SIG\w+)\) received")


@dataclass(frozen=True)
class Command:
    """A training that is ready to start.

    Attributes:
        torchrun: the launcher's own arguments.
        script: the training script.
        flags: Megatron's, with their values.
        steps: optimizer steps in all.
        start: steps done before.
    """

    torchrun: list[str]
    script: Path
    flags: list[tuple[str, ...]]
    steps: int
    start: int

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
    if not resume:
        check_converted_from(root, architecture)
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
    gpu_bytes = None
    if cpu:
        processes = nproc_per_node or run.parallel.model_size
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
    check_parallel(run, architecture, processes)
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
    flags += [(argument,) for argument in run.train.megatron_args]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return Command(torchrun, script, flags, steps, start or 0)


def _environment(run: RunFile, error_file: Path) -> dict[str, str]:
    environment = dict(os.environ)
    environment["PYTHONUNBUFFERED"] = "1"
    environment["TORCHELASTIC_ERROR_FILE"] = str(error_file)  # torchrun copies the first failing rank's error here
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


class _Follower:
    """Reads the training's output line by line: all of it into the log file, the gist of it onto stderr."""

    def __init__(self, log: TextIO, progress: Progress, seq_length: int) -> None:
        self.log, self.progress, self.seq_length = log, progress, seq_length
        self.first: Step | None = None
        self.last: Step | None = None
        self.tail: deque[str] = deque(maxlen=400)
        self._validated = 0

    def line(self, line: str) -> None:
        self.log.write(line)
        self.log.flush()
        self.tail.append(line.rstrip("\n"))
        if step := parse_step(line):
            self.first = self.first or step
            speed = step.global_batch_size * self.seq_length / max(step.seconds, 1e-9)
            note = f"loss {step.loss:.4f}  lr {step.learning_rate:.3g}  {human(speed)} tokens/s"
            self.progress.advance(step.number - self.progress.done, note)
            self.last = step
        elif (validation := parse_validation(line)) and validation[0] != self._validated:
            self._validated = validation[0]  # Megatron evaluates once more after the last step
            self.progress.say(f"train: step {validation[0]}: validation loss {validation[1]:.4f}")
        elif "successfully saved checkpoint" in line:
            self.progress.say(f"train: step {self.last.number if self.last else '?'}: saved")


def _reason(error_file: Path, tail: "deque[str]") -> str:
    """Why training failed: the first failing rank's exception, else the last thing in the log that looks like one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        message = json.loads(error_file.read_text(encoding="utf-8"))["message"]
        text = message["message"] if isinstance(message, dict) else message
        if _ERROR_LINE.match(text):
            return " ".join(text.split())
    for pattern in (_ERROR_LINE, _USAGE_LINE, _ERROR_LOG_LINE, _SIGNAL_LINE):
        for line in reversed(tail):
            if (match := pattern.search(line)) and "ChildFailedError" not in line:
                return match[1]
    return next((line.strip() for line in reversed(tail) if line.strip()), "it printed nothing")


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
    run.logs_folder.mkdir(parents=True, exist_ok=True)
    log_file = run.logs_folder / f"train-{time.strftime('%Y%m%d-%H%M%S')}.log"
    source = f"step {command.start} of {run.checkpoints_folder}" if command.start else f"{run.megatron_folder}"
    print(f"train: from {source} to step {command.steps}; log: {log_file}", file=sys.stderr)
    signalled = ""
    with (
        _alone(run),
        tempfile.TemporaryDirectory(prefix="cptain-") as scratch,
        open(log_file, "w", encoding="utf-8") as log,
        Progress("train", command.steps, "step", done=command.start) as progress,
    ):
        error_file = Path(scratch) / "error.json"
        log.write(command.shown() + "\n")
        follower = _Follower(log, progress, run.train.seq_length)
        process = subprocess.Popen(
            command.argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment(run, error_file),
            start_new_session=True,  # Ctrl-C reaches cptain alone, which lets the ranks save
            preexec_fn=_die_with_parent,
        )
        assert process.stdout is not None
        while True:
            try:
                for line in process.stdout:
                    follower.line(line)
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
        reason = _reason(error_file, follower.tail)
    _verdict(run, command, follower, status, signalled, reason, log_file)


def _verdict(
    run: RunFile, command: Command, follower: _Follower, status: int, signalled: str, reason: str, log_file: Path
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
        return
    if signalled or (status == 0 and saved > command.start):
        how = f"by {signalled}" if signalled else "early"
        progress = f"saved at step {saved} of {command.steps}" if saved else "nothing saved yet"
        raise CptainError(f"train: stopped {how}; {progress}; the same command continues", RESUMABLE)
    if "Worker failure" in reason:  # all that Megatron says when a checkpoint cannot be written
        free = shutil.disk_usage(run.checkpoints_folder).free
        reason = f"{run.checkpoints_folder}: cannot be written ({human(free)}B free there): {reason}"
    raise CptainError(f"train: {reason} (log: {log_file})")
