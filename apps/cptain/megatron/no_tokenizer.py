"""In the place of Megatron's tokenizer: training reads ids, and asks a tokenizer for no more than its size.

Megatron would build it in every rank, which imports transformers, some 3,000 files of it: a quarter of what a rank
computes before its first step, and on a shared disk more. Where an argument asks for the end of a document, Megatron
builds its own. Padding is another matter: since core 0.19 Megatron takes tokens that a tokenizer calls padding out of
the loss, where older ones do not; the data that cptain makes has none, and every id counts, whatever the release.
"""

from typing import Any


class NoTokenizer:
    """Answers what Megatron's data sets ask.

    Args:
        vocab_size: rows of the embedding.
    """

    eod = None  # compared with ids where an argument asks for it alone
    pad = -1  # Megatron's own word for "no id"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unique_identifiers = {"class": type(self).__name__, "vocab_size": vocab_size}  # in names of cached indices


def install() -> None:
    """Stand in for Megatron's tokenizer where it can. Call after Megatron's import."""
    from megatron.training import global_vars

    build = global_vars.build_tokenizer

    def build_tokenizer(args: Any, **kwargs: Any) -> Any:
        if args.eod_mask_loss:
            return build(args, **kwargs)
        # A multiple that always gives the size of the model's own embedding (`cptain.model.arguments`).
        args.padded_vocab_size = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        return NoTokenizer(args.padded_vocab_size)

    global_vars.build_tokenizer = build_tokenizer
