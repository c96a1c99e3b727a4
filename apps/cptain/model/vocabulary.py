"""A tokenizer must not be larger than the model.

An id beyond config.json's vocab_size has no row in the model's embedding. Megatron pads the embedding and would train
such an id on a row of padding, which export cuts off: nothing on the way would say a word. What counts is the highest
id, added tokens and holes included; a tokenizer may well be smaller than its model. Rows for more tokens are asked for
by [model.vocabulary] (`cptain.data.vocabulary`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cptain.errors import CptainError
from cptain.model.architecture import model_folder, read_config


@dataclass(frozen=True)
class Over:
    """How many tokens of some data have no row in the embedding.

    Attributes:
        over: those.
        tokens: that were looked at.
        where: they are, for people.
    """

    over: int
    tokens: int
    where: str


def check_vocabulary(tokenizer_folder: Path, tokenizer_size: int, hf: str, count: Callable[[int], Over | None]) -> None:
    """Refuse a tokenizer that is larger than the model.

    Args:
        tokenizer_folder: where the tokenizer is.
        tokenizer_size: its highest id, and one more.
        hf: the model: local folder or hub id, of which only config.json is needed.
        count: given the model's vocab_size, counts the data's tokens over it; None where there is no data to look at.

    Raises:
        CptainError: it is larger; both sizes, and how many tokens are over.
    """
    folder = model_folder(hf, ["config.json"])
    size = read_config(folder).get("vocab_size")
    if not isinstance(size, int):
        raise CptainError(f"{folder / 'config.json'}: vocab_size: is missing, or no whole number")
    if tokenizer_size <= size:
        return
    found = count(size)
    share = f" ({found.over:,} of the {found.tokens:,} tokens {found.where})" if found else ""
    raise CptainError(
        f"{tokenizer_folder}: the tokenizer has {tokenizer_size:,} ids, and the model {size:,} ({folder}/config.json, "
        f"vocab_size): what is over has no row in the embedding{share}: enlarge the model first "
        "(model.vocabulary.tokenizer does), or name its own tokenizer in model.tokenizer"
    )
