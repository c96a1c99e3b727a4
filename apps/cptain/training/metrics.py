"""What a training measures, a line a step in <run>/logs/metrics.jsonl; the same for TensorBoard and Weights & Biases.

All of it comes from Megatron's log, on the node that sees it: three Megatrons log to W&B in three ways, none of which
survives a resume, and a reporter of metrics must never end a training. The axis is the tokens that the run has seen,
which no restart sets back. A chain of jobs is one run in the browser: its id is kept in the run's folder.
"""

import importlib.util
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
from urllib.parse import SplitResult, urlsplit

from cptain import atomic
from cptain.errors import bad_usage, one_line
from cptain.megatron.log import Step
from cptain.run_file import RunFile
from cptain.training.event_file import EventFile
from cptain.training.ledger import Sums

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
        start: steps that are done.
        tokens: to train on of each domain, by name.
    """

    def __init__(self, run: RunFile, say: Say, start: int = 0, tokens: dict[str, int] | None = None) -> None:
        self._run, self._say, self._start, self._of_domain = run, say, start, tokens or {}
        self._seen: dict[str, int] | None = None  # tokens of each domain so far, once it is asked for
        self._file: Any = None
        self._others = [_Other("TensorBoard", self._begin_event_file, say)]
        if run.wandb is not None:
            self._others.append(_Other("Weights & Biases", lambda _: _Wandb(run, say), say))
        self._tokens = 0

    def step(self, step: Step, domains: dict[str, Sums] | None = None) -> None:
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
                **(self._ledger(domains) if domains else {}),
            },
        )

    def _ledger(self, domains: dict[str, Sums]) -> dict[str, float | None]:
        """Loss, tokens and epochs of each domain, the last two in all; these go on from what is recorded at the step
        that was begun from, here or by the run that this one branches off, and are left out where nothing is."""
        if self._seen is None:
            self._seen = self._seen_before()
        found: dict[str, float | None] = {}
        for name, (tokens, trained, losses) in domains.items():
            found[f"loss/{name}"] = losses / trained if trained else None
            if self._seen is not None:
                self._seen[name] = self._seen.get(name, 0) + tokens
                found[f"tokens/{name}"] = self._seen[name]
                found[f"epochs/{name}"] = self._seen[name] / of if (of := self._of_domain.get(name)) else None
        return found

    def _seen_before(self) -> dict[str, int] | None:
        if not self._start:
            return {}
        folders = [self._run.folder, *([self._run.train.from_.run] if self._run.train.from_ else [])]
        for folder in folders:
            line = read_metrics(folder / "logs" / "metrics.jsonl").get(self._start, {})
            if found := {name[7:]: int(line[name]) for name in line if name.startswith("tokens/")}:
                return found
        return None

    def validation(self, number: int, loss: float, sets: dict[str, float]) -> None:
        """The loss after a step: of all that is validated on, and of each set that has a name."""
        self._take(number, {"validation_loss": loss, **{f"validation_loss/{name}": sets[name] for name in sets}})

    def _take(self, number: int, values: dict[str, float | None]) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        line = {"step": number, "tokens": self._tokens, **known}
        try:
            if self._file is None:
                self._file = self._opened()
            self._file.write((json.dumps({**line, "time": round(time.time(), 1)}) + "\n").encode())
        except OSError as error:
            self._say(f"train: {metrics_file(self._run)}: cannot be written: {error.strerror}")
        for other in self._others:
            other.log(line, number)

    def _opened(self) -> Any:
        opened = open(metrics_file(self._run), "ab+", buffering=0)  # noqa: SIM115 `close` does; each line is there at once
        if end := opened.seek(0, os.SEEK_END):
            opened.seek(end - 1)
            if opened.read(1) != b"\n":  # the half line of a process that was killed
                opened.write(b"\n")
        return opened

    def _begin_event_file(self, tokens: int) -> Any:
        try:
            return EventFile(self._run.logs_folder, tokens)
        except ModuleNotFoundError:
            return _Nothing()  # nobody has asked for it

    def close(self) -> None:
        """Send the rest, and close."""
        if self._file is not None:
            self._file.close()
        for other in self._others:
            other.finish()


class _Other:
    """Where the numbers go besides. Whatever goes wrong there is said once, and is no reason to stop training.

    Args:
        name: for people.
        begin: begins it, with the first numbers and the tokens that they stand at.
        say: prints a line for people.
    """

    def __init__(self, name: str, begin: Callable[[int], Any], say: Say) -> None:
        self._name, self._begin, self._say = name, begin, say
        self._to: Any = None

    def log(self, line: dict[str, Any], number: int) -> None:
        """The numbers of one step."""
        try:
            if self._to is None:
                self._to = self._begin(line["tokens"])
            self._to.log(line, step=number)
        except Exception as error:
            self._to = _Nothing()
            self._say(f"train: {self._name}: {one_line(error)}: training goes on without it")

    def finish(self) -> None:
        """Send the rest, and close."""
        try:
            if self._to is not None:
                self._to.finish()
        except Exception as error:
            self._say(f"train: {self._name}: {one_line(error)}")


class _Nothing:
    """In the place of one that failed, or is not there."""

    def log(self, line: dict[str, Any], step: int) -> None: ...

    def finish(self) -> None: ...


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The metrics as they came, those of steps that were done again too; none where nothing was trained.

    A line that a killed process left half-written is left out.
    """
    try:
        return parse_lines(file.read_bytes())
    except FileNotFoundError:
        return []


def parse_lines(content: bytes) -> list[dict[str, Any]]:
    """The lines that are whole."""
    found = []
    for line in content.splitlines():
        with suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            found.append({**values, "step": int(values["step"])})
    return found


def read_metrics(file: Path) -> dict[int, dict[str, Any]]:
    """The metrics of a run by step, validation among them; of a step that was done again the later one counts."""
    found: dict[int, dict[str, Any]] = {}
    for values in read_lines(file):
        found.setdefault(values["step"], {}).update(values)
    return found


def check_wandb_is_installed(run: RunFile) -> None:
    """Refuse a run that asks for Weights & Biases where it cannot be imported.

    Raises:
        CptainError: exit status 2; it cannot.
    """
    if run.wandb and os.environ.get("WANDB_MODE") != "disabled" and importlib.util.find_spec("wandb") is None:
        bad_usage(
            "[wandb] is asked for, and wandb cannot be imported here: pip install wandb (make image puts it into an "
            "image), or WANDB_MODE=disabled"
        )


def _wandb_url() -> SplitResult:
    return urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def has_wandb_key() -> bool:
    """Whether there is a key of Weights & Biases, in the environment or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, NetrcParseError):
        return netrc(os.environ.get("NETRC")).authenticators(_wandb_url().hostname or "") is not None
    return False


def _why_offline() -> str:
    """Why W&B cannot be reached from here; empty where it can."""
    if os.environ.get("WANDB_MODE"):
        return ""  # the user's own word
    if not has_wandb_key():
        return "no key (WANDB_API_KEY)"
    return _why_unreachable(_wandb_url().hostname or "", _wandb_url().port or 443)


def _why_unreachable(host: str, port: int) -> str:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return ""  # the way out is the proxy's
    try:
        with socket.create_connection((host, port), timeout=_REACHABLE_IN):
            return ""
    except OSError as error:
        return f"{host} cannot be reached from here ({error.strerror or one_line(error)})"


class _Wandb:
    """The run on W&B."""

    def __init__(self, run: RunFile, say: Say) -> None:
        self._run = _begin_wandb(run, say)

    def log(self, line: dict[str, Any], step: int) -> None:
        self._run.log(line, step=step)

    def finish(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # only then its own process has written everything


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
