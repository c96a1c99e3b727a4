"""The ids are those of transformers, whoever encodes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import cptain
from cptain.data.tokenizer import Tokenizer
from cptain.run_file import load_run


def trained(kind: str, folder: Path, texts: list[str]) -> Path:
    """A tokenizer of a family, trained on `texts`, as transformers saves it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    if kind == "byte-level BPE":  # Llama 3, Qwen, GPT
        tokenizer = Tokenizer(models.BPE(ignore_merges=True))
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        )
        pattern += r"\s+(?!\S)|\s+"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "byte-fallback BPE":  # Llama 2, Gemma
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special)
    elif kind == "Metaspace BPE":  # Mistral
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special)
    else:  # Unigram with NFKC: llm-jp
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=special, unk_token="<unk>")
    tokenizer.decoder = {
        "byte-level BPE": decoders.ByteLevel(),
        "byte-fallback BPE": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    }.get(kind, decoders.Metaspace())
    tokenizer.train_from_iterator([text[:500] for text in texts], trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


FAMILIES = ["byte-level BPE", "byte-fallback BPE", "Metaspace BPE", "Unigram with NFKC"]


ODD = [
    *"aeiouAEI 0129'’.,!?-_/\\\"\n\r\t\u00a0\u3000\u200b\u200d\ufeff\u0301",
    *"あいうカタｶﾅ漢字一龍𠮷、。①Ⅳ㍿",
    *"éßſıİ😀👩🏽ไทยहि",
]


ODD += ["'s", "'ſ", "'S", "  ", "\n\n", "</s>", "<s>", "<unk>", "ing", "the", "http://", "123456"]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_transformers_on_text_and_on_noise(
    family: str, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    folder = trained(family, tmp_path / "tokenizer", texts)
    tokenizer = Tokenizer(str(folder))
    random = np.random.default_rng(7)
    noise = ["".join(random.choice(ODD, size=int(random.integers(0, 40)))) for _ in range(3000)]
    every = [*texts, *noise]
    ids, lengths = tokenizer.encode(every)
    expected = AutoTokenizer.from_pretrained(str(folder))(every)["input_ids"]
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    differ = [text for text, part, wanted in zip(every, parts, expected, strict=True) if part.tolist() != wanted]
    assert not differ, differ[:3]
    assert tokenizer.vocab_size == len(AutoTokenizer.from_pretrained(str(folder)))
    backend = "fastokens" if family in ("byte-level BPE", "byte-fallback BPE") else "splintr-rs"
    assert tokenizer.backend.startswith(backend)
    assert backend == "fastokens" or "fastokens does not take it" in tokenizer.backend
    with capsys.disabled():
        print(f" {family}: {len(every)} texts, {len(ids)} ids, {tokenizer.backend[:40]}", end="")


def test_a_library_that_errs_on_a_probe_is_not_used(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained("Unigram with NFKC", tmp_path / "tokenizer", texts)

    def load(serialized: str) -> Any:
        def encode(texts: list[str]) -> Any:
            ids, lengths = right(texts)
            return np.where(ids == ids.max(), 0, ids), lengths

        right = splintr(serialized)
        return encode

    from cptain.data.tokenizer import _splintr as splintr

    monkeypatch.setattr("cptain.data.tokenizer._splintr", load)
    backend = Tokenizer(str(folder)).backend
    assert backend.startswith("tokenizers, of Hugging Face (fastokens does not take it: ")
    assert "; splintr-rs does not take it: its ids differ for " in backend


def test_ids_that_differ_from_hugging_face_s_end_the_run_at_the_document(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fastokens is made to err on one word, as an unknown defect of it might."""
    file = text(b"".join(b'{"text": "%s"}\n' % (b"wrong" if number == 700 else b"right") for number in range(1000)))
    encode = Tokenizer.encode

    def wrong(self: Tokenizer, texts: list[str]) -> Any:
        ids, lengths = encode(self, texts)
        ids = ids.copy()
        if "wrong" in texts:
            ids[int(lengths[: texts.index("wrong") + 1].sum()) - 1] ^= 1
        return ids, lengths

    monkeypatch.setattr(Tokenizer, "encode", wrong)
    unseen = cptain("preprocess", file, "--workers", 1, "--set", "data.check_fraction=0")
    assert unseen.exit_code == 0
    seen = cptain("preprocess", file, "--workers", 1, "--force", "--set", "data.check_fraction=1")
    assert seen.exit_code == 1
    assert f"{file.parent}/in/x.jsonl:701: fastokens" in seen.output
    assert "gives other ids than Hugging Face here" in seen.output


def test_the_line_of_a_differing_document_is_told_among_lists_too(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = text(b'{"text": ["a", "b"]}\n{"text": []}\n{"text": ["c", "d", "wrong"]}\n{"text": "e"}\n')
    monkeypatch.setattr(Tokenizer, "check", lambda tokenizer, text, ids: text != "wrong")
    seen = cptain("preprocess", file, "--workers", 1, "--set", "data.check_fraction=1")
    assert seen.exit_code == 1
    assert f"{file.parent}/in/x.jsonl:3: fastokens" in seen.output


def test_documents_too_long_for_hugging_face_s_library_are_not_compared(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = text(b'{"text": "%s"}\n{"text": "short"}\n' % (b"long" * 300_000))
    compared: list[str] = []
    monkeypatch.setattr(Tokenizer, "check", lambda tokenizer, text, ids: compared.append(text) or True)
    assert cptain("preprocess", file, "--workers", 1, "--set", "data.check_fraction=1").exit_code == 0
    assert compared == ["short"]


def test_merges_are_kept_in_the_older_form_only_where_it_loads_as_the_same_tokenizer(model: Path) -> None:
    from cptain.data.hf_tokenizer import _short
    from tokenizers import Tokenizer, models

    def merges(vocabulary: list[str], pairs: list[tuple[str, str]]) -> Any:
        ids = {word: number for number, word in enumerate(vocabulary)}
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs))
        short = _short(tokenizer)
        assert Tokenizer.from_str(short).to_str() == tokenizer.to_str()
        return json.loads(short)["model"]["merges"]

    assert merges(["a", "b", "ab"], [("a", "b")]) == ["a b"]
    assert merges(["a", " ", "a "], [("a", " ")]) == [["a", " "]]
    assert merges(["#version", "b", "#versionb"], [("#version", "b")]) == [["#version", "b"]]
    unigram = Tokenizer(models.Unigram([("a", -1.5)], 0))
    assert _short(unigram) == unigram.to_str()


def test_what_transformers_says_of_a_tokenizer_is_asked_once(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = text(b'{"text": "x"}\n')
    assert cptain("preprocess", file).exit_code == 0
    (kept,) = load_run(file).tokenizers_folder.iterdir()
    monkeypatch.setattr("cptain.data.tokenizer.ask_transformers", lambda folder: pytest.fail("asked again"))
    assert cptain("preprocess", file, "--force").exit_code == 0
    assert cptain("preprocess", file, "--set", "name=another").exit_code == 0  # in a new data folder
    kept.write_text("{")
    monkeypatch.undo()
    assert cptain("preprocess", file, "--force").exit_code == 0
    assert json.loads(json.loads(kept.read_text())["tokenizer"])["model"]["type"] == "BPE"
