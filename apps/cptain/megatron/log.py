"""Megatron's training log, read back: one line a step, and what it says of validation and checkpoints."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_STEP = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
_FIELD = re.compile(r"([A-Za-z][A-Za-z0-9 ()/.-]*?):\s+([-+0-9.eEnaif]+)\s*\|")
_SET = re.compile(r"\| validation/(\S+) value: ([-+0-9.eEnaif]+)")  # cptain.training.validation names them so
# Megatron's own lines, and that of cptain's script when a rank ends. Adam's moments are not there after the first step.
_PEAK = re.compile(r"\[Rank (\d+)\] \((?!after 1 iterations)[^)]*\) memory \(MB\).*?max allocated: ([\d.]+)")
_VALIDATION = re.compile(r"validation loss at iteration (\d+).*?\| lm loss value: ([-+0-9.eE]+)")


@dataclass(frozen=True)
class Step:
    """One optimizer step as Megatron logged it.

    Attributes:
        number: from 1.
        steps: in all.
        loss: mean over the global batch, nats a token.
        learning_rate: of this step.
        grad_norm: before clipping.
        seconds: that the step took.
        sequences: consumed since the run began.
        global_batch_size: sequences in this step.
        tflops: TFLOP/s a GPU as Megatron counts them (causal attention half), or None.
    """

    number: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    sequences: int
    global_batch_size: int
    tflops: float | None = None


def parse_step(line: str) -> Step | None:
    """The step that a line of the log reports, or None."""
    if not (match := _STEP.search(line)):
        return None
    fields = {name.strip(): float(value) for name, value in _FIELD.findall(line[match.end() :])}
    try:
        return Step(
            number=int(match[1]),
            steps=int(match[2]),
            loss=fields["lm loss"],
            learning_rate=fields["learning rate"],
            grad_norm=fields.get("grad norm", float("nan")),
            seconds=fields["elapsed time per iteration (ms)"] / 1000,
            sequences=int(fields["consumed samples"]),
            global_batch_size=int(fields["global batch size"]),
            tflops=fields.get("throughput per GPU (TFLOP/s/GPU)"),
        )
    except KeyError:
        return None  # a step whose update was skipped logs no loss


def parse_validation(line: str) -> tuple[int, float] | None:
    """The step and the loss that a line of the log reports for the validation set, or None."""
    match = _VALIDATION.search(line)
    return (int(match[1]), float(match[2])) if match else None


def parse_validation_sets(line: str) -> dict[str, float]:
    """The loss of each validation set that the line of a validation reports; none where they have no names."""
    return {name: float(loss) for name, loss in _SET.findall(line)}


def read_steps(logs: Iterable[Path]) -> list[Step]:
    """The steps of a run from its logs, given oldest first; of a step that was trained twice the later one counts."""
    steps: dict[int, Step] = {}
    for log in logs:
        with open(log, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if step := parse_step(line):
                    steps[step.number] = step
    return [steps[number] for number in sorted(steps)]


def read_peaks(log: Path) -> dict[int, float]:
    """The most bytes that PyTorch had allocated, by rank, as far as the log says."""
    peaks: dict[int, float] = {}
    with open(log, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            for rank, megabytes in _PEAK.findall(line):
                peaks[int(rank)] = max(peaks.get(int(rank), 0.0), float(megabytes) * 2**20)
    return {rank: peak for rank, peak in peaks.items() if peak}


def train_logs(logs_folder: Path) -> list[Path]:
    """A run's training logs, oldest first."""
    return sorted(logs_folder.glob("train-*.log"))
