"""How often a training sees its data: a few documents trained on for thousands of epochs look like any other run.

The tokens to train on are counted in the training part of every file (`cptain.data.split`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cptain.data.manifest import Record
from cptain.data.split import lacks_validation
from cptain.data.stages import parts_to_train, seen_by, stages
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


def exposures(run: RunFile, records: list[Record], steps: int, until: int | None = None) -> list[Exposure]:
    """What a training sees, by part of data.mix; parts without a document to train on are left out.

    Args:
        run: the run.
        records: of its data.
        steps: in all.
        until: what its first so many steps see; default: all of them.

    Raises:
        CptainError: no part has one; see also `cptain.data.blend.parts` and `cptain.data.stages.stages`.
    """
    found = parts_to_train(run, records)
    if not any(tokens for _, tokens in found):
        bad_usage(f"data.split = {run.data.split}: no file has a document in its training part: give that more")
    until = steps if until is None else until
    in_all = run.train.tokens_seen(until)
    return [
        Exposure(part.name, sum(one.documents for one in part.records), tokens, seen / in_all, seen / tokens)
        for (part, tokens), seen in zip(found, seen_by(stages(run, found, steps), run.train, until), strict=True)
        if tokens
    ]


def check_epochs(run: RunFile, found: list[Exposure], steps: int) -> None:
    """Refuse a training that sees a part too often.

    Raises:
        CptainError: exit status 2: the part that is seen most, if that is over data.max_epochs and train.epochs.
    """
    asked = 0.0
    if run.train.epochs is not None:  # rounded up to whole steps
        asked = run.train.tokens_seen(steps) / sum(part.tokens for part in found)
    most = max(found, key=lambda part: part.epochs)
    if most.epochs > max(run.data.max_epochs, asked):
        bad_usage(
            f"data.max_epochs = {run.data.max_epochs:g}: {most.name}: the {_counted(most.tokens)} to train on would be "
            f"seen {_number(most.epochs)} times in {steps:,} steps of {_a_step(run)}: take more "
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
    least, most = (choose(part.epochs for part in found) for choose in (min, max))
    epochs = _number(most) if len(found) == 1 else f"{_number(least)} to {_number(most)}"
    first = (
        f"{documents:,} documents, {_counted(tokens)} to train on; {steps:,} steps of {_a_step(run)}: "
        f"{human(run.train.tokens_seen(steps))} in all, {epochs} epochs"
    )
    last: tuple[str, ...] = ()
    if run.train.eval_steps and lacks_validation(run.data_folder, records, run.data.split):
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
    return first, *lines, *_stage_lines(run, records, steps), *last


def _stage_lines(run: RunFile, records: list[Record], steps: int) -> Iterator[str]:
    """Where each stage begins, and what it sees; none without [[data.stage]]."""
    found = parts_to_train(run, records)
    for plan in stages(run, found, steps) if run.data.stage else ():
        shares = ", ".join(
            f"{part.name} {share:.1%}" for (part, _), share in zip(found, plan.shares, strict=True) if share
        )
        yield f"  steps {plan.begin + 1:,} to {plan.end:,}: {shares}"


def _a_step(run: RunFile) -> str:
    """The tokens of a step, in words."""
    return f"{'up to ' if run.train.batch_ramp else ''}{_counted(run.train.tokens_per_step)}"


def _counted(tokens: int) -> str:
    return f"{tokens:,} tokens"


def _number(epochs: float) -> str:
    return f"{epochs:.3g}" if epochs < 100 else f"{epochs:,.0f}"
