"""How many optimizer steps a run has, which may depend on how much data there is."""

import math

from cptain.data.manifest import Record
from cptain.data.split import training_tokens
from cptain.errors import CptainError
from cptain.run_file import RunFile


def train_steps(run: RunFile, records: list[Record]) -> int:
    """Optimizer steps in all: as given, or from tokens or epochs, rounded up.

    Raises:
        CptainError: warm-up longer than the training; no .idx file to count epochs by.
    """
    train = run.train
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        tokens, given = float(train.tokens), f"tokens = {train.tokens}"
    else:
        assert train.epochs is not None
        tokens = train.epochs * training_tokens(run.data_folder, records, run.data.split)
        given = f"epochs = {train.epochs:g}"
    steps = max(1, math.ceil(tokens / train.tokens_per_step))
    if train.warmup_steps >= steps:
        raise CptainError(f"train.warmup_steps = {train.warmup_steps}: {given} is {steps} steps, and must be more", 2)
    return steps
