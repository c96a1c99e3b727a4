"""The run file's [[data.stage]]: which parts of [[data.mix]] are trained on from a step on, and how much of each."""

from typing import Annotated, Protocol, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from cptain.run_values import Fraction
from cptain.toml_file import Section


class Stage(Section):
    """A [[data.stage]] table. It lasts until the next one begins; the weights of [[data.mix]] hold until the first.

    step or share: steps done when it begins, or a share of all steps, rounded.
    weight: parts of the training tokens of each part of the mix, by name; a part that is not named is not seen.
    repeat: in its place: how often each document of a part is seen in the stage, whose steps must be as many as that
        takes.
    """

    step: NonNegativeInt | None = None
    share: Fraction | None = None
    weight: Annotated[dict[str, PositiveFloat], Field(min_length=1)] | None = None
    repeat: Annotated[dict[str, PositiveFloat], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _says_each_once(self) -> Self:
        if (self.step is None) == (self.share is None):
            raise ValueError("give step or share")
        if (self.weight is None) == (self.repeat is None):
            raise ValueError("give weight or repeat")
        return self

    def begin(self, steps: int) -> int:
        """Steps done when it begins, in a run of `steps`."""
        return self.step if self.step is not None else round((self.share or 0.0) * steps)

    @property
    def amounts(self) -> dict[str, float]:
        """Weight or repeat, whichever it has, by part."""
        return self.weight or self.repeat or {}


class _MixPart(Protocol):
    weight: float | None
    repeat: float | None

    @property
    def title(self) -> str: ...


def check_stages(stages: list[Stage], parts: list[_MixPart]) -> None:
    """Refuse stages that do not fit their mix.

    Args:
        stages: of the run file.
        parts: the [[data.mix]] tables; none where mix is a word.

    Raises:
        ValueError: naming the stage or the part.
    """
    if not parts:
        raise ValueError("stage: a stage names parts of [[data.mix]]: give such tables")
    names = [part.title for part in parts]
    for place, stage in enumerate(stages):
        if unknown := next((name for name in stage.amounts if name not in names), None):
            raise ValueError(f'stage[{place}]: no table of mix is called "{unknown}" (there: {", ".join(names)})')
    amounts = any(part.weight or part.repeat for part in parts)
    if amounts == (stages[0].step == 0):
        raise ValueError(
            "mix: its weights hold until the first stage: give none, as one begins at step 0"
            if amounts
            else "stage: nothing says what is seen before the first: give tables of mix a weight, or let it begin at 0"
        )
    seen = {name for stage in stages for name in stage.amounts}
    if never := next((part.title for part in parts if not (part.weight or part.repeat or part.title in seen)), None):
        raise ValueError(f"mix: {never} is in no stage, and has neither weight nor repeat")
