"""train.keep: which checkpoints of a run stay, and the removal of the others while it trains.

A checkpoint is removed once it is whole and a newer whole one has taken its place, the one that the tracker names. What
is half-written, newer than the tracker, or being read (`cptain.checkpoint.in_use`) stays. It is done here and not by
Megatron, whose releases differ in what they can, and beside the loop that attends to signals: a checkpoint may be
hundreds of gigabytes. A removal that fails is said, and ends no training.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cptain.checkpoint.in_use import finish_removals, remove
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.checkpoint.tracker import TRACKER, iteration_folder, read_tracker
from cptain.errors import CptainError, one_line
from cptain.history import read_history
from cptain.run_file import RunFile

Say = Callable[[str], None]


def surplus(run: RunFile, began: int) -> Iterator[Path]:
    """The folders that the run does not keep, oldest first.

    Args:
        run: the run.
        began: the step that this start began at, which the last one ended with.

    Raises:
        CptainError: the tracker, or the history, cannot be read.
    """
    root, train = run.checkpoints_folder, run.train
    if train.keep == "all" or not (root / TRACKER).exists():
        return
    named = read_tracker(root)
    if named is None or not _is_whole(iteration_folder(root, named)):
        return
    links = {began, *(start.start for start in read_history(run.folder))}
    older = [number for number in _iterations(root) if number < named]
    wanted = train.keep - 1  # beside the one that the tracker names
    kept = set[int]()
    for number in reversed(older):
        if len(kept) < wanted and _is_whole(iteration_folder(root, number)):
            kept.add(number)
    for number in older:
        folder = iteration_folder(root, number)
        every = train.keep_every is not None and number % train.keep_every == 0
        if number not in kept and number not in links and not every and _is_whole(folder):
            yield folder


def _iterations(root: Path) -> list[int]:
    return sorted(int(name) for path in root.glob("iter_*") if (name := path.name[5:]).isdigit())


def _is_whole(folder: Path) -> bool:
    try:
        TorchDistReader(folder).close()
    except CptainError:
        return False
    return True


class Keeper:
    """Removes what the run does not keep, in a thread of its own."""

    def __init__(self, run: RunFile, began: int, say: Say, thread: ThreadPoolExecutor) -> None:
        self._run, self._began, self._say, self._thread = run, began, say, thread
        self._saved: int | None = None

    def look(self, saved: int) -> None:
        """Go through the checkpoints if another step is saved than at the last look."""
        if saved != self._saved:
            self._saved = saved
            self._thread.submit(self._go_through)

    def _go_through(self) -> None:
        try:
            finish_removals(self._run.checkpoints_folder)
            for folder in surplus(self._run, self._began):
                if remove(folder):
                    self._say(f"train: {folder.name}: removed (train.keep = {self._run.train.keep})")
        except (CptainError, OSError) as error:
            self._say(f"train: {self._run.checkpoints_folder}: an old checkpoint cannot be removed: {one_line(error)}")


@contextmanager
def keeping(run: RunFile, began: int, say: Say) -> Iterator[Callable[[int], None]]:
    """Keep to train.keep during the block and at its end.

    Args:
        run: the run.
        began: the step that this start began at.
        say: prints a line for people.

    Yields:
        What is to be told the last step that was saved, as often as one likes.
    """
    if run.train.keep == "all":
        yield lambda saved: None
        return
    with ThreadPoolExecutor(1) as thread:  # whose end waits for what is in hand
        keeper = Keeper(run, began, say, thread)
        try:
            yield keeper.look
        finally:
            keeper.look(-1)
