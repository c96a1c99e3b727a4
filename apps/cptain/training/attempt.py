"""What a chain of jobs remembers of attempts that saved nothing: one that fails twice at one place is given up.

Light to import: `cptain status` reads it for a hundred runs.
"""

import json
import os
from typing import NamedTuple

from cptain import atomic
from cptain.errors import CptainError
from cptain.run_file import RunFile

_TRIES = 2  # of a chain's jobs at one place
_NO_WORD = "was killed, and said nothing"
_ANOTHER = "submit.sh train export begins another"


class _Noted(NamedTuple):
    """What is remembered of the attempts at one place.

    Attributes:
        times: how many there were.
        reason: the last that one gave; empty: none did.
        said: it is the last attempt's.
        final: the next one would end as this one did.
    """

    times: int = 0
    reason: str = ""
    said: bool = False
    final: bool = False


class Attempt:
    """<run>/logs/train-failed.json: how many trainings in a row began at a step and saved nothing new.

    Written when a training begins and removed when something is saved, so that one that is killed counts too.
    """

    def __init__(self, run: RunFile, start: int) -> None:
        self._file, self._start = run.logs_folder / "train-failed.json", start

    def _read(self) -> _Noted:
        try:
            noted = json.loads(self._file.read_text(encoding="utf-8"))
            if noted.pop("start") == self._start:
                return _Noted(**noted)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # none, or one that cannot be read: it forbids nothing
        return _Noted()

    def _write(self, start: int, noted: _Noted) -> None:
        atomic.write_json(self._file, {"start": start, **noted._asdict()})

    def begin(self) -> None:
        """Count a training that begins.

        Raises:
            CptainError: in a chain of jobs, after the second attempt at the same place: the first may have failed for
                a node's sake, a third would fail like the second. After a loss that was lost, at once.
        """
        times, reason, said, final = self._read()
        in_chain = int(os.environ.get("CPTAIN_LINK") or 1) > 1
        if final and in_chain:
            raise CptainError(f"train: not tried again in this chain ({_ANOTHER}): {reason}")
        if times >= _TRIES and in_chain:
            last = reason if said else f"the last {_NO_WORD}" + (f"; before that: {reason}" if reason else "")
            raise CptainError(
                f"train: failed {times} times at step {self._start} with nothing new saved, and is not tried again in "
                f"this chain: {last} ({_ANOTHER})"
            )
        self._write(self._start, _Noted(times + 1, reason))

    def failed(self, reason: str, only_if_unsaid: bool) -> None:
        """Note why; where `only_if_unsaid`, only if no other node has."""
        noted = self._read()
        if not (only_if_unsaid and noted.said):
            self._write(self._start, _Noted(max(1, noted.times), reason, said=True))

    def diverged(self, reason: str, saved: int) -> None:
        """Note that training lost its loss after step `saved`, where the next one would begin, and go the same way."""
        self._write(saved, _Noted(1, reason, said=True, final=True))

    def outlook(self) -> str:
        """What the next job of a chain does here, for people."""
        times, reason, said, final = self._read()
        if final:
            return f"the next job of the chain gives up: {reason}"
        if times < _TRIES:
            return f"the next job of the chain goes on from step {self._start}"
        why = reason if said else f"the last {_NO_WORD}"
        return f"the next job of the chain gives up: {times} trainings failed at step {self._start}: {why}"

    @property
    def failure(self) -> str:
        """Why another node of this attempt failed, as far as it has said; empty: none did."""
        noted = self._read()
        return noted.reason if noted.said and not noted.reason.startswith("stopped") else ""

    def saved(self) -> None:
        """Something new was saved: nothing is to be remembered."""
        self._file.unlink(missing_ok=True)
