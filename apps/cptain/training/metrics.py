"""What a training measures, a line a step in <run>/logs/metrics.jsonl, and the same numbers on Weights & Biases.

All of it comes from Megatron's log, on the node that sees it: three Megatrons log to W&B in three ways, none of which
survives a resume, and a reporter of metrics must never end a training. The axis is the tokens that the run has seen,
which no restart sets back. A chain of jobs is one run in the browser: its id is kept in the run's folder.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cptain import atomic
from cptain.errors import one_line
from cptain.megatron.log import Step
from cptain.run_file import RunFile

_REACHABLE_IN = 3.0  # seconds; wandb itself would try for 90

Say = Callable[[str], None]


def metrics_file(run: RunFile) -> Path:
    """Where the metrics are: JSON objects with step and tokens, a line each."""
    return run.logs_folder / "metrics.jsonl"


class Metrics:
    """Takes the numbers as they come.

    Args:
        run: the run.
        say: prints a line for people.
    """

    def __init__(self, run: RunFile, say: Say) -> None:
        self._run, self._say = run, say
        self._file: Any = None
        self._wandb: Any = None
        self._tokens = 0

    def step(self, step: Step) -> None:
        """One optimizer step."""
        self._tokens = step.sequences * self._run.train.seq_length
        self._take(
            step.number,
            {
                "loss": step.loss,
                "learning_rate": step.learning_rate,
                "grad_norm": step.grad_norm,
                "step_seconds": step.seconds,
                "tokens_per_second": step.global_batch_size * self._run.train.seq_length / max(step.seconds, 1e-9),
                "tflops_per_gpu": step.tflops,
            },
        )

    def validation(self, number: int, loss: float) -> None:
        """The loss of the validation set after a step."""
        self._take(number, {"validation_loss": loss})

    def _take(self, number: int, values: dict[str, float | None]) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        line = {"step": number, "tokens": self._tokens, **known}
        try:
            if self._file is None:
                self._file = self._opened()
            self._file.write((json.dumps({**line, "time": round(time.time(), 1)}) + "\n").encode())
        except OSError as error:
            self._say(f"train: {metrics_file(self._run)}: cannot be written: {error.strerror}")
        if self._run.wandb is None:
            return
        try:
            if self._wandb is None:
                self._wandb = _begin_wandb(self._run, self._say)
            self._wandb.log(line, step=number)
        except Exception as error:  # whatever it is, it is no reason to stop training
            self._wandb = _Nothing()
            self._say(f"train: Weights & Biases: {one_line(error)}: training goes on without it")

    def _opened(self) -> Any:
        file = metrics_file(self._run)
        ends_amid_a_line = file.exists() and not file.read_bytes().endswith(b"\n")
        opened = open(file, "ab", buffering=0)  # noqa: SIM115 closed by `close`; unbuffered, for whoever reads along
        if ends_amid_a_line:  # of a process that was killed
            opened.write(b"\n")
        return opened

    def close(self) -> None:
        """Send the rest, and close."""
        if self._file is not None:
            self._file.close()
        try:
            if self._wandb is not None:
                import wandb

                self._wandb.finish()
                wandb.teardown()  # only then its own process has written everything
        except Exception as error:
            self._say(f"train: Weights & Biases: {one_line(error)}")


class _Nothing:
    """In the place of a W&B run that failed."""

    def log(self, line: dict[str, Any], step: int) -> None: ...

    def finish(self) -> None: ...


def read_metrics(file: Path) -> dict[int, dict[str, Any]]:
    """The metrics of a run by step, validation among them.

    Of a step that was trained twice the later one counts; a line that a killed process left half-written is left out.
    """
    found: dict[int, dict[str, Any]] = {}
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            values = json.loads(line)
            found.setdefault(int(values["step"]), {}).update(values)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _why_offline() -> str:
    """Why W&B cannot be reached from here; empty where it can."""
    if os.environ.get("WANDB_MODE"):
        return ""  # the user's own word
    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urlsplit(base).hostname or ""
    with suppress(OSError, NetrcParseError):
        if os.environ.get("WANDB_API_KEY") or netrc(os.environ.get("NETRC")).authenticators(host):
            return _why_unreachable(host, urlsplit(base).port or 443)
    return "no key (WANDB_API_KEY)"


def _why_unreachable(host: str, port: int) -> str:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return ""  # the way out is the proxy's
    try:
        with socket.create_connection((host, port), timeout=_REACHABLE_IN):
            return ""
    except OSError as error:
        return f"{host} cannot be reached from here ({error.strerror or one_line(error)})"


def _begin_wandb(run: RunFile, say: Say) -> Any:
    """The run on W&B, begun or continued; offline where there is no key or no way out."""
    import wandb

    assert run.wandb is not None
    folder = run.folder / "wandb"
    id_file = folder / "id"
    if not id_file.exists():
        atomic.write_text(id_file, uuid.uuid4().hex[:12])
    why = _why_offline()
    begun = wandb.init(
        project=run.wandb.project,
        entity=run.wandb.entity or os.environ.get("WANDB_ENTITY"),
        name=run.name,
        id=id_file.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(run.folder),
        config=run.model_dump(mode="json", exclude_none=True),
        mode="offline" if why else None,
        settings=wandb.Settings(silent=True, console="off"),
    )
    begun.define_metric("tokens")
    begun.define_metric("*", step_metric="tokens")
    if begun.offline or why:
        say(
            f"train: Weights & Biases is offline{': ' + why if why else ''}; "
            f"to send it later: wandb sync --append {folder}/offline-run-*"
        )
    else:
        say(f"train: Weights & Biases: {begun.url}")
    return begun
