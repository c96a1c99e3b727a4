"""A file that is read once, from its beginning to its end, and hashed meanwhile by a thread beside."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

_BUFFERS = 4  # of which one is read into while others are hashed: SHA-256 is as slow as all else that a reader does


class HashedFile:
    """A file's bytes, and their SHA-256.

    Chunks lie in buffers that are filled again and again: into new memory Linux reads at a sixth of the speed, a page
    fault for every 4 KB.

    Args:
        file: the file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._hash = hashlib.sha256()

    def chunks(self, size: int) -> Iterator[memoryview]:
        """All bytes of the file, so many at once; a chunk is good until the next is asked for.

        Raises:
            OSError: it cannot be read.
        """
        with open(self.file, "rb", buffering=0) as raw, ThreadPoolExecutor(1) as beside:
            buffers, hashed = list[bytearray](), list[Future[None]]()
            for place in cycle(range(_BUFFERS)):
                if place == len(buffers):
                    buffers.append(bytearray(size))
                else:
                    hashed[place].result()
                count = raw.readinto(buffers[place])
                if not count:
                    return
                chunk = memoryview(buffers[place])[:count]
                if count < size and not hashed:  # of 20,000 small files, none is worth a thread
                    self._hash.update(chunk)
                    yield chunk
                    continue
                hashed[place : place + 1] = [beside.submit(self._hash.update, chunk)]
                yield chunk

    def hexdigest(self) -> str:
        """The hash, once every chunk was asked for."""
        return self._hash.hexdigest()
