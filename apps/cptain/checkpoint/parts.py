"""A folder that several processes write together, on as many nodes: each its share of the files.

Until all have ended it is `.<final name>.parts-<hash of the work>` beside its final name, so that processes with the
same work find each other, whichever host they are on, and those with other work do not. In it are the files, and a
mark for every part that is done. Whoever finds all parts done finishes the folder and gives it its name.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from cptain import atomic
from cptain.checkpoint.streaming import FilePlan
from cptain.lock import Held, lock


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
    became it or an earlier one. A process that still looks at them finds them gone at once, and not half there."""
    for folder in final.parent.glob(f".{final.name}.parts-*"):
        if not finished or not (folder / final.name).exists():
            atomic.remove_folder(folder)


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
        self.files = self._share(self._number)

    def _is_done(self, number: int) -> bool:
        try:
            whole = all((self.folder / file.name).stat().st_size == file.bytes for file in self._share(number))
        except FileNotFoundError:
            return False
        return whole and self._mark(number).is_file()

    def _share(self, number: int) -> list[FilePlan]:
        return share(self._every, number, self._count)

    def _mark(self, number: int) -> Path:
        return self._parts / f"{number}.done"

    def write(self, is_final: Callable[[], bool], write: Callable[[Callable[[], None]], None]) -> None:
        """Write this part, unless that is done.

        Args:
            is_final: says whether the folder has its final name already.
            write: writes the files of this part and flushes them to disk; it calls what it gets every few seconds to
                minutes.

        Raises:
            CptainError: another process is at the same part.
        """
        name = f"part {self._number} of {self._count} of {self._final}"
        with lock(self._parts / f"{self._number}.lock", name) as beat:
            if self._is_done(self._number) or is_final():
                return
            self.folder.mkdir(exist_ok=True)
            self._mark(self._number).unlink(missing_ok=True)
            try:
                write(beat)
            except OSError as error:
                atomic.cannot_write(self.folder, error)
                raise
            atomic.write_text(self._mark(self._number), "")

    def missing(self) -> list[int]:
        """Once this part was written: those that are not done, because they have no mark or a file that is not there
        whole. None where another process has given the folder its final name."""
        missing = [number for number in range(1, self._count + 1) if not self._is_done(number)]
        return missing if self.folder.exists() else []

    def finish(self, last_touches: Callable[[], None]) -> bool:
        """When all parts are done, make the last touches and give the folder its final name; False where another
        process is at that or has done it."""
        try:
            with lock(self._parts / "finish.lock", f"the parts of {self._final}"):
                if not self.folder.exists():
                    return False
                with atomic.renamed_folder(self.folder, self._final):
                    last_touches()
                return True
        except Held:
            return False
