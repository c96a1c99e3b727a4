"""How text becomes ids: all that decides them beside the input itself, described once.

Every record of a data folder has its `Recipe`. preprocess asks whether a file was made by the same one, a sweep whether
two runs may share a folder, train whether the data is what the run file says. A key of [data] that changes what is
written is a field here under its own name, and needs no other place.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cptain.data.tokenizer import Facts
from cptain.run_file import Data, RunFile
from cptain.toml_file import shown

_TOKENIZER = {"key": "model.tokenizer"}


@dataclass(frozen=True)
class Recipe:
    """The options of a data set, and its tokenizer.

    Attributes:
        key: of the texts.
        strip: whether white space was cut off the texts.
        on_error: what was done with bad lines.
        max_document_bytes: a longer line was a bad one.
        tokenizer: hash of the tokenizer (`cptain.data.tokenizer.tokenizer_hash`).
        tokenizer_size: its highest id and one more (`cptain.model.vocabulary`).
        split_special_tokens: whether a special token's name in a text is plain text.
    """

    key: str
    strip: bool
    on_error: str
    max_document_bytes: int
    tokenizer: str = field(metadata=_TOKENIZER)
    tokenizer_size: int = field(metadata=_TOKENIZER)
    split_special_tokens: bool = field(metadata=_TOKENIZER)

    def differences(self, run_file: "Recipe") -> list[str]:
        """What the run file has otherwise, in words: a key, its value here and its value there."""
        ours, theirs = asdict(self), asdict(run_file)
        found = {
            one.metadata.get("key", f"data.{one.name}"): f"{shown(ours[one.name])}, and the run file has "
            f"{shown(theirs[one.name])}"
            for one in reversed(fields(self))  # of a tokenizer's three, the hash is the one that is said
            if ours[one.name] != theirs[one.name]
        }
        return [f"{key} = {words}" for key, words in reversed(found.items())]


def options(run: RunFile) -> dict[str, Any]:
    """The run file's part of a recipe, which is all but the tokenizer."""
    return {one.name: getattr(run.data, one.name) for one in fields(Recipe) if one.name in Data.model_fields}


def recipe(run: RunFile, tokenizer: Facts) -> Recipe:
    """The recipe of a run."""
    return Recipe(
        **options(run),
        tokenizer=tokenizer.hash,
        tokenizer_size=tokenizer.size,
        split_special_tokens=tokenizer.split_special_tokens,
    )
