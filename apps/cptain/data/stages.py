"""How much of each part of the mix a run sees, stage by stage ([[data.stage]]).

A run without such tables has one stage, and Megatron's order of its documents. With them a part is a stream that does
not depend on how much is taken of it (`cptain.training.order`): every stage takes what comes next, so that what was
trained on stays as it was whatever later stages say.
"""

import hashlib
import json
from dataclasses import dataclass

from cptain.data.blend import Part, parts
from cptain.data.manifest import Record
from cptain.data.split import training_tokens
from cptain.errors import bad_usage
from cptain.run_file import RunFile
from cptain.run_stages import Stage
from cptain.run_train import Train


@dataclass(frozen=True)
class StageOf:
    """A stage of a run.

    Attributes:
        begin: steps done before it.
        end: steps done after it.
        shares: of the tokens that it sees, by part, in the order of the parts; they sum to 1.
    """

    begin: int
    end: int
    shares: list[float]


def parts_to_train(run: RunFile, records: list[Record]) -> list[tuple[Part, int]]:
    """The parts of the mix, each with its tokens to train on, which may be none. Errors are those of `parts`."""
    return [
        (part, training_tokens(run.data_folder, part.records, run.data.split)) for part in parts(run.data.mix, records)
    ]


def spans(run: RunFile, steps: int) -> list[tuple[int, int, Stage | None]]:
    """Steps done before and after each stage, and its table; None: the weights of the mix hold.

    Args:
        run: the run.
        steps: in all.

    Raises:
        CptainError: exit status 2: stages that do not follow one another within the run.
    """
    begins: list[tuple[int, Stage | None]] = [(stage.begin(steps), stage) for stage in run.data.stage]
    if not begins or begins[0][0] > 0:
        begins.insert(0, (0, None))
    ends = [begin for begin, _ in begins[1:]] + [steps]
    for (begin, _), end in zip(begins, ends, strict=True):
        if begin >= end:
            bad_usage(f"data.stage: one begins at step {begin}, and ends at step {end} of {steps}: stages must follow")
    return [(begin, end, stage) for (begin, stage), end in zip(begins, ends, strict=True)]


def stages(run: RunFile, found: list[tuple[Part, int]], steps: int) -> list[StageOf]:
    """The stages of a run.

    Args:
        run: the run.
        found: its parts, from `parts_to_train`.
        steps: in all.

    Raises:
        CptainError: exit status 2: stages that name a part without a document to train on, or whose repeats take
            another number of steps; see also `spans`.
    """
    if not run.data.stage:
        return [StageOf(0, steps, _normal([part.weight if tokens else 0.0 for part, tokens in found]))]
    of_mix = {part.name: part.repeat if run.data.repeats else part.weight for part, _ in found}
    plans = []
    for begin, end, stage in spans(run, steps):
        amounts, repeats = (stage.amounts, stage.repeat is not None) if stage else (of_mix, run.data.repeats)
        for part, tokens in found:
            if amounts.get(part.name) and not tokens:
                bad_usage(f"data.stage: {part.name} has no document to train on by data.split = {run.data.split}")
        weights = [amounts.get(part.name, 0.0) * (tokens if repeats else 1.0) for part, tokens in found]
        needed = run.train.steps_for(sum(weights), begin) if repeats else end - begin
        if needed != end - begin:
            bad_usage(
                f"data.stage: the repeats of the stage that begins at step {begin} take {needed} steps, and it has "
                f"{end - begin}: let it end at step {begin + needed}, where the next one begins or train.steps end"
            )
        plans.append(StageOf(begin, end, _normal(weights)))
    return plans


def _normal(weights: list[float]) -> list[float]:
    whole = sum(weights)
    return [weight / whole for weight in weights] if whole else weights


def seen_by(plans: list[StageOf], train: Train, steps: int) -> list[float]:
    """How many tokens of each part the first `steps` of a run see."""
    tokens = [
        train.tokens_seen(max(plan.begin, min(plan.end, steps))) - train.tokens_seen(plan.begin) for plan in plans
    ]
    return [
        sum(share * of_stage for share, of_stage in zip(of_part, tokens, strict=True))
        for of_part in zip(*(plan.shares for plan in plans), strict=True)
    ]


def identity(part: Part, split: str) -> str:
    """What a part's order is of: a hash of its files, their content and tokens, and of how they are split."""
    lines = [split, *(json.dumps([one.kept_name, one.sha256, one.tokens]) for one in part.records)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
