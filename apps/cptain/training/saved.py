"""What a training saves is recorded beside it (`cptain.checkpoint.saved_files`) while the training goes on.

One thread of the lowest priority does it, in cptain's own process: no rank waits for it. What a killed job leaves
unrecorded is said at the next start, and used.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cptain.checkpoint.saved_files import write_record
from cptain.checkpoint.tracker import iteration_folder
from cptain.errors import one_line


def _give_way() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of a thread, on Linux


class SavedCheckpoints:
    """Records the checkpoints that a training has saved.

    Args:
        root: where they are.
        say: prints a line.
    """

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        self._root, self._say = root, say
        self._thread = ThreadPoolExecutor(1, "record", _give_way)

    def add(self, iteration: int) -> None:
        """An iteration is saved whole: record it soon."""
        self._thread.submit(self._record, iteration)

    def close(self) -> None:
        """Wait until all are recorded."""
        self._thread.shutdown()

    def _record(self, iteration: int) -> None:
        folder = iteration_folder(self._root, iteration)
        try:
            write_record(folder)
        except Exception as error:  # whatever it is, it is no reason to end a training
            if not folder.exists():  # train.keep was faster
                return
            self._say(f"train: step {iteration}: its files are not recorded: {one_line(error)}")
