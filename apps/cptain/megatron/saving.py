"""What a save writes is told to Megatron within the process, and not through another one.

Megatron hands the list of what it has written from its writer to itself through a queue of multiprocessing's manager: a
process that every rank starts at its first save, and that imports the training script and torch to look at what it
passes on. That is 3 s of a core for each rank, on a shared disk more, before a first checkpoint of a few MB. Only a
writer that is another process needs it: that of --async-save, and every one of core 0.13's.
"""

import importlib.util
import queue
import sys

_FORKS_ALWAYS = "megatron.core.dist_checkpointing.strategies.base"  # in 0.13; 0.19 and main have no such module


def install() -> None:
    """Give Megatron's writer a queue of this process, after Megatron's import and before the first save."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if "--async-save" not in sys.argv and importlib.util.find_spec(_FORKS_ALWAYS) is None:
        filesystem_async._results_queue = queue.Queue()  # where there is one, it makes no other
