"""The Hugging Face tokenizer, used as Megatron's HuggingFaceTokenizer uses it.

Megatron encodes with `tokenizer(text).input_ids`, so a BOS appears where the tokenizer itself adds one, and appends the
tokenizer's EOS as end of document; the dtype of the ids follows from `len(tokenizer)`, added tokens included.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from cptain.architecture import model_folder
from cptain.errors import CptainError, one_line

# What decides a tokenizer's ids, in the folders of both fast and sentencepiece tokenizers.
_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def tokenizer_hash(folder: Path) -> str:
    """SHA-256, hexadecimal, over the names and contents of the tokenizer's files in `folder`."""
    digest = hashlib.sha256()
    for name in _FILES:
        if (folder / name).is_file():
            digest.update(f"{name}\0{(folder / name).stat().st_size}\0".encode())
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


class Tokenizer:
    """A tokenizer loaded from a local folder or a hub id.

    Attributes:
        folder: where its files are.
        hash: see `tokenizer_hash`.
        vocab_size: ids in all, added tokens included.
        eod: id that ends a document, the tokenizer's EOS.

    Raises:
        CptainError: no such folder, no tokenizer in it, or a tokenizer without EOS.
    """

    def __init__(self, name: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are the parallelism here
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about long sequences
        from transformers import AutoTokenizer

        self.folder = model_folder(name)
        if not any((self.folder / file).is_file() for file in _FILES):
            raise CptainError(f"{self.folder}: no tokenizer in this folder (looked for {', '.join(_FILES)})")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(self.folder))
        except Exception as error:
            raise CptainError(f"{self.folder}: the tokenizer cannot be loaded: {one_line(error)}") from error
        if self._tokenizer.eos_token_id is None:
            raise CptainError(f"{self.folder}: the tokenizer has no eos_token, which ends a document")
        self.eod: int = self._tokenizer.eos_token_id
        self.vocab_size: int = len(self._tokenizer)
        self.hash = tokenizer_hash(self.folder)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without EOD."""
        ids: list[list[int]] = self._tokenizer(texts)["input_ids"]
        return ids
