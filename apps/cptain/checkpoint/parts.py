"""A folder that several processes write together, on as many nodes: each its share of the files.

Until all have ended it is `.<final name>.parts-<hash of the work>` beside its final name, so that processes with the
same work find each other, whichever host they are on, and those with other work do not. In it are the files, and a
mark for every part that is done. Whoever finds all parts done finishes the folder and gives it its name.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cptain import atomic
from cptain.checkpoint.streaming import FilePlan
from cptain.lock import lock


def share(files: list[FilePlan], number: int, count: int) -> list[FilePlan]:
    """The `number`-th (from 1) of `count` shares of the files: neighbours, alike in bytes."""
    total, before, mine = sum(file.bytes for file in files), 0, []
    for file in files:
        if (2 * before + file.bytes) * count // (2 * max(1, total)) == number - 1:
            mine.append(file)
        before += file.bytes
    return mine


def remove_parts(final: Path, finished: bool = False) -> None:
    """Remove what is left of parts beside the folder `final`, which is done; where `finished`, only of those that
    became it or an earlier one."""
    for folder in final.parent.glob(f".{final.name}.parts-*"):
        if not finished or not (folder / final.name).exists():
            shutil.rmtree(folder, ignore_errors=True)


class SharedFolder:
    """The folder `final` under way, of which this process writes part I of N.

    Args:
        final: where it will be.
        work: what says that two processes do the same work.
        files: all that the parts write.
        part: (I, N), I from 1.

    Attributes:
        folder: where the files go until then.
        files: those of this part.
    """

    def __init__(self, final: Path, work: str, files: list[FilePlan], part: tuple[int, int]) -> None:
        self._final, self._every, (self._number, self._count) = final, files, part
        digest = hashlib.sha256(f"{work} {self._count} {[(file.name, file.bytes) for file in files]}".encode())
        self._parts = final.with_name(f".{final.name}.parts-{digest.hexdigest()[:16]}")
        self.folder = self._parts / final.name
        self.files = share(files, *part)

    def missing(self) -> list[int]:
        """The parts that are not done: that have no mark, or a file that is not there whole."""
        return [number for number in range(1, self._count + 1) if not self._is_done(number)]

    def _is_done(self, number: int) -> bool:
        files = [(self.folder / file.name, file.bytes) for file in share(self._every, number, self._count)]
        whole = all(file.is_file() and file.stat().st_size == size for file, size in files)
        return whole and self._mark(number).is_file()

    def _mark(self, number: int) -> Path:
        return self._parts / f"{number}.done"

    @contextmanager
    def written(self) -> Iterator[Callable[[], None]]:
        """Yield, while this part's files are written and flushed to disk, what to call every few seconds to minutes;
        then the part is done.

        Raises:
            CptainError: another process is at the same part.
        """
        name = f"part {self._number} of {self._count} of {self._final}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(self._parts / f"{self._number}.lock", name) as beat:
            self._mark(self._number).unlink(missing_ok=True)
            try:
                yield beat
            except OSError as error:
                atomic.cannot_write(self.folder, error)
                raise
            atomic.write_text(self._mark(self._number), "")

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Yield, when all parts are done, for the last touches; then the folder has its final name.

        Raises:
            CptainError: another process is finishing it.
        """
        with (
            lock(self._parts / "finish.lock", f"the parts of {self._final}"),
            atomic.renamed_folder(self.folder, self._final),
        ):
            yield
