"""What a stage did, once in words on stderr, and once as values for `--json`.

A stage says both in one call, where it knows them, so that words and values cannot come apart. `--json` then prints the
values as one JSON object on stdout, last and alone: whatever else would go there, of cptain, of a library or of a
process that it starts, goes to stderr meanwhile. The object comes however the stage ends, but for SIGKILL.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from typing import Any

from cptain.errors import status_and_message

_values: ContextVar[dict[str, Any] | None] = ContextVar("values", default=None)


def say(line: str, **values: object) -> None:
    """Print a line on stderr, and keep what it says as values."""
    print(line, file=sys.stderr)
    tell(**values)


def tell(**values: object) -> None:
    """Keep values for the summary; a later one of the same name counts."""
    if (kept := _values.get()) is not None:
        kept.update(values)


@contextmanager
def under(*names: str) -> Iterator[None]:
    """What is told within is an object of its own, below these names: a stage that does the same to several things."""
    kept = _values.get()
    for name in names:
        kept = None if kept is None else kept.setdefault(name, {})
    token = _values.set(kept)
    try:
        yield
    finally:
        _values.reset(token)


@contextmanager
def _stdout_goes_to_stderr() -> Iterator[None]:
    """What is written to stdout within comes on stderr: Python's, and that of libraries and processes."""
    sys.stdout.flush()
    there = os.dup(1)
    try:
        with redirect_stdout(sys.stderr):
            os.dup2(2, 1)
            yield
    finally:
        os.dup2(there, 1)
        os.close(there)


@contextmanager
def as_json(stage: str) -> Iterator[None]:
    """Print the summary of what is done within.

    Its keys: `command`, `exit_status` and `error` (None: there is none) first, then what the stage told, and `seconds`.
    """
    began, values = time.monotonic(), dict[str, Any]()
    token = _values.set(values)
    status, error = 0, None
    try:
        with _stdout_goes_to_stderr():
            yield
    except BaseException as raised:
        status, error = status_and_message(raised)
        raise
    finally:
        _values.reset(token)
        summary = {"command": stage, "exit_status": status, "error": error, **values}
        with suppress(BrokenPipeError):  # whoever read it has gone; the exit status is the stage's
            print(_document({**summary, "seconds": round(time.monotonic() - began, 3)}), flush=True)


def _document(summary: dict[str, Any]) -> str:
    """As JSON. Paths are text, and a number that JSON cannot say (a loss that is none) is null."""
    import orjson

    return orjson.dumps(summary, default=str, option=orjson.OPT_INDENT_2).decode()
