"""What a training's output says while it runs, and why it failed."""

import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from cptain.megatron.log import Step, parse_step, parse_validation, parse_validation_sets
from cptain.progress import Progress, human
from cptain.training.health import SAID, STUCK
from cptain.training.ledger import DOMAINS, Sums
from cptain.training.metrics import Metrics

_LAST_LINES = 20
_SAVED = re.compile(r"successfully saved checkpoint from iteration\s+(\d+)")
_ERROR_LINE = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)")
_USAGE_LINE = re.compile(r"^\S+\.py: error: (.+)")
_ERROR_LOG_LINE = re.compile(r"^ERROR:[\w.]+:\s*(.+)")
_LOST_PEERS = re.compile(r"Connection closed by peer|Connection reset|Broken pipe|ECONN|NCCL|gloo|Rendezvous", re.I)
# Where torchrun begins to speak of a failure; what the ranks said is before it.
_TORCHRUN_REPORT = re.compile(r"failed \(exitcode|Sending process \d+ closing signal|<frozen runpy>")
_NATIVE_FRAME = re.compile(r"frame #\d+: ")
_SIGNAL = re.compile(r"^SIG[A-Z]+$|SignalException")
_SIGNAL_LINE = re.compile(r"Signal \d+ \((SIG\w+)\) received")


class Follower:
    """Reads the training's output line by line: all of it into the log file, the gist of it onto stderr.

    Args:
        log: the file.
        progress: the bar.
        seq_length: tokens of a sequence.
        metrics: told every step and validation.
        saved: told every iteration that is saved whole, on the node of rank 0.
    """

    def __init__(
        self,
        log: FileIO,
        progress: Progress,
        seq_length: int,
        metrics: Metrics | None = None,
        saved: Callable[[int], None] = lambda iteration: None,
    ) -> None:
        self.log, self.progress, self.seq_length, self._metrics, self._saved = log, progress, seq_length, metrics, saved
        self._keeps = True
        self.first: Step | None = None
        self.last: Step | None = None
        self.tail: deque[str] = deque(maxlen=400)
        self.saved = 0  # the last step that was said to be saved, by the node of rank 0
        self._validated = -1
        self._domains: dict[str, Sums] = {}
        self.stuck = False  # a step took too long, and the ranks left their stacks

    def follow(self, output: Iterable[str]) -> None:
        """Read lines until there are no more."""
        for line in output:
            self.line(line)

    def keep(self, text: str) -> None:
        """Write to the log. A disk that takes no more is said once, and ends no training."""
        if self._keeps:
            try:
                self.log.write(text.encode())
            except OSError as error:
                self._keeps = False
                where = f"{self.log.name!s}: cannot be written: {error.strerror}"
                self.progress.say(f"train: {where}: training goes on, and its output is kept no more")

    def line(self, line: str) -> None:
        """Take one line."""
        self.keep(line)
        self.tail.append(line.rstrip("\n"))
        if line.startswith(DOMAINS):  # before the line of its step, by the same rank
            with suppress(ValueError):
                self._domains = json.loads(line.removeprefix(DOMAINS))
        elif step := parse_step(line):
            self.first = self.first or step
            speed = step.global_batch_size * self.seq_length / max(step.seconds, 1e-9)
            note = f"loss {step.loss:.4f}  lr {step.learning_rate:.3g}  {human(speed)} tokens/s"
            self.progress.advance(step.number - self.progress.done, note)
            self.last = step
            if self._metrics:
                self._metrics.step(step, self._domains)
            self._domains = {}
        elif (validation := parse_validation(line)) and validation[0] != self._validated:
            self._validated = validation[0]  # Megatron evaluates once more after the last step
            sets = parse_validation_sets(line)
            each = ", ".join(f"{name} {loss:.4f}" for name, loss in sets.items())
            told = f"validation loss {validation[1]:.4f}" + (f" ({each})" if each else "")
            self.progress.say(f"train: step {validation[0]}: {told}")
            if self._metrics:
                self._metrics.validation(*validation, sets)
        elif match := _SAVED.search(line):
            self.saved = int(match[1])
            self.progress.say(f"train: step {match[1]}: saved")
            self._saved(self.saved)
        elif line.startswith(SAID):
            self.progress.say(f"train: {line.removeprefix(SAID).rstrip()}")
        elif STUCK.match(line):
            self.stuck = True


def failure_reason(error_file: Path, tail: "deque[str]") -> str:
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


def is_a_signal(reason: str) -> bool:
    """Whether a failure is a rank's, or torchrun's own, ended by a signal before it could take one."""
    return bool(_SIGNAL.search(reason))


def only_lost_peers(reason: str) -> bool:
    """Whether a failure is what a rank sees when another one, perhaps on another node, has died."""
    return bool(_LOST_PEERS.search(reason))


def last_lines(tail: "deque[str]") -> list[str]:
    """The last lines that the ranks printed, torchrun's own report left out."""
    lines = itertools.takewhile(lambda line: not _TORCHRUN_REPORT.search(line), tail)
    return [line for line in lines if line.strip() and not _NATIVE_FRAME.match(line)][-_LAST_LINES:]
