"""How many sequences the steps of a run see: train.global_batch_size of them each, after train.batch_ramp.

A ramp is what the run file has: [[256, 500], [512, 1000]] are 256 sequences a step up to step 500, then 512 up to 1000.
"""

from collections.abc import Sequence

Ramp = Sequence[Sequence[int]]


def sequences(ramp: Ramp, full: int, steps: int) -> int:
    """Sequences that the first `steps` steps see.

    Args:
        ramp: of the run.
        full: sequences of a step after it.
        steps: of the run.
    """
    seen = begin = 0
    for batch, until in ramp:
        seen += batch * (min(until, steps) - min(begin, steps))
        begin = until
    return seen + full * max(0, steps - begin)


def batch_after(ramp: Ramp, full: int, seen: int) -> int:
    """Sequences of the step that comes after so many were seen. Arguments are those of `sequences`."""
    return next((batch for batch, until in ramp if seen < sequences(ramp, full, until)), full)


def steps_for(ramp: Ramp, full: int, wanted: int) -> int:
    """How many steps see so many sequences, rounded up. Arguments are those of `sequences`."""
    steps = 0
    for batch, until in ramp:
        if sequences(ramp, full, until) >= wanted:
            return steps - (sequences(ramp, full, steps) - wanted) // batch
        steps = until
    return steps - (sequences(ramp, full, steps) - wanted) // full
