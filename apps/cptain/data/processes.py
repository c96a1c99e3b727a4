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
from multiprocessing import connection
from typing import Any, cast

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

    Where the block ends with an exception the processes get SIGTERM until they are gone: one that is signalled before
    it has run at all forgets it, and another may wait for a lock that a third took to its grave.

    Raises:
        CptainError: one of them died.
    """
    pool = ProcessPoolExecutor(count, CONTEXT, _begin, (os.getpid(), begin, arguments))
    # Starts them all, in this thread: Linux takes the end of the thread that started a process for its parent's.
    pool.submit(bool)
    try:
        yield pool
    except BaseException as error:
        left = {process.sentinel: process for process in (pool._processes or {}).values()}
        while left:
            for process in left.values():
                process.terminate()
            for ended in connection.wait(list(left), timeout=0.2):
                del left[cast(int, ended)]
        cast(Any, pool)._result_queue._writer.close()  # a result that one was sending will not go on
        pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise CptainError(
                "a preprocess worker died (killed, or out of memory): run it again, with fewer --workers"
            ) from None
        raise
    pool.shutdown(wait=True)
