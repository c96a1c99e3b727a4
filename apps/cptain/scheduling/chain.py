"""Where the time of a run went: trained, saved, lost and waited, over all starts of its chain of train jobs.

Every line of metrics.jsonl has the time at which it was written, and that of a step the seconds that the step took by
Megatron's clock, which stops while it validates and saves. So what lies between two steps is a validation, which has a
line of its own, or a save; what lies before the first is the start.
"""

import math
from bisect import bisect
from dataclasses import asdict, dataclass, fields
from typing import Any

from cptain.history import RUNNING, Start, moment
from cptain.progress import duration


@dataclass(frozen=True)
class Times:
    """Seconds.

    Attributes:
        trained: in steps that count.
        lost: in steps that were done and not saved, and are done again.
        validated: in validations.
        saved: in saves, the last of each start with its end.
        started: from the start of a training to its first step.
        waited: between two trainings, and before the first from when the jobs were submitted.
    """

    trained: float = 0.0
    lost: float = 0.0
    validated: float = 0.0
    saved: float = 0.0
    started: float = 0.0
    waited: float = 0.0

    @property
    def whole(self) -> float:
        """All of it."""
        return math.fsum(asdict(self).values())

    def lines(self) -> list[tuple[str, str, str]]:
        """For people: what, how long, and its share."""
        if not self.whole:
            return []
        named = [(one.name, getattr(self, one.name)) for one in fields(self)] + [("in all", self.whole)]
        return [(name, duration(value), f"{value / self.whole:.1%}") for name, value in named]


def _kept(starts: list[Start], saved: int) -> list[float]:
    """For each start the last of its steps that count: beyond it, a later one did them again, or they are not saved."""
    until = [min((later.start for later in starts[number:]), default=math.inf) for number in range(1, len(starts) + 1)]
    if starts[-1].outcome != RUNNING:
        until[-1] = min(until[-1], saved)
    return until


def spent(starts: list[Start], lines: list[dict[str, Any]], saved: int, submitted: float | None) -> Times:
    """Add up the time of a run.

    Args:
        starts: its history.
        lines: its metrics, as they came.
        saved: the last step that is saved.
        submitted: when its jobs were, in seconds since 1970, if they were.
    """
    if not starts:
        return Times()
    began = [moment(start.began) for start in starts]
    sums = dict.fromkeys((one.name for one in fields(Times)), 0.0)
    until, last, stepped = _kept(starts, saved), list(began), [False] * len(starts)
    for line in lines:
        number = bisect(began, line.get("time", 0.0)) - 1
        if number < 0:
            continue  # of a history that is gone
        passed = max(0.0, line["time"] - last[number])  # a clock may be set back
        last[number] += passed
        if "validation_loss" in line:
            sums["validated"] += passed
            continue
        took = min(line.get("step_seconds", 0.0), passed)
        sums["trained" if line["step"] <= until[number] else "lost"] += took
        sums["saved" if stepped[number] else "started"] += passed - took
        stepped[number] = True
    for number, start in enumerate(starts):
        if start.ended:
            sums["saved"] += max(0.0, moment(start.ended) - last[number])
            last[number] = max(last[number], moment(start.ended))
        before = last[number - 1] if number else submitted or began[0]
        sums["waited"] += max(0.0, began[number] - before)
    return Times(**sums)
