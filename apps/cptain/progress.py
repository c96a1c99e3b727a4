"""Progress on stderr: a bar on a terminal, one line every 30 seconds in a batch log, nothing with --quiet.

A batch log keeps every carriage return as rubbish, and a job that prints nothing for an hour looks dead; hence the two
forms. A program that calls cptain wants neither.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Self

SECONDS_BETWEEN_LINES = 30.0
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def hidden() -> Iterator[None]:
    """Within, progress is counted and not shown."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


def human(number: float) -> str:
    """`number` with three digits and a decimal prefix: 1234567 is "1.23M"."""
    for scale, prefix in _SCALES:
        if abs(number) >= scale:
            return f"{number / scale:.3g}{prefix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Whole seconds as H:MM:SS, or M:SS under an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Progress:
    """Counts `total` units of work.

    Args:
        label: what is being done, the first word of every line.
        total: units in all, those already done included.
        unit: "B" for bytes, or a word such as "step".
        done: units done before this process began.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.note = ""
        self._first, self._began = done, time.monotonic()
        self._last_line = self._began
        self._bar, self._is_shown = None, not _hidden.get()
        if self._is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=label,
                total=total,
                initial=done,
                unit=unit,
                unit_scale=unit == "B",
                leave=False,
                dynamic_ncols=True,
            )

    def advance(self, units: int, note: str = "") -> None:
        """Count `units` more; `note` is shown behind the figures (the file in hand, the loss)."""
        self.done += units
        self.note = note or self.note
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(units)
        elif self._is_shown and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(self._line())

    def say(self, line: str) -> None:
        """Print a line of its own without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(f"{line}\n", end="", file=sys.stderr, flush=True)  # in one write: threads may speak at once

    def _line(self) -> str:
        speed = (self.done - self._first) / max(time.monotonic() - self._began, 1e-9)
        left = duration((self.total - self.done) / speed) if speed > 0 else "?"
        if self.unit == "B":
            figures = f"{human(self.done)}B of {human(self.total)}B, {human(speed)}B/s"
        else:
            figures = f"{self.unit} {self.done} of {self.total}"
        return f"{self.label}: {figures}, {left} left" + (f"  {self.note}" if self.note else "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
