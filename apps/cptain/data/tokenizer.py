"""The Hugging Face tokenizer, used as Megatron's HuggingFaceTokenizer uses it, and as fast as is exact.

Megatron encodes with `tokenizer(text).input_ids`, so a BOS appears where the tokenizer itself adds one, and appends the
tokenizer's EOS as end of document; the dtype of the ids follows from `len(tokenizer)`, added tokens included.

What transformers makes of a folder (`TokenizerFacts`) is asked of it once, and kept for all runs of a work_dir:
importing it and loading a tokenizer takes longer than everything else here. Ids come from the first of fastokens and
splintr-rs that takes the tokenizer and agrees with Hugging Face's tokenizers library on every probe, else from that
library; `check` compares documents while running. Neither of the two knows `split_special_tokens`, which no serialized
tokenizer holds: where it is set, Hugging Face's library encodes alone.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from cptain import __version__, atomic
from cptain.data.agreement import has_tables, split, unlike
from cptain.data.hf_tokenizer import ask_transformers, load_tokenizer
from cptain.errors import CptainError, one_line
from cptain.model.architecture import model_folder

Ids = npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int64]
_Fast = Callable[[list[str]], tuple[Ids, Lengths]]

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
# And what else belongs to a tokenizer: templates, which decide none, and the files of formats that it was made from.
_BESIDE = ("chat_template*", "*.model", "*.tiktoken", "vocab.*")
_SENTENCEPIECE, _TEKKEN = ("spiece.model", "tokenizer.model"), "tekken.json"
_SENTENCEPIECE_NEEDS = ("protobuf", "sentencepiece", "tiktoken")
_PROBES = (
    *("", " ", "a", "\n", "\r\n\t \x00\x7f", " " * 500 + "y", "x" * 3000, "Hello  world\n\n 123456 I'm  we'LL"),
    *(
        "日本語の文章、テスト。",
        "がぎぐ e\u0301 👨\u200d👩\u200d👧 \u3000\u00a0\u200b",
        "①ⅣﾊﾝｶｸＡ𠮷",
        "اَلْعَرَبِيَّةُ हिन्दी ไทย",
    ),
    *("def f(x):\n    return x**2  # 3.14\n", "<|end_of_text|> </s> <s> [INST]", "\ufeffa\ufffd\ue000"),
)
# The one class of texts in which fastokens 0.3.5 differs: (?i:'s) matches the long s too.
_UNLIKE = "'\u017f"
_LOOKED_UP = 1 << 20  # characters of a text at once


def tokenizer_hash(folder: Path) -> str:
    """SHA-256, hexadecimal, over the names and contents of the tokenizer's files in `folder`."""
    digest = hashlib.sha256()
    for name in _FILES:
        if (folder / name).is_file():
            digest.update(f"{name}\0{(folder / name).stat().st_size}\0".encode())
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer in `folder`."""
    return any((folder / name).is_file() for name in _FILES)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model's folder belongs to its tokenizer."""
    return name in _FILES or (not name.startswith(".") and any(fnmatchcase(name, pattern) for pattern in _BESIDE))


def _check_format(folder: Path) -> None:
    """Refuse by name what transformers would fail at in many words: no tokenizer, or one that it cannot read here."""
    if not has_tokenizer(folder):
        if (folder / _TEKKEN).is_file():
            raise CptainError(
                f"{folder / _TEKKEN}: Mistral's own format, which is not read: give model.tokenizer a folder with the "
                "model's tokenizer.json"
            )
        raise CptainError(f"{folder}: no tokenizer in this folder (looked for {', '.join(_FILES)})")
    if (folder / "tokenizer.json").is_file() or not any((folder / name).is_file() for name in _SENTENCEPIECE):
        return
    if needed := [name for name in _SENTENCEPIECE_NEEDS if not _is_installed(name)]:
        raise CptainError(
            f"{folder}: its tokenizer is sentencepiece's alone, and reading it needs {', '.join(needed)}: "
            "pip install 'cptain[sentencepiece]'"
        )


def _is_installed(distribution: str) -> bool:
    with suppress(PackageNotFoundError):
        return bool(version(distribution))
    return False


@dataclass(frozen=True)
class TokenizerFacts:
    """What transformers makes of a tokenizer's folder.

    Attributes:
        hash: see `tokenizer_hash`.
        eos: the id that ends a document.
        length: ids in all, added tokens included: `len(tokenizer)`.
        size: the highest id and one more: `length`, and the holes.
        split_special_tokens: whether a special token's name in a text is plain text.
        tokenizer: as the tokenizers library serializes it; None where it has no fast form.
    """

    hash: str
    eos: int
    length: int
    size: int
    split_special_tokens: bool
    tokenizer: str | None


def tokenizer_facts(name: str, cache: Path | None = None) -> TokenizerFacts:
    """What transformers makes of the tokenizer in a local folder or of a hub id.

    Args:
        name: the folder or id.
        cache: a folder to keep the answer in; None asks transformers every time.

    Raises:
        CptainError: no such folder, no tokenizer in it, or a tokenizer without EOS.
    """
    folder = model_folder(name)
    _check_format(folder)
    digest = tokenizer_hash(folder)
    file = kept_file(cache, digest, "transformers") if cache else None
    if file is not None and file.is_file():
        with suppress(OSError, ValueError):  # asked again
            known: dict[str, Any] = orjson.loads(file.read_bytes())
            if known.keys() == {one.name for one in fields(TokenizerFacts)}:
                return TokenizerFacts(**known)
    facts = TokenizerFacts(digest, **ask_transformers(folder))
    if file is not None:
        atomic.remove_stale_partials(file.parent)
        with suppress(OSError, CptainError):  # of another user of the work_dir: asked every time
            atomic.write_json(file, asdict(facts))
    return facts


def kept_file(folder: Path, digest: str, *libraries: str) -> Path:
    """Where an answer is kept that depends on a tokenizer's hash, on cptain and on the versions of libraries."""
    versions = "-".join(f"{name}-{version(name)}" for name in libraries)
    return folder / f"{digest}-cptain-{__version__}-{versions}.json"


class Tokenizer:
    """A tokenizer loaded from a local folder or a hub id.

    Args:
        name: the folder or id.
        cache: see `tokenizer_facts`, whose errors this raises.
        backend: "auto", or "hf" for Hugging Face's tokenizers library alone.
        facts: what `tokenizer_facts` said of it, where that is known.

    Attributes:
        folder: where its files are.
        vocab_size: what Megatron chooses the dtype of the ids by (`cptain.data.indexed_dataset.token_dtype`).
        eod: id that ends a document, the tokenizer's EOS.
        backend: what encodes, and why, for people.
    """

    def __init__(
        self, name: str, cache: Path | None = None, backend: str = "auto", facts: TokenizerFacts | None = None
    ) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes and threads are the parallelism here
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        self.folder = model_folder(name)
        facts = facts or tokenizer_facts(name, cache)
        self.eod = facts.eos
        # Megatron goes by the length, and would write an id over 65,535, which holes make possible, as another.
        self.vocab_size = facts.length if facts.size <= 1 << 16 else facts.size
        serialized = facts.tokenizer
        self._slow: Any = None
        self._fast: _Fast | None = None
        self._unlike: npt.NDArray[np.bool_] | None = None  # by code point, where there are any
        if serialized is None:
            self._slow, self.backend = load_tokenizer(self.folder), "transformers, in Python: it has no fast form"
            return
        if facts.split_special_tokens:
            self._hf: Any = _hf(serialized)
            self._hf.encode_special_tokens = True
            self.backend = "tokenizers, of Hugging Face (no other knows its split_special_tokens = true)"
            return
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(_fastokens, serialized) if backend == "auto" else None
            self._hf = _hf(serialized)
            wait([first] if first else [])  # a signal may end this wait, and must not end the join of a thread at work
        self.backend = "tokenizers, of Hugging Face" + ("" if first else " (--backend hf)")
        refused = []
        for name, load in (("fastokens", first.result), ("splintr-rs", partial(_splintr, serialized))) if first else ():
            try:
                fast = load()
                self._check_probes(fast)
                if has_tables(serialized):
                    kept = kept_file(cache, facts.hash, name, "tokenizers") if cache else None
                    self._unlike = _by_code_point(unlike(partial(_split_by, fast), self.exact, kept))
                self._fast, self.backend = fast, f"{name} {version(name)}"
                break
            except Exception as error:  # they say in many ways that they do not take a tokenizer
                refused.append(f"{name} does not take it: {one_line(error)}")
        if refused:
            self.backend += f" ({'; '.join(refused)})"

    def _check_probes(self, fast: _Fast) -> None:
        special = [token.content for token in self._hf.get_added_tokens_decoder().values()]
        texts = [*_PROBES, *(f"a {token} b{token}c" for token in special[:256])]
        random = Random(0)
        size = self._hf.get_vocab_size()
        for count in range(1, 40):  # texts of its own words
            texts.append(self._hf.decode([random.randrange(size) for _ in range(count)], skip_special_tokens=False))
        ids, lengths = fast(texts)
        ends = np.cumsum(lengths)
        for place, encoding in enumerate(self._hf.encode_batch_fast(texts)):
            if ids[ends[place] - lengths[place] : ends[place]].tolist() != encoding.ids:
                raise ValueError(f"its ids differ for {texts[place][:40]!r}")

    def encode(self, texts: list[str]) -> tuple[Ids, Lengths]:
        """The ids of all texts one after the other, without EOD, and how many each has."""
        if self._fast is None:
            return _joined(self.exact(texts))
        ids, lengths = self._fast(texts)
        apart = [place for place, text in enumerate(texts) if self._is_unlike(text)]
        if apart:
            parts = np.split(ids, np.cumsum(lengths)[:-1])
            for place, exact in zip(apart, self.exact([texts[place] for place in apart]), strict=True):
                parts[place] = np.array(exact, dtype=np.uint32)
            return np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64)
        return ids, lengths

    def _is_unlike(self, text: str) -> bool:
        """Whether the fast encoder may differ for a text."""
        if _UNLIKE in text:
            return True
        if self._unlike is None or text.isascii():
            return False
        parts = (text[start : start + _LOOKED_UP] for start in range(0, len(text), _LOOKED_UP))
        return any(self._unlike[np.frombuffer(part.encode("utf-32-le"), "<u4")].any() for part in parts)

    def exact(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, by Hugging Face's own library."""
        if self._slow is not None:
            return self._slow(texts)["input_ids"] if texts else []
        return [encoding.ids for encoding in self._hf.encode_batch_fast(texts)]

    def check(self, text: str, ids: Ids) -> bool:
        """Whether Hugging Face gives `text` the same ids."""
        return self._fast is None or self.exact([text])[0] == ids.tolist()


def _by_code_point(characters: frozenset[str]) -> npt.NDArray[np.bool_] | None:
    """A table of them: looking a text up in a set takes as long as encoding it."""
    if not characters:
        return None
    table = np.zeros(0x110000, dtype=bool)
    table[[ord(character) for character in characters]] = True
    return table


def _hf(serialized: str) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(serialized)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _fastokens(serialized: str) -> _Fast:
    from fastokens._native import Tokenizer as FastTokenizer

    tokenizer = FastTokenizer.from_json_str(serialized)
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: list[str]) -> tuple[Ids, Lengths]:
        flat, offsets = tokenizer.encode_batch_flat(texts, add_special_tokens=True)
        ends = np.frombuffer(offsets, np.uint64).astype(np.int64)
        return np.frombuffer(flat, np.uint32), ends[1:] - ends[:-1]

    return encode


def _split_by(fast: _Fast, texts: list[str]) -> list[list[int]]:
    return split(*fast(texts))


def _splintr(serialized: str) -> _Fast:
    import splintr

    tokenizer = splintr.from_json_bytes(serialized.encode())

    def encode(texts: list[str]) -> tuple[Ids, Lengths]:
        # Its batch calls use threads of its own, which a forked process does not have.
        parts = [tokenizer.encode_flat(text) for text in texts]
        return np.frombuffer(b"".join(parts), np.uint32), np.fromiter(map(len, parts), np.int64, len(parts)) // 4

    return encode


def _joined(ids: list[list[int]]) -> tuple[Ids, Lengths]:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.fromiter((token for part in ids for token in part), np.uint32, int(lengths.sum()))
    return flat, lengths
