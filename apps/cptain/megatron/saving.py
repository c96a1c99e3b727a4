"""What a save writes is told to Megatron within the process, and not through another one.

Megatron hands the list of what it has written from its writer to itself through a queue of multiprocessing's manager: a
process that every rank starts at its first save, and that imports the training script and torch to look at what it
passes on. That is 3 s of a core for each rank, on a shared disk more, before a first checkpoint of a few MB. Only
--async-save, whose writer is another process, needs it.
"""

import queue
import sys


def install() -> None:
    """Give Megatron's writer a queue of this process, after Megatron's import and before the first save."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if "--async-save" not in sys.argv:
        filesystem_async._results_queue = queue.Queue()  # where there is one, it makes no other
