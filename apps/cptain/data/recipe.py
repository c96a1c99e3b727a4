"""How text becomes ids: all that decides them beside the input itself, described once.

Every record of a data folder has its `Recipe`. preprocess asks whether a file was made by the same one, a sweep whether
two runs may share a folder, train whether the data is what the run file says. A key of [data] that changes what is
written is a field here under its own name, and needs no other place.
"""

from dataclasses import dataclass, fields
from typing import Any

from cptain.data.tokenizer import TokenizerFacts
from cptain.run_data import Data
from cptain.run_file import RunFile
from cptain.toml_file import shown


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
    tokenizer: str
    tokenizer_size: int
    split_special_tokens: bool

    def differences(self, run: RunFile, tokenizer: str) -> list[str]:
        """What a run file has otherwise, in words: each key, its value here and its value there.

        Args:
            run: the run file.
            tokenizer: hash of its tokenizer, from which the other facts of a tokenizer follow.
        """
        found = [
            f"data.{key} = {shown(getattr(self, key))}, and the run file has {shown(value)}"
            for key, value in options(run).items()
            if getattr(self, key) != value
        ]
        if self.tokenizer != tokenizer:
            found.append(
                f"another model.tokenizer, and the run file has {run.tokenizer} "
                f"(sha256 {self.tokenizer[:12]} there, {tokenizer[:12]} here)"
            )
        return found


def options(run: RunFile) -> dict[str, Any]:
    """The run file's part of a recipe, which is all but the tokenizer."""
    return {one.name: getattr(run.data, one.name) for one in fields(Recipe) if one.name in Data.model_fields}


def recipe(run: RunFile, tokenizer: TokenizerFacts) -> Recipe:
    """The recipe of a run."""
    return Recipe(
        **options(run),
        tokenizer=tokenizer.hash,
        tokenizer_size=tokenizer.size,
        split_special_tokens=tokenizer.split_special_tokens,
    )
