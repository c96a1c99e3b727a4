"""[model] of the run file: what is trained, and which tokens it gets."""

from typing import Literal, Self

from pydantic import model_validator

from cptain.run_values import AbsolutePath, FolderOrHubId
from cptain.toml_file import Section


class Vocabulary(Section):
    """Tokens that the model has not yet: the embedding and the output layer get a row for each.

    One of add and tokenizer says which.

    add: a file of tokens, one a line.
    tokenizer: local folder or hub id of a tokenizer that begins with all ids of the model's own.
    initialise: what a new row is: "subword-mean", the mean of the rows of the pieces that the model's own tokenizer
        splits the token into; "copy", the row of the first of them, with which it has one logit until it is trained;
        "mean", the mean of all rows of its ids.
    """

    add: AbsolutePath | None = None
    tokenizer: FolderOrHubId | None = None
    initialise: Literal["subword-mean", "mean", "copy"] = "subword-mean"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.add is None) == (self.tokenizer is None):
            raise ValueError("give exactly one of add and tokenizer")
        return self


class Model(Section):
    """What is trained.

    hf: local folder or hub id; the architecture comes from its config.json.
    tokenizer: local folder or hub id; default: hf.
    megatron: the converted checkpoint's folder; default: <run>/megatron. A shared folder serves many runs.
    vocabulary: tokens to add to the tokenizer and the model.
    """

    hf: FolderOrHubId
    tokenizer: FolderOrHubId | None = None
    megatron: AbsolutePath | None = None
    vocabulary: Vocabulary | None = None
