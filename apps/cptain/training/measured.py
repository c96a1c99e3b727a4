"""What was predicted of a training and what it measured: a line a start in <run>/logs/plan.jsonl.

The line is a table of rates.toml with the prediction beside it, so that the run's next plan is scaled from its own
speed, and any other's may be. Only trainings on GPUs leave one.
"""

import json
import statistics
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cptain.history import now
from cptain.megatron.log import read_peaks, read_steps
from cptain.megatron_version import core_version
from cptain.model.architecture import Architecture
from cptain.run_file import RunFile
from cptain.training.layout import Layout
from cptain.training.memory import stage_memory
from cptain.training.rates import plan_log, predict, shape_of

_WARM = 4  # steps that a start takes to its full speed
_MEASURED = 3  # steps more, at least


@dataclass(frozen=True)
class Planned:
    """What a training's memory and speed follow from.

    Attributes:
        architecture: the model's.
        layout: with every "auto" decided.
        script: the training script, which says which Megatron it is.
    """

    architecture: Architecture
    layout: Layout
    script: Path


def _card() -> str:
    """The GPU's name."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "a GPU that nvidia-smi does not name"


def _torch() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "unknown"


def _peaks(run: RunFile, planned: Planned, log: Path) -> list[dict[str, Any]]:
    """Predicted and measured GiB of each pipeline stage; ranks of other nodes log elsewhere, and are not measured."""
    layout = planned.layout
    a_stage = layout.gpus // layout.pipeline
    found: dict[int, float] = {}
    for rank, peak in read_peaks(log).items():
        found[rank // a_stage] = max(peak, found.get(rank // a_stage, 0.0))
    return [
        {
            "stage": stage + 1,
            "predicted": round(stage_memory(run, planned.architecture, layout, stage).peak / 2**30, 2),
            "measured": round(found[stage] / 2**30, 2) if stage in found else None,
        }
        for stage in range(layout.pipeline)
    ]


def measured(run: RunFile, planned: Planned, log: Path) -> dict[str, Any] | None:
    """The line of a start that has ended; None where it did too few steps to be measured.

    Args:
        run: the run.
        planned: what it was planned as.
        log: of the start, on the node that sees the steps.
    """
    whole = [step for step in read_steps([log]) if step.global_batch_size == run.train.global_batch_size]
    steps = whole[_WARM:]
    if len(steps) < _MEASURED:
        return None
    a_step = statistics.median(step.seconds for step in steps)
    predicted = predict(run, planned.architecture, planned.layout)
    train, layout = run.train, planned.layout
    return {
        "time": now(),
        "where": f"{run.name}, {log.name}",
        "card": _card(),
        "megatron": "core {}.{}".format(*core_version(planned.script)),
        "torch": _torch(),
        "num_layers": planned.architecture.num_layers,
        "shape": shape_of(planned.architecture),
        "seq_length": train.seq_length,
        "global_batch_size": train.global_batch_size,
        "precision": train.precision,
        "megatron_args": train.megatron_args,
        "layout": asdict(layout),
        "tokens_per_second": round(train.tokens_per_step / a_step / layout.gpus, 1),
        "seconds": {"predicted": round(predicted[0], 4) if predicted else None, "measured": round(a_step, 4)},
        "peak_gib": _peaks(run, planned, log),
    }


def append(run: RunFile, planned: Planned, log: Path) -> None:
    """Add the line of a start that has ended to the run's plan.jsonl, where it was measured.

    Raises:
        OSError: the disk takes no more.
    """
    if line := measured(run, planned, log):
        with open(plan_log(run), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
