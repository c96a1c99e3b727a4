"""How a training is asked to stop: SIGTERM and SIGINT are noted, and acted on between two looks at its output.

Nothing is raised where a signal comes in: an exception amid other work loses that work, and schedulers and Apptainer
send every signal twice (seen 0.15 ms, 21 ms and 5 s apart), so that the second came amid the answer to the first.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ONE_REQUEST = 15.0  # seconds in which signals count as one: PBS repeats its own after 5


class Stop:
    """What signals have asked for.

    Attributes:
        signal_name: of the first one; empty as long as there was none.
        at_once: another one came `ONE_REQUEST` seconds or more after the first.
    """

    def __init__(self) -> None:
        self.signal_name, self.at_once = "", False
        self._first = 0.0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if not self.signal_name:
            self.signal_name, self._first = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._first >= ONE_REQUEST:
            self.at_once = True

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Take SIGTERM and SIGINT until the end of the block."""
        before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
