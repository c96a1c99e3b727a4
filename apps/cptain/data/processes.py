"""Forked worker processes that end with their parent, however it ends.

A pool's workers wait on a pipe that they hold open for each other: when the parent is killed nobody wakes them. Linux
tells each of them instead (prctl's PR_SET_PDEATHSIG).
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from cptain.errors import CptainError

_PR_SET_PDEATHSIG = 1
CONTEXT = multiprocessing.get_context("fork")  # what is loaded once is there in every worker


def _begin(parent: int, begin: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it was gone before that
    begin(*arguments)


@contextmanager
def process_pool(count: int, begin: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` processes, each of which first calls `begin` with `arguments`, which are not pickled.

    Where the block ends with an exception the processes get SIGTERM, and it waits for them.

    Raises:
        CptainError: one of them died.
    """
    pool = ProcessPoolExecutor(count, CONTEXT, _begin, (os.getpid(), begin, arguments))
    try:
        yield pool
    except BaseException as error:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise CptainError(
                "a preprocess worker died (killed, or out of memory): run it again, with fewer --workers"
            ) from None
        raise
    pool.shutdown(wait=True)
