"""Everything that can be checked before a training starts, and the command that starts it."""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cptain.data.blend_file import blend_flag
from cptain.data.check import check_data
from cptain.data.epochs import first_lines
from cptain.data.steps import train_steps
from cptain.data.trained_on import other_data, trained_on
from cptain.data.validation import check_validation, validation_file, write_validation
from cptain.data.vocabulary import run_architecture
from cptain.errors import CptainError, bad_usage
from cptain.history import read_history, stretches
from cptain.model.architecture import Architecture
from cptain.run_file import RunFile, changed_keys
from cptain.toml_file import seconds
from cptain.training.changes import check_changes
from cptain.training.fit import settle
from cptain.training.flags import check_parallel, megatron_flags
from cptain.training.measured import Planned
from cptain.training.nodes import Nodes, check_as_asked, check_slots, own_address, read_nodes
from cptain.training.start import Beginning, beginning

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
        source: the checkpoint that is loaded.
        nodes: the job's, where there are several.
        interface: the network interface towards the other nodes.
        processes: of all nodes together.
        data: what it trains on (`cptain.data.blend`).
        accepted: what --accept let pass.
        lines: what the user should know before it starts.
        repair_tracker: the checkpoints' tracker does not name the iteration that training resumes from.
        planned: what its memory and speed are predicted from; None on the CPU.
    """

    torchrun: list[str]
    script: Path
    flags: list[tuple[str, ...]]
    steps: int
    start: int
    source: Path = Path()
    nodes: Nodes | None = None
    interface: str = ""
    processes: int = 1
    data: dict[str, Any] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    repair_tracker: bool = False
    planned: Planned | None = None

    @property
    def node_count(self) -> int:
        """How many nodes train."""
        return len(self.nodes.hosts) if self.nodes else 1

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


def _since_then(
    run: RunFile, begins: Beginning, data: dict[str, Any], accepted: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """Compare a run that goes on with what trained the step that it goes on from.

    Returns:
        What to tell the user, and what was accepted.

    Raises:
        CptainError: what cannot be changed was, or other data is not accepted.
    """
    start, trained_by = begins.steps_done, begins.source.parent.parent  # the run, or the one that it branches off
    done = stretches(read_history(trained_by), start) if start else []
    if not done:
        return [], []
    before = done[-1][0]
    passed: list[str] = []
    if other := other_data(before.data, data, start):
        if "data" not in accepted:
            raise CptainError(
                f"train: step {start} of {begins.source.parent} was trained on other data: {other}: "
                "give the run another name, or train with --accept data"
            )
        passed.append(f"data: {other}")
    resolved = run.model_dump(mode="json", exclude_none=True)
    lines = [f"changed since step {start}: {change}" for change in changed_keys(before.run, resolved)]
    return [*lines, *check_changes(before.run, run)], passed


def _processes(
    run: RunFile, architecture: Architecture, nodes: Nodes | None, cpu: bool, nproc_per_node: int | None, dry_run: bool
) -> tuple[int, int | None]:
    """How many processes this node trains with, and the bytes of a GPU; None on the CPU. Arguments and errors are those
    of `prepare`."""
    if cpu:
        check_as_asked(nodes, None)
        if run.train.precision == "fp8":
            bad_usage('train.precision = "fp8": not on the CPU; allowed there: "fp32", "bf16"')
        if run.parallel.context > 1:
            bad_usage(f"parallel.context = {run.parallel.context}: not on the CPU, where Megatron's attention allows 1")
        if architecture.mixture and run.parallel.tensor > 1:
            bad_usage(
                f"parallel.tensor = {run.parallel.tensor}: not on the CPU for a mixture of experts: Megatron asks for "
                "sequence parallelism then, which its layers without Transformer Engine lack: use parallel.expert"
            )
        count = len(nodes.hosts) if nodes else 1
        return nproc_per_node or math.ceil(run.parallel.least_gpus / count), None
    gpus, gpu_bytes = _gpus()
    if not gpus and not dry_run:
        raise CptainError("no GPU found (inside a container, --nv is needed); --cpu trains without one")
    check_as_asked(nodes, gpus)
    processes = nproc_per_node or gpus or run.parallel.least_gpus
    if gpus and processes > gpus:
        bad_usage(f"--nproc-per-node {processes}: there are {gpus} GPUs")
    if nodes and (cores := os.environ.get("CPTAIN_CORES_PER_GPU")):
        check_slots(nodes, int(cores), processes)
    return processes, gpu_bytes or _DRY_RUN_GPU_BYTES


def _script(run: RunFile) -> Path:
    script = run.train.script or Path(__file__).with_name("pretrain.py")
    if not script.is_file():
        bad_usage(f"train.script = {script}: no such file")
    return script


def _own_flags(run: RunFile, cpu: bool, blend: tuple[str, str], validation_sets: Path | None) -> list[tuple[str, ...]]:
    """Those of cptain's training script; of them, another one gets --cpu, and Megatron's flag for the blend."""
    flags: list[tuple[str, ...]] = [("--cpu",)] if cpu else []
    flags += [blend]
    if run.train.script is None:
        flags += [("--max-loss-spike", repr(run.train.max_loss_spike))]
        flags += [("--step-timeout", str(seconds(run.train.step_timeout)))]
        flags += [("--megatron-args", str(len(run.train.megatron_args)))]
        flags += [("--z-loss", repr(run.train.z_loss))] if run.train.z_loss else []
        flags += [("--batch-ramp", json.dumps(run.train.batch_ramp))] if run.train.batch_ramp else []
    if validation_sets:
        flags += [("--validation-sets", str(validation_sets))]
    return flags


def _torchrun(nodes: Nodes | None, processes: int) -> tuple[list[str], str]:
    """torchrun's own arguments on this node, and the network interface towards the others."""
    address, interface = own_address(nodes) if nodes else ("", "")
    rendezvous = nodes.torchrun(address) if nodes else ["--standalone"]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return [*launcher, *rendezvous, "--nproc-per-node", str(processes)], interface


def prepare(
    run: RunFile,
    cpu: bool = False,
    nproc_per_node: int | None = None,
    dry_run: bool = False,
    accepted: tuple[str, ...] = (),
    write: bool = True,
) -> Command:
    """Check the run's inputs and build its command.

    Args:
        run: the run.
        cpu: train on the CPU, over gloo.
        nproc_per_node: processes; default: this machine's GPUs, or with `cpu` as many as hold the model.
        dry_run: do without a GPU where there is none.
        accepted: what would be refused and is not: "data", that a run goes on with other data.
        write: the files that the command names; False writes nothing, and the command is to be looked at alone.

    Raises:
        CptainError: anything missing, damaged or impossible, before a process is started.
    """
    architecture, nodes = run_architecture(run), read_nodes()
    processes, gpu_bytes = _processes(run, architecture, nodes, cpu, nproc_per_node, dry_run)
    in_all = processes * (len(nodes.hosts) if nodes else 1)
    check_parallel(run, architecture, in_all)
    records = check_data(run)
    begins = beginning(run, architecture)
    steps = train_steps(run, records)
    exposure = first_lines(run, records, steps)
    sets = check_validation(run, records)
    data = trained_on(run, records, steps)
    changes, passed = _since_then(run, begins, data, accepted)
    layout, why = settle(run, architecture, in_all, gpu_bytes)
    flags = megatron_flags(
        run,
        architecture,
        script=_script(run),
        steps=steps,
        begins=begins,
        layout=layout,
        cpu=gpu_bytes is None,
    )
    validation = write_validation(run, sets) if write else validation_file(run, sets)
    own = _own_flags(run, cpu, blend_flag(run, records, steps, write), validation)
    last = [*_until_deadline(), *((one,) for one in run.train.megatron_args)]
    torchrun, interface = _torchrun(nodes, processes)
    return Command(
        torchrun=torchrun,
        script=_script(run),
        flags=[*own, *flags, *last],
        steps=steps,
        start=begins.steps_done,
        source=begins.source,
        nodes=nodes,
        interface=interface,
        processes=in_all,
        data=data,
        accepted=passed,
        lines=[*exposure, *map(str, sets), *begins.lines, *why, *changes],
        repair_tracker=begins.repair_tracker,
        planned=Planned(architecture, layout, _script(run)) if gpu_bytes else None,
    )


def _until_deadline() -> list[tuple[str, ...]]:
    """Megatron counts in whole minutes; pretrain.py sets its clock so that they end at the deadline."""
    ends = deadline()
    if ends is None:
        return []
    return [("--exit-duration-in-mins", str(max(1, math.ceil((ends - time.time()) / 60))))]


def deadline() -> float | None:
    """When a job script wants training to be over, in seconds since the epoch."""
    value = os.environ.get("CPTAIN_DEADLINE")
    try:
        return float(value) if value else None
    except ValueError:
        bad_usage(f"CPTAIN_DEADLINE={value}: allowed: seconds since the epoch")
