"""Which texts of a tokenized data set are in another too, token by token.

Exact, and cheap enough for billions of tokens: of the larger set a text is read whole only where its length and the
tokens at four places of it are those of a text of the smaller one.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cptain.data.split import read_lengths

_PLACES = (0, 1, 2, 3)  # quarters of a text that are looked at
_AT_ONCE = 1 << 20  # texts
_MIX = np.uint64(0x9E3779B97F4A7C15)  # an odd number: multiplying by it loses nothing


class _Pair:
    """A pair's texts, which lie one after another in the order of the .idx file, each without its `eod` where it ends
    with that: not every tool that writes pairs adds one."""

    def __init__(self, prefix: Path, eod: int) -> None:
        self.dtype, lengths = read_lengths(str(prefix))
        self.lengths = lengths.astype(np.int64)
        ends = np.cumsum(self.lengths)
        self.starts = ends - self.lengths
        self.ids: npt.NDArray[Any] = np.zeros(0, self.dtype)
        filled = self.lengths > 0
        if filled.any():
            self.ids = np.memmap(f"{prefix}.bin", dtype=self.dtype, mode="r")
            self.lengths[filled] -= self.ids[ends[filled] - 1] == eod

    def looks(self, first: int, stop: int) -> npt.NDArray[np.uint64]:
        """A number for each of some texts, which equal texts share; 0 for an empty one."""
        lengths, starts = self.lengths[first:stop], self.starts[first:stop]
        found = lengths.astype(np.uint64)
        filled = lengths > 0
        for quarter in _PLACES:
            ids = self.ids[starts[filled] + lengths[filled] * quarter // len(_PLACES)]
            found[filled] = (found[filled] * _MIX) ^ (found[filled] >> np.uint64(29)) ^ ids.astype(np.uint64)
        return found

    def digest(self, text: int) -> bytes:
        """A hash of a text's ids, whatever their dtype."""
        start = self.starts[text]
        ids = np.asarray(self.ids[start : start + self.lengths[text]], dtype=np.int32)
        return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def texts_in_both(few: list[Path], many: list[Path], eod: int) -> dict[Path, list[int]]:
    """The texts of `few` that `many` has too; an empty text is none.

    Args:
        few: pairs, without .bin and .idx; these are held in memory by their hashes.
        many: likewise.
        eod: the id that ends a text, or is left out there.

    Returns:
        Numbers of texts, ascending, by the pair of `few` that they are in; pairs that have none are left out.
    """
    pairs = {prefix: _Pair(prefix, eod) for prefix in few}
    places: dict[bytes, list[tuple[Path, int]]] = {}
    looks = set[int]()
    for prefix, pair in pairs.items():
        looks.update(pair.looks(0, len(pair.lengths)).tolist())
        for text in np.flatnonzero(pair.lengths).tolist():
            places.setdefault(pair.digest(text), []).append((prefix, text))
    wanted = np.array(sorted(looks - {0}), dtype=np.uint64)
    found: dict[Path, set[int]] = {}
    for prefix in many:
        pair = _Pair(prefix, eod)
        for first in range(0, len(pair.lengths), _AT_ONCE):
            seen = pair.looks(first, first + _AT_ONCE)
            for text in np.flatnonzero(np.isin(seen, wanted)).tolist():
                for one, number in places.get(pair.digest(first + text), ()):
                    found.setdefault(one, set()).add(number)
    return {prefix: sorted(found[prefix]) for prefix in few if prefix in found}
