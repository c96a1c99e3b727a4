"""How many optimizer steps a run has, which may depend on how much data there is."""

from cptain.data.blend import parts
from cptain.data.manifest import Record, read_manifest
from cptain.data.split import training_tokens
from cptain.errors import CptainError, bad_usage
from cptain.run_file import RunFile


def asked_steps(run: RunFile, records: list[Record]) -> tuple[int, str]:
    """Optimizer steps in all, as given, or from tokens or epochs, rounded up; and the key that says so, for people.

    Raises:
        CptainError: no .idx file to count epochs by.
    """
    train = run.train
    if train.steps is not None:
        return train.steps, f"steps = {train.steps}"
    if train.tokens is not None:
        tokens, given = float(train.tokens), f"tokens = {train.tokens}"
    else:
        assert train.epochs is not None
        tokens = train.epochs * sum(
            part.repeat * training_tokens(run.data_folder, part.records, run.data.split)
            for part in parts(run.data.mix, records)
        )
        given = f"epochs = {train.epochs:g}"
    steps = max(1, train.steps_for(tokens))
    return steps, f"the {steps} steps of {given}"


def train_steps(run: RunFile, records: list[Record]) -> int:
    """Optimizer steps in all.

    Raises:
        CptainError: see `asked_steps`; a warm-up or a decay that takes longer than the training.
    """
    steps, given = asked_steps(run, records)
    try:
        run.train.check_length(steps, given)
    except ValueError as error:
        bad_usage(f"train.{error}")
    return steps


def known_steps(run: RunFile) -> int | None:
    """The same without the tokenized data; None where they depend on data that is not there yet."""
    if run.train.epochs is None:
        return train_steps(run, [])
    try:
        return train_steps(run, read_manifest(run.data_folder, run.data.sources))
    except CptainError:
        return None
