"""The run file's [data]: what a model is trained on, what it is validated on, and in which parts."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from cptain.run_stages import Stage, check_stages
from cptain.run_values import AbsolutePath, Glob, PairGlob, Split
from cptain.toml_file import Section

_ALL_TO_TRAIN = "1,0,0"  # a split


def _known_mix(value: Any) -> Any:
    if isinstance(value, str) and value not in ("tokens", "uniform"):
        raise ValueError('allowed: "tokens", "uniform", or [[data.mix]] tables')
    return value


class MixPart(Section):
    """A [[data.mix]] table, of the files of data.input and the pairs of data.tokenized that `input` matches.

    name: for people; default: input.
    weight: parts of the training tokens that the files share.
    repeat: how often each of their documents is seen in one of train.epochs; in its place, in every table or in none.
    """

    input: PairGlob
    name: Annotated[str, Field(pattern=r"^[^\n|]+$")] | None = None
    weight: PositiveFloat | None = None
    repeat: PositiveFloat | None = None

    @property
    def title(self) -> str:
        """What it is called."""
        return self.name or self.input


class ValidationSet(Section):
    """A [[data.validation]] table: what `input` or `tokenized` matches is validated on, and the loss is that of `name`.

    input: a glob of text files.
    tokenized: a glob of .bin/.idx pairs, in its place.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    input: Glob | None = None
    tokenized: PairGlob | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.input is None) == (self.tokenized is None):
            raise ValueError("give input or tokenized")
        return self


class Data(Section):
    """What it is trained on.

    input: globs of .jsonl, .jsonl.gz and .jsonl.zst files; ** is any depth.
    tokenized: prefixes or globs of .bin/.idx pairs that are there already; they are checked and trained on as they are.
    output: the tokenized data's folder; default: <run>/data. A shared folder serves many runs.
    key: the key of a document's text.
    mix: how files blend: "tokens" (every token once), "uniform" (every file alike), or [[data.mix]] tables.
    split: weights of train, validation and test.
    stage: other weights of the parts of mix, from a step on.
    documents: "joined": attention sees whatever is before a token in its sequence, as Megatron does; "masked": its own
        document alone, with positions that begin anew in each, whose last token is not trained on.
    validation: sets of their own to validate with; all of input is then trained on.
    on_error: "fail" at the first bad line, or "skip" and keep it in a side file.
    strip: cut white space off both ends of every text, as the lab's fork of Megatron-LM does; upstream does not.
    check_fraction: of the documents, encoded by Hugging Face's own library too; a difference ends the run.
    max_document_bytes: a longer line is a bad one.
    max_epochs: no part of the mix is seen more often, unless train.epochs asks for it. Returns of repeated data fall
        sharply beyond 16 (Muennighoff et al. 2023, arXiv:2305.16264).
    """

    input: list[Glob] = Field(default_factory=list)
    tokenized: list[PairGlob] = Field(default_factory=list)
    output: AbsolutePath | None = None
    key: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "text"
    mix: Annotated[Literal["tokens", "uniform"] | list[MixPart], BeforeValidator(_known_mix)] = "tokens"
    stage: list[Stage] = Field(default_factory=list)
    documents: Literal["joined", "masked"] = "joined"
    split: Split = "970,30,0"
    validation: list[ValidationSet] = Field(default_factory=list)
    on_error: Literal["fail", "skip"] = "fail"
    strip: bool = False
    check_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001
    max_document_bytes: PositiveInt = 1 << 25
    max_epochs: PositiveFloat = 16.0

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_split_off(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("validation"):
            return {"split": _ALL_TO_TRAIN, **data}
        return data

    @model_validator(mode="after")
    def _has_something_to_train_on(self) -> Self:
        if not self.sources:
            raise ValueError("give input, globs of text files, or tokenized, globs of .bin/.idx pairs, or both")
        return self

    @property
    def sources(self) -> list[str]:
        """The globs of all that is trained on."""
        return [*self.input, *self.tokenized]

    @model_validator(mode="after")
    def _says_one_thing_of_every_table(self) -> Self:
        tables = self.mix if isinstance(self.mix, list) else []
        for place, part in enumerate(tables):
            unsaid = part.weight is None and part.repeat is None
            if (part.weight and part.repeat) or (unsaid and not self.stage):
                raise ValueError(f"mix[{place}]: give weight or repeat")
        names = [part.title for part in tables]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f'mix: two tables are called "{double}"')
        if self.stage:
            check_stages(self.stage, list(tables))
        if self.repeats and any(part.weight for part in tables):
            raise ValueError("mix: give weight in every table, or repeat in every one")
        return self

    @property
    def repeats(self) -> bool:
        """Whether mix says how often documents are seen."""
        return isinstance(self.mix, list) and any(part.repeat for part in self.mix)

    @model_validator(mode="after")
    def _sets_are_apart(self) -> Self:
        names = [one.name for one in self.validation]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f'two [[data.validation]] sets are called "{double}"')
        if names and self.split != _ALL_TO_TRAIN:
            raise ValueError(
                f'split = "{self.split}": with [[data.validation]] all of the data is trained on: leave it out'
            )
        return self
