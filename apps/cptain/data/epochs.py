"""How often a training sees its data: a few documents trained on for thousands of epochs look like any other run.

The tokens to train on are those of the files times the first weight of data.split: Megatron cuts every file at whole
documents, so that a file of few has somewhat more or less.
"""

from dataclasses import dataclass

from cptain.data.blend import parts
from cptain.data.manifest import Record
from cptain.errors import bad_usage
from cptain.progress import human
from cptain.run_file import RunFile


@dataclass(frozen=True)
class Exposure:
    """How much a training sees of a part of the mix.

    Attributes:
        name: of the part, for people.
        documents: in its files.
        tokens: of them to train on.
        share: of all tokens that are trained on, 0 to 1.
        epochs: how often its tokens are seen.
    """

    name: str
    documents: int
    tokens: float
    share: float
    epochs: float


def training_share(split: str) -> float:
    """The part of the data that a data.split trains on, 0 to 1."""
    weights = [float(weight) for weight in split.split(",")]
    return weights[0] / sum(weights)


def exposures(run: RunFile, records: list[Record], steps: int) -> list[Exposure]:
    """What a training of so many steps sees, by part of data.mix. Errors are those of `cptain.data.blend.parts`."""
    mixed = parts(run.data.mix, records)
    weights, seen = sum(part.weight for part in mixed), steps * run.train.tokens_per_step
    found = []
    for part in mixed:
        tokens, share = part.tokens * training_share(run.data.split), part.weight / weights
        documents = sum(record.documents for record in part.records)
        found.append(Exposure(part.name, documents, tokens, share, seen * share / tokens))
    return found


def check_epochs(run: RunFile, found: list[Exposure], steps: int) -> None:
    """Refuse a training that sees a part too often.

    Raises:
        CptainError: exit status 2: the part that is seen most, if that is over data.max_epochs and train.epochs.
    """
    asked = 0.0
    if run.train.epochs is not None:  # rounded up to whole steps
        asked = steps * run.train.tokens_per_step / sum(part.tokens for part in found)
    most = max(found, key=lambda part: part.epochs)
    if most.epochs > max(run.data.max_epochs, asked):
        bad_usage(
            f"data.max_epochs = {run.data.max_epochs:g}: {most.name}: the {_counted(most.tokens)} to train on would be "
            f"seen {_number(most.epochs)} times in {steps:,} steps of {run.train.tokens_per_step:,} tokens: take more "
            "text, fewer steps or another data.mix, or allow it with data.max_epochs"
        )


def first_lines(run: RunFile, records: list[Record], steps: int) -> tuple[str, ...]:
    """The first lines of a training: documents, tokens, steps, tokens a step, and the epochs of each part.

    Raises:
        CptainError: see `check_epochs` and `cptain.data.blend.parts`.
    """
    found = exposures(run, records, steps)
    check_epochs(run, found, steps)
    documents, tokens = sum(part.documents for part in found), sum(part.tokens for part in found)
    seen = steps * run.train.tokens_per_step
    least, most = (choose(part.epochs for part in found) for choose in (min, max))
    epochs = _number(most) if len(found) == 1 else f"{_number(least)} to {_number(most)}"
    first = (
        f"{documents:,} documents, {_counted(tokens)} to train on; {steps:,} steps of "
        f"{run.train.tokens_per_step:,} tokens: {human(seen)} in all, {epochs} epochs"
    )
    if not isinstance(run.data.mix, list):
        return (first + (" a file" if len(found) > 1 else ""),)
    return first, *(
        f"  {part.name}: {part.documents:,} documents, {_counted(part.tokens)}, {part.share:.1%} of what is "
        f"trained on, {_number(part.epochs)} epochs"
        for part in found
    )


def _counted(tokens: float) -> str:
    return f"{round(tokens):,} tokens"


def _number(epochs: float) -> str:
    return f"{epochs:.3g}" if epochs < 100 else f"{epochs:,.0f}"
