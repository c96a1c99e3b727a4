"""How often a training sees its data: a few documents trained on for thousands of epochs look like any other run.

The tokens to train on are counted in the training part of every file (`cptain.data.split`).
"""

from dataclasses import dataclass

from cptain.data.blend import parts
from cptain.data.manifest import Record
from cptain.data.split import lacks_validation, training_tokens
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
    tokens: int
    share: float
    epochs: float


def exposures(run: RunFile, records: list[Record], steps: int) -> list[Exposure]:
    """What a training of so many steps sees, by part of data.mix; parts without a document to train on are left out.

    Raises:
        CptainError: no part has one; see also `cptain.data.blend.parts`.
    """
    seen = steps * run.train.tokens_per_step
    counted = [
        (part, training_tokens(run.data_folder, part.records, run.data.split)) for part in parts(run.data.mix, records)
    ]
    counted = [(part, tokens) for part, tokens in counted if tokens]
    if not counted:
        bad_usage(f"data.split = {run.data.split}: no file has a document in its training part: give that more")
    weights = sum(part.weight for part, _ in counted)
    found = []
    for part, tokens in counted:
        documents, share = sum(record.documents for record in part.records), part.weight / weights
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
    last: tuple[str, ...] = ()
    if lacks_validation(run.data_folder, records, run.data.split):
        last = (
            f"no validation: no file has a document in that part of data.split = {run.data.split}, which is cut from "
            "every file by itself",
        )
    if not isinstance(run.data.mix, list):
        return first + (" a file" if len(found) > 1 else ""), *last
    lines = (
        f"  {part.name}: {part.documents:,} documents, {_counted(part.tokens)}, {part.share:.1%} of what is "
        f"trained on, {_number(part.epochs)} epochs"
        for part in found
    )
    return first, *lines, *last


def _counted(tokens: int) -> str:
    return f"{tokens:,} tokens"


def _number(epochs: float) -> str:
    return f"{epochs:.3g}" if epochs < 100 else f"{epochs:,.0f}"
