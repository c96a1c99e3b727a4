"""A fast encoder is believed for those characters alone for which it gave Hugging Face's ids."""

import unicodedata
from pathlib import Path

from cptain.data.tokenizer import Tokenizer
from test_ids import trained
from tokenizers import Tokenizer as Serialized

# Assigned or changed in Unicode since the tables of Hugging Face's library: Reiwa, Arabic marks, a Latin modifier.
NEWER = ["㋿", "\u0898", "\u089c", "\U00010781"]


def test_texts_of_characters_that_the_fast_encoder_normalizes_otherwise_go_to_hugging_face(
    tmp_path: Path, texts: list[str]
) -> None:
    folder = trained("Unigram with NFKC", tmp_path / "tokenizer", [*texts, *["令和元年、令和二年"] * 50])
    tokenizer = Tokenizer(str(folder), tmp_path / "cache")
    assert tokenizer.backend.startswith("splintr-rs")
    hf = Serialized.from_file(str(folder / "tokenizer.json"))
    every = [
        before + one + after for one in NEWER for before in ("", "a", "一") for after in ("", "b", "\u0301", "\u3099")
    ]
    ids, lengths = tokenizer.encode(every)
    ends = lengths.cumsum()
    for text, end, length in zip(every, ends, lengths, strict=True):
        assert ids[end - length : end].tolist() == hf.encode(text).ids, [unicodedata.name(one, "?") for one in text]
    assert tokenizer._is_unlike("元年a㋿")
    assert not tokenizer._is_unlike("元年a")
    (kept,) = (file for file in (tmp_path / "cache").iterdir() if "splintr-rs" in file.name)
    kept.write_text('["\u1234"]')  # what is kept is not asked again
    again = Tokenizer(str(folder), tmp_path / "cache")
    assert [one for one in "元㋿\u1234x" if again._is_unlike(one)] == ["\u1234"]
