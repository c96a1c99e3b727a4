"""A tokenizer with more tokens than another: made by adding some, or given; and what each new token consists of.

Tokens are added to the files of the tokenizer themselves, and not by transformers, whose versions 4 and 5 save one that
the other may not load.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cptain.data.tokenizer import TokenizerFacts, is_tokenizer_file
from cptain.errors import CptainError

# Found in a text as it is written, before the tokenizer normalizes it: a normalizer that puts a ▁ before every text
# would let them be found at the beginning of one alone.
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
_SHOWN = 3


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """A tokenizer's files, by name."""
    found = [file for file in sorted(folder.iterdir()) if is_tokenizer_file(file.name) and file.is_file()]
    return {file.name: file.read_bytes() for file in found}


def read_tokens(file: Path) -> list[str]:
    """The tokens of a file, one a line; empty lines are left out.

    Raises:
        CptainError: no such file, no token in it, white space at a token's end, or a token twice; which line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CptainError(f"{file}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise CptainError(f"{file}: cannot be read: {error.strerror}") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        token = line.removesuffix("\r")
        if token != token.strip():
            raise CptainError(f"{file}:{number}: {token!r}: white space at an end of a token: take it away")
        if token in found:
            raise CptainError(f"{file}:{number}: {token!r}: is on line {found[token]} too")
        if token:
            found[token] = number
    if not found:
        raise CptainError(f"{file}: no token in it: one a line")
    return list(found)


def with_tokens(folder: Path, file: Path, base: TokenizerFacts) -> dict[str, bytes]:
    """The files of the tokenizer in `folder`, with the tokens of `file` behind its ids."""
    backend = _backend(folder, base)
    there = []
    for token in (tokens := read_tokens(file)):
        ids = [found] if (found := backend.token_to_id(token)) is not None else _ids(backend, token)
        if len(ids) == 1:
            there.append(f"{token!r} (id {ids[0]})")
    if there:
        raise CptainError(f"{file}: tokens that {folder} has already: {_few(there)}: take them away")
    files = tokenizer_files(folder)
    if "tokenizer.json" not in files:
        raise CptainError(f"{folder}: no tokenizer.json to add tokens to: give model.vocabulary.tokenizer a tokenizer")
    numbered = dict(enumerate(tokens, base.size))
    whole = json.loads(files["tokenizer.json"])
    whole["added_tokens"] += [{"id": number, "content": token, **_FLAGS} for number, token in numbered.items()]
    changed = {"tokenizer.json": whole}
    # transformers reads them here too, where a tokenizer has these.
    if "added_tokens_decoder" in (config := json.loads(files.get("tokenizer_config.json", b"{}"))):
        config["added_tokens_decoder"] |= {str(n): {"content": token, **_FLAGS} for n, token in numbered.items()}
        changed["tokenizer_config.json"] = config
    if "added_tokens.json" in files:
        by_name = {token: number for number, token in numbered.items()}
        changed["added_tokens.json"] = json.loads(files["added_tokens.json"]) | by_name
    texts = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in changed.items()}
    return files | {name: text.encode() for name, text in texts.items()}


def _backend(folder: Path | str, facts: TokenizerFacts) -> Any:
    """A tokenizer of Hugging Face's tokenizers library."""
    from tokenizers import Tokenizer

    if facts.tokenizer is None:
        raise CptainError(f"{folder}: the tokenizer has no fast form, which model.vocabulary needs")
    return Tokenizer.from_str(facts.tokenizer)


def _ids(backend: Any, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def _few(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def pieces_of_new(base_name: Path, base: TokenizerFacts, name: str, larger: TokenizerFacts) -> list[list[int]]:
    """The base's ids that each new token consists of.

    An added token is text, and is split as a text of its own; a token of the vocabulary proper is written in the
    model's own alphabet (of bytes, or with ▁), and is split by the base's model without its normalizer.

    Raises:
        CptainError: the larger tokenizer is not the base's ids and others that follow them without a hole.
    """
    before, after = _backend(base_name, base), _backend(name, larger)
    if larger.size < base.size:
        raise CptainError(f"{name}: has {larger.size:,} ids, and {base_name} {base.size:,}: it must begin with those")
    old, new = ({number: token for token, number in one.get_vocab().items()} for one in (before, after))
    for number in range(base.size):
        if old.get(number) != new.get(number):
            there, here = (repr(one[number]) if number in one else "none" for one in (old, new))
            raise CptainError(
                f"{name}: id {number} is {here}, and {there} in {base_name}: their first ids must be equal"
            )
    if larger.size == base.size:
        raise CptainError(f"{name}: has no token that {base_name} has not: leave [model.vocabulary] out")
    if holes := [number for number in range(base.size, larger.size) if number not in new]:
        raise CptainError(f"{name}: id {holes[0]} has no token, and {larger.size - 1} has: new ids must have no holes")
    added = after.get_added_tokens_decoder()
    return [
        _ids(before, new[number]) if number in added else [piece.id for piece in before.model.tokenize(new[number])]
        for number in range(base.size, larger.size)
    ]
