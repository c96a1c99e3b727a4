"""A tokenizer's folder, as transformers makes a tokenizer of it.

Its versions 4 and 5 write folders that differ: 4 cannot load what 5 saved, and an image may have 4.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from cptain.errors import CptainError, one_line

_CONFIG = "tokenizer_config.json"
_WRITES_BACKEND = 5  # the first version of transformers that has the key, and reads what it means


def _in_the_words_of_4(folder: Path, config: dict[str, Any], to: Path) -> Path:
    """The tokenizer in `folder`, which transformers 5 saved, as 4 would have: linked in `to`, but for its config.

    Version 5 writes to tokenizer.json all that decides the ids, and 4's general class reads it from there alone.
    """
    for file in folder.iterdir():
        (to / file.name).symlink_to(file.resolve())
    special = config.pop("extra_special_tokens", None)
    if isinstance(special, list):  # 5's name of the key; 4 has another use for it
        config["additional_special_tokens"] = special
    elif special is not None:
        config["extra_special_tokens"] = special
    (to / _CONFIG).unlink()
    (to / _CONFIG).write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
    return to


def load_tokenizer(folder: Path) -> Any:
    """A tokenizer as transformers makes it, whichever of its versions is here and whichever saved it.

    Raises:
        CptainError: transformers cannot load it, or it has no EOS.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about long sequences
    import transformers

    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        saved_by_5 = config.get("backend") == "tokenizers" and (folder / "tokenizer.json").is_file()
    except (OSError, ValueError, AttributeError):
        saved_by_5 = False  # said by transformers, where it cannot do without
    try:
        with TemporaryDirectory() as scratch:
            if saved_by_5 and int(transformers.__version__.partition(".")[0]) < _WRITES_BACKEND:
                folder_here = _in_the_words_of_4(folder, config, Path(scratch))
            else:
                folder_here = folder
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder_here))
    except Exception as error:
        raise CptainError(f"{folder}: the tokenizer cannot be loaded: {one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise CptainError(f"{folder}: the tokenizer has no eos_token, which ends a document")
    return tokenizer


def ask_transformers(folder: Path) -> dict[str, Any]:
    """What transformers makes of a tokenizer's folder, asked in a process of its own, whose memory ends with it.

    Returns:
        All of `cptain.data.tokenizer.TokenizerFacts` but the hash.

    Raises:
        CptainError: transformers cannot load it, or it has no EOS.
    """
    # A tokenizer needs no torch; importing it would double the time and the memory.
    ask = "import sys; sys.modules['torch'] = None; from cptain.data.hf_tokenizer import _answer; _answer(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", ask, str(folder)], capture_output=True, text=True)
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CptainError(f"{folder}: the tokenizer cannot be loaded: {said[-1]}") from None
    if "error" in answer:
        raise CptainError(answer["error"])
    return answer


def _answer(folder: str) -> None:
    """The other side of `ask_transformers`: print the answer, as JSON on one line."""
    try:
        tokenizer = load_tokenizer(Path(folder))
    except CptainError as error:
        print(json.dumps({"error": str(error)}))
        return
    backend = getattr(tokenizer, "_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    serialized = _short(backend) if backend is not None else None
    answer = {
        "eos": tokenizer.eos_token_id,
        "length": len(tokenizer),
        "size": max([*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder]) + 1,
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
        "tokenizer": serialized,
    }
    print(json.dumps(answer))


def _short(tokenizer: Any) -> str:
    """A tokenizer of the tokenizers library, serialized with its merges as "a b", the older form, where that loads as
    the very same tokenizer: 280,000 pairs as lists of two take a third of the time to load and half of the memory."""
    serialized: str = tokenizer.to_str()
    content = orjson.loads(serialized)
    with suppress(Exception):  # no merges; or white space in one, which the older form cannot hold
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        short = orjson.dumps(content).decode()
        if type(tokenizer).from_str(short).to_str() == serialized:
            return short
    return serialized
