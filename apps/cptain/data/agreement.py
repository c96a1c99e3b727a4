"""Which characters a fast encoder normalizes otherwise than Hugging Face's library: asked once, then kept.

Libraries carry Unicode's tables, each of its own year: splintr-rs 0.22 makes two characters of U+32FF by NFKC, and
tokenizers 0.23 does not know it. Every code point is asked, alone between letters and before combining marks, where
the tokenizer's normalizer has such tables: Llama 3's has none, Qwen's has NFC.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from cptain import atomic
from cptain.errors import CptainError

Encode = Callable[[list[str]], list[list[int]]]
_TABLES = ("NFC", "NFD", "NFKC", "NFKD", "Precompiled", "Lowercase", "StripAccents", "BertNormalizer", "Nmt")
_TOGETHER = 64  # characters of a text: where its ids agree, each of theirs does
_BATCH = 256  # texts
_MOST = 2000  # characters that differ, beyond which the encoder is not of this tokenizer


def has_tables(serialized: str) -> bool:
    """Whether a serialized tokenizer normalizes by tables of Unicode's."""

    def kinds(normalizer: dict[str, object] | None) -> Iterable[object]:
        if normalizer:
            yield normalizer["type"]
            members = normalizer.get("normalizers")
            for member in members if isinstance(members, list) else ():
                yield from kinds(member)

    return any(kind in _TABLES for kind in kinds(orjson.loads(serialized)["normalizer"]))


def unlike(fast: Encode, exact: Encode, kept: Path | None) -> frozenset[str]:
    """The characters for which two encoders differ.

    Args:
        fast: gives the ids of texts, from any thread.
        exact: Hugging Face's.
        kept: a file for the answer, named after all that it depends on.

    Raises:
        ValueError: too many differ.
    """
    if kept and kept.is_file():
        with suppress(OSError, ValueError):  # asked again
            return frozenset(orjson.loads(kept.read_bytes()))

    def differ(groups: list[str]) -> str:
        texts = ["".join(f"a{one}b {one}\u0323\u0301c {one}\u3099" for one in group) for group in groups]
        pairs = zip(groups, fast(texts), exact(texts), strict=True)
        found = [group for group, one, other in pairs if one != other]
        if len(groups[0]) == 1 or not found:
            return "".join(found)
        return "".join(differ(list(group)) or group for group in found)

    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    groups = [every[place : place + _TOGETHER] for place in range(0, len(every), _TOGETHER)]
    batches = [groups[place : place + _BATCH] for place in range(0, len(groups), _BATCH)]
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        found = "".join(pool.map(differ, batches))
    if len(found) > _MOST:
        raise ValueError(f"its ids differ for {len(found)} characters")
    if kept:
        with suppress(OSError, CptainError):  # of another user of the work_dir: asked every time
            atomic.write_json(kept, sorted(found))
    return frozenset(found)


def split(ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64]) -> list[list[int]]:
    """The ids of each text, of what a fast encoder gives."""
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
