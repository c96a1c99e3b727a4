"""What is asked of hundreds of thousands of files: a parallel file system takes its time, and answers many at once."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")
_AT_ONCE = 16
_TOGETHER = 4096  # a pool holds 2 KB for each that waits in it


def answers(ask: Callable[[_Asked], _Answer], files: Iterable[_Asked]) -> Iterator[_Answer]:
    """What `ask` says of each file, in their order, many asked at once."""
    left = iter(files)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while some := list(islice(left, _TOGETHER)):
            yield from pool.map(ask, some)
