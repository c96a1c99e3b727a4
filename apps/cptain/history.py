"""<run>/history.jsonl: a line for every start of training that did a step: what a run was really trained with.

A run file can be edited, tried with --set, or read after its run has ended; what trained is here. The node that sees
the steps rewrites the file as the training goes, so that a start that is killed leaves its line too; a run has tens of
them, of a few kB. The model card, a resumed training, status and report read it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cptain import atomic
from cptain.errors import CptainError, one_line

RUNNING = "running"
KILLED = "killed"


@dataclass(frozen=True)
class Start:
    """One start of training.

    Attributes:
        began: local time, ISO 8601.
        start: steps that were done before it.
        steps: in all, as the run file asked then.
        run: the resolved run file.
        data: what it trains on (`cptain.data.blend`).
        layout: processes, nodes, and sizes of tensor, pipeline, context and data parallel.
        versions: as in provenance.json.
        accepted: what --accept let pass.
        last: the last step that it did.
        saved: the last step that was saved when it ended; `start` where nothing new was.
        sequences: that the run had consumed by then, those of earlier starts included.
        outcome: `RUNNING`; `KILLED`, where it left no other word; or how it ended, for people.
        ended: local time.
    """

    began: str
    start: int
    steps: int
    run: dict[str, Any]
    data: dict[str, Any]
    layout: dict[str, int]
    versions: dict[str, Any]
    accepted: list[str] = field(default_factory=list)
    last: int = 0
    saved: int = 0
    sequences: int = 0
    outcome: str = RUNNING
    ended: str = ""


def now() -> str:
    """The local time, as the history has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def moment(local: str) -> float:
    """A time of the history, in seconds since 1970."""
    return datetime.strptime(local, "%Y-%m-%dT%H:%M:%S%z").timestamp()


def read_history(run_folder: Path) -> list[Start]:
    """Every start of a run, oldest first; none where nothing was trained.

    Raises:
        CptainError: a line that cannot be read.
    """
    file = run_folder / "history.jsonl"
    try:
        return [Start(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise CptainError(f"{file}: cannot be read: {one_line(error)}") from error


def write_history(run_folder: Path, starts: list[Start]) -> None:
    """Replace the history."""
    lines = (json.dumps(asdict(start), ensure_ascii=False) + "\n" for start in starts)
    atomic.write_text(run_folder / "history.jsonl", "".join(lines))


def stretches(starts: list[Start], step: int) -> list[tuple[Start, int, int]]:
    """Which starts did the steps 1 to `step` that count, each with its first and its last of them.

    A start that began at a step takes the place of what an earlier one did beyond that step and did not save.
    """
    found: list[tuple[Start, int, int]] = []
    for start in starts:
        if start.start >= min(step, start.last):
            continue
        found = [(one, first, min(last, start.start)) for one, first, last in found if first <= start.start]
        found.append((start, start.start + 1, min(start.last, step)))
    return found


class Recorder:
    """Keeps the line of a start that goes on.

    Args:
        run_folder: where.
        first: makes the line, once a step was done.
    """

    def __init__(self, run_folder: Path, first: Callable[[], Start]) -> None:
        self._folder, self._first = run_folder, first
        self._starts: list[Start] = []

    def record(self, **changes: Any) -> None:
        """Set fields of the line, and write it where they differ."""
        if not self._starts:
            killed = [
                replace(start, outcome=KILLED) if start.outcome == RUNNING else start
                for start in read_history(self._folder)
            ]
            self._starts = [*killed, self._first()]
            before = None
        else:
            before = self._starts[-1]
        self._starts[-1] = replace(self._starts[-1], **changes)
        if self._starts[-1] != before:
            write_history(self._folder, self._starts)
