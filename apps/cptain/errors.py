"""The one exception that users see, and the exit statuses of every command.

An error is raised where the fact is known, with everything the user needs in one line, and is printed once, by
`cptain.cli`. Anything else that escapes is a defect of cptain.
"""

from typing import NoReturn

FAILED = 1
BAD_USAGE = 2
RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: stopped early, and the same command continues


class CptainError(Exception):
    """What went wrong, where (file:line or key) and what to do, in one line.

    Args:
        message: the line, without a trailing full stop.
        exit_status: `FAILED`, `BAD_USAGE` or `RESUMABLE`.
    """

    def __init__(self, message: str, exit_status: int = FAILED) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived. A KeyboardInterrupt, so that no `except Exception` swallows it.

    Args:
        signal_name: "SIGINT" or "SIGTERM".
    """

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name


def status_and_message(error: BaseException) -> tuple[int, str]:
    """The exit status of an error, and the lines for people."""
    if isinstance(error, Interrupted):
        return RESUMABLE, f"stopped by {error.signal_name}; the same command continues"
    if isinstance(error, CptainError):
        return error.exit_status, str(error)
    if isinstance(error, OSError):
        return FAILED, (f"{error.filename}: " if error.filename else "") + (error.strerror or one_line(error))
    if isinstance(error, MemoryError):
        return FAILED, "out of memory"
    return FAILED, f"{type(error).__name__}: {one_line(error)} (a defect of cptain: --debug shows where)"


def one_line(error: BaseException) -> str:
    """What any exception says, on one line: its first line, or its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def bad_usage(message: str) -> NoReturn:
    """Raise the error of a wrong run file or command line (exit status 2)."""
    raise CptainError(message, BAD_USAGE)
