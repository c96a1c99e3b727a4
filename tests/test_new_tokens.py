"""[model.vocabulary]: tokens that the model has not yet, from the tokenizer to the exported model."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, RunFileMaker, as_if_trained, cptain, leftovers, write_jsonl, write_run_file
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.data.vocabulary import extension_of, run_architecture, tokenizer_folder
from cptain.errors import CptainError
from cptain.model.architecture import read_architecture, read_config
from cptain.run_file import load_run
from cptain.scheduling.sweep import expand
from cptain.training.start import beginning
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW = [
    "継続事前学習",
    "語彙拡張",
    *(f"追加{number}" for number in range(18)),
]  # 520 ids: padded to 640, or to 768 on two
TEXT = "語彙拡張とは、継続事前学習の前に語を足すこと。追加7, and old words."
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
MEGATRON = {EMBEDDING: "embedding.word_embeddings.weight", OUTPUT: "output_layer.weight"}


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def done(*arguments: object) -> str:
    """What a command prints that succeeds."""
    result = cptain(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    """The one line of a command that does not."""
    result = cptain(*arguments)
    assert result.exit_code in (1, 2), result.output
    return last_line(result.output)


def converted_rows(file: Path, name: str) -> torch.Tensor:
    """A tensor of the converted checkpoint, by its Hugging Face name."""
    with TorchDistReader(load_run(file).megatron_folder / "release") as reader:
        key = MEGATRON[name]
        rows = torch.empty(reader.shape(key), dtype=reader.dtype(key))
        reader.read(key, (), 0, len(rows), rows.view(-1).view(torch.uint8))
        return rows


@pytest.fixture(scope="module")
def tied(session_folder: Path, texts: list[str]) -> Path:
    """The tests' model, its output layer the embedding."""
    from demo import make_model

    folder = session_folder / "tied model"
    make_model(folder, texts, **{**TINY, "tie_word_embeddings": True})
    return folder


@pytest.fixture(scope="module")
def words(session_folder: Path) -> Path:
    """A file of new tokens."""
    file = session_folder / "words.txt"
    file.write_text("\n".join(NEW) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def extended_run(session_folder: Path, run_content: dict[str, Any], words: Path) -> Path:
    """A run file that adds the tokens to the untied model, converted."""
    file = write_run_file(session_folder / "new tokens", run_content, {"model.vocabulary": {"add": str(words)}})
    done("convert", file)
    return file


def pieces_of(model: Path, token: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(str(model))(token, add_special_tokens=False).input_ids
    return ids


def test_old_rows_are_the_models_and_a_new_one_is_the_mean_of_its_pieces(extended_run: Path, model: Path) -> None:
    base = load_file(model / "model.safetensors")
    for name in (EMBEDDING, OUTPUT):
        rows = converted_rows(extended_run, name)
        assert len(rows) == 520
        assert torch.equal(rows[:500], base[name])
        for token, row in zip(NEW, rows[500:], strict=True):
            pieces = pieces_of(model, token)
            assert len(pieces) > 1
            assert torch.equal(row, base[name][pieces].double().mean(0).float())


def test_mean_begins_a_new_row_as_the_mean_of_all(make_run: RunFileMaker, tied: Path, words: Path) -> None:
    file = make_run(model__hf=str(tied), model__vocabulary={"add": str(words), "initialise": "mean"})
    done("convert", file)
    base, rows = load_file(tied / "model.safetensors")[EMBEDDING], converted_rows(file, EMBEDDING)
    assert torch.equal(rows[:500], base)
    assert torch.allclose(rows[500:], base.double().mean(0).float().expand(20, -1), rtol=0, atol=1e-9)
    assert "21 of 21 tensors bit-equal" in done("verify", tied, load_run(file).megatron_folder)
    assert "is done and the model unchanged" in done("convert", file)
    again = cptain("convert", file, "--set", "model.vocabulary.initialise=copy")
    assert "is done" not in again.output  # rows that begin otherwise are made again
    firsts = [pieces_of(tied, token)[0] for token in NEW]
    assert torch.equal(converted_rows(file, EMBEDDING)[500:], base[firsts])
    assert "21 of 21 tensors bit-equal" in done("verify", tied, load_run(file).megatron_folder)


def test_verify_compares_new_rows_apart_and_the_logits_of_old_tokens(
    extended_run: Path, model: Path, tmp_path: Path
) -> None:
    release = load_run(extended_run).megatron_folder / "release"
    output = done("verify", model, release, "--logits")
    assert "rows 500 to 519 of the vocabulary are new, and compared with" in output
    assert f"{EMBEDDING} (new rows)" in output
    assert "23 of 23 tensors bit-equal" in output  # 21, and two parts that are new

    others = Path(shutil.copytree(release, tmp_path / "release", ignore=shutil.ignore_patterns("checksums.json")))
    record = json.loads((others / "vocabulary.json").read_text())
    (others / "vocabulary.json").write_text(json.dumps({**record, "initialise": "mean"}))
    result = cptain("verify", model, others)
    assert result.exit_code == 1
    assert "21 of 23 tensors bit-equal" in result.output
    differ = [line for line in result.output.splitlines() if line.endswith("≠")]
    assert [line.split("  ")[0] for line in differ] == [f"{OUTPUT} (new rows)", f"{EMBEDDING} (new rows)"]

    changed = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(changed / "model.safetensors")
    used = {piece for token in NEW for piece in pieces_of(model, token)}
    tensors[EMBEDDING][next(number for number in range(500) if number not in used), 0] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    result = cptain("verify", changed, release)
    differ = [line for line in result.output.splitlines() if line.endswith("≠")]
    assert [line.split("  ")[0] for line in differ] == [EMBEDDING]


@pytest.mark.parametrize(("tie", "processes"), [(False, 1), (True, 2)])
def test_it_trains_and_the_exported_model_has_the_new_tokens(
    make_run: RunFileMaker, model: Path, tied: Path, words: Path, tie: bool, processes: int, tmp_path: Path
) -> None:
    base = tied if tie else model
    write_jsonl(tmp_path / "in.jsonl", [TEXT] * 60)
    own = Path(shutil.copy(words, tmp_path / "words.txt"))
    file = make_run(
        model__hf=str(base),
        model__vocabulary={"add": str(own)},
        data__input=["in.jsonl"],
        parallel__tensor=processes,
        train__steps=2,
    )
    for command in (
        ["preprocess", file, "--workers", 1],
        ["convert", file],
        ["train", file, "--cpu"],
        ["export", file],
    ):
        done(*command)
    run = load_run(file)
    exported = run.hf_folder / "iter_0000002"

    ids = AutoTokenizer.from_pretrained(exported)(TEXT).input_ids
    assert {500, 501, 502 + 7} <= set(ids)
    assert json.loads((run.data_folder / "manifest.json").read_text())["tokens"] == 60 * (len(ids) + 1)
    assert read_architecture(exported).vocab_size == 520
    after = load_file(exported / "model.safetensors")
    assert (OUTPUT in after) == (not tie)
    assert not torch.equal(after[EMBEDDING][500], converted_rows(file, EMBEDDING)[500])
    assert AutoModelForCausalLM.from_pretrained(exported).get_input_embeddings().weight.shape == (520, 64)
    assert "verify: equal" in done("verify", exported, run.checkpoints_folder, "--logits")
    assert "| vocabulary | 520 tokens, 20 of them new (ids 500 to 519); a new" in (exported / "README.md").read_text()
    assert "is done: it is what would be written" in done("export", file)

    own.write_text("\n".join([*NEW[1:], NEW[0]]))
    plain = ("--set", f"model={{hf='{base}'}}")
    for stage in (["preprocess", file], ["train", file, "--cpu", *plain], ["export", file]):
        assert f"cptain: model.vocabulary: not what {run.folder} was trained with" in refused(*stage)


def test_the_loss_of_text_without_new_tokens_grows_by_the_softmax_denominator_alone(
    extended_run: Path, model: Path
) -> None:
    exported = as_if_trained(extended_run)
    done("export", extended_run)
    tokens = torch.tensor([pieces_of(model, "The logits of old tokens are what they were.")])
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits[0].double()
            for folder in (model, exported)
        )
    rows = [load_file(folder / "model.safetensors") for folder in (model, exported)]
    assert all(torch.equal(rows[1][name][:500], rows[0][name]) for name in (EMBEDDING, OUTPUT))
    assert after.shape[1] == 520
    assert (after[:, :500] - before).abs().max() < 1e-6
    losses = [torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:]) for logits in (before, after)]
    larger = (after.exp().sum(1) / before.exp().sum(1)).log()[:-1].mean()
    assert larger > 0
    assert abs(losses[1] - losses[0] - larger) < 1e-6


def test_tokens_take_the_rows_that_a_model_has_to_spare(make_run: RunFileMaker, model: Path, tmp_path: Path) -> None:
    spare = Path(shutil.copytree(model, tmp_path / "spare"))
    (spare / "config.json").write_text(json.dumps({**read_config(model), "vocab_size": 512}))
    tensors = load_file(spare / "model.safetensors")
    for name in (EMBEDDING, OUTPUT):
        tensors[name] = torch.cat([tensors[name], torch.zeros(12, 64)])
    save_file(tensors, spare / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "few.txt").write_text("\n".join(NEW[:5]))
    file = make_run(model__hf=str(spare), model__vocabulary={"add": "few.txt"})
    done("convert", file)
    rows = converted_rows(file, EMBEDDING)
    assert len(rows) == 512
    assert torch.equal(rows[500], tensors[EMBEDDING][pieces_of(model, NEW[0])].double().mean(0).float())
    assert not rows[505:].any()
    exported = as_if_trained(file)
    done("export", file)
    assert "25 of 25 tensors bit-equal" in done("verify", spare, load_run(file).megatron_folder)
    assert "21 of 21 tensors bit-equal" in done("verify", exported, load_run(file).megatron_folder)


def larger_tokenizer(model: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A copy of the model's tokenizer whose tokenizer.json was changed; gives the folder's path."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_a_token_of_a_larger_vocabulary_is_split_in_the_models_own_alphabet(
    make_run: RunFileMaker, model: Path, tmp_path: Path
) -> None:
    """ "é" is written as two letters that stand for its bytes there, and no text has those."""
    full_stop = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]["ãĢĤ"]

    def with_two_full_stops(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["ãĢĤãĢĤ"] = 500
        content["model"]["merges"].append(["ãĢĤ", "ãĢĤ"])

    folder = larger_tokenizer(model, tmp_path / "larger", with_two_full_stops)
    file = make_run(model__vocabulary={"tokenizer": folder})
    extension = extension_of(load_run(file))
    assert extension is not None
    assert (extension.first, extension.pieces) == (500, [[full_stop, full_stop]])
    assert not (load_run(file).folder / "tokenizer").exists()  # asking makes nothing


def test_an_added_token_is_found_as_it_is_written_and_every_file_of_the_tokenizer_has_it(
    make_run: RunFileMaker, tmp_path: Path
) -> None:
    """A Llama 2's normalizer puts a ▁ before a text: of a token that it normalized, only texts that begin with it would
    have any."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", "▁", "a", "b", "語", "彙"]
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
    by_id = {str(number): {"content": letters[number], "special": True} for number in range(3)}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": by_id}))
    (tmp_path / "own" / "added_tokens.json").write_text("{}")
    (tmp_path / "words.txt").write_text("語彙")
    run = load_run(make_run(model__tokenizer=str(tmp_path / "own"), model__vocabulary={"add": "words.txt"}))
    folder = tokenizer_folder(run)
    assert AutoTokenizer.from_pretrained(folder)("a語彙b").input_ids == [3, 4, 8, 3, 5]
    extension = extension_of(run)
    assert extension is not None
    assert extension.pieces == [[3, 6, 7]]
    assert json.loads((folder / "added_tokens.json").read_text()) == {"語彙": 8}
    assert json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]["8"]["content"] == "語彙"


def test_verify_takes_no_smaller_model_for_the_base(extended_run: Path, texts: list[str], tmp_path: Path) -> None:
    from demo import make_model

    make_model(tmp_path / "small", texts, **{**TINY, "vocab_size": 400})
    output = cptain("verify", tmp_path / "small", load_run(extended_run).megatron_folder).output
    assert "(new rows)" not in output
    assert "bit-equal" in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("語\n彙\n語\n", "words.txt:3: '語': is on line 1 too"),
        ("語\n 彙\n", "words.txt:2: ' 彙': white space at an end of a token"),
        ("\n\n", "words.txt: no token in it"),
        ("語彙\n<|end_of_text|>\nthe\n", "has already: '<|end_of_text|>' (id 1), 'the' (id "),
        (None, "words.txt: cannot be read: No such file or directory"),
    ],
)
def test_a_file_of_tokens_that_are_none_or_not_new_is_refused_in_a_line(
    make_run: RunFileMaker, tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "words.txt").write_text(content, encoding="utf-8")
    assert message in refused("convert", make_run(model__vocabulary={"add": "words.txt"}))


def without_the_last(content: dict[str, Any]) -> None:
    token, _ = max(content["model"]["vocab"].items(), key=lambda item: item[1])
    del content["model"]["vocab"][token]
    content["model"]["merges"].pop()


def swapped(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]


def with_a_hole(content: dict[str, Any]) -> None:
    content["model"]["vocab"] |= {"語": 500, "彙": 502}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_the_last, "has 499 ids, and "),
        (swapped, "their first ids must be equal"),
        (with_a_hole, "id 501 has no token, and 502 has: new ids must have no holes"),
        (lambda content: None, "has no token that "),
    ],
)
def test_a_tokenizer_that_does_not_extend_the_models_is_refused_in_a_line(
    make_run: RunFileMaker, model: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = larger_tokenizer(model, tmp_path / "other", change)
    line = refused("convert", make_run(model__vocabulary={"tokenizer": folder}))
    assert line.startswith(f"cptain: {folder}: ")
    assert message in line


def test_train_refuses_what_was_converted_without_the_tokens(make_ready_run: RunFileMaker, words: Path) -> None:
    run = load_run(make_ready_run(model__vocabulary={"add": str(words)}))
    with pytest.raises(CptainError, match=r"release: converted with another \[model\.vocabulary\]: run convert again"):
        beginning(run, run_architecture(run))


def test_one_of_add_and_tokenizer_says_which(make_run: RunFileMaker, words: Path) -> None:
    both = refused("convert", make_run(model__vocabulary={"add": str(words), "tokenizer": str(words.parent)}))
    assert "model.vocabulary: give exactly one of add and tokenizer" in both
    assert "model.vocabulary.initialise" in refused("convert", make_run(model__vocabulary={"initialise": "zero"}))


def test_tasks_of_an_array_that_come_together_make_one_tokenizer(make_run: RunFileMaker, words: Path) -> None:
    run = load_run(make_run(model__vocabulary={"add": str(words)}))
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(tokenizer_folder, [run, run]))
    made = folders[0].stat().st_ino
    assert tokenizer_folder(run).stat().st_ino == made  # not made again
    assert not leftovers(run.folder)


def test_runs_of_a_sweep_share_the_data_that_have_the_same_tokens_and_the_model_whose_rows_begin_alike(
    make_run: RunFileMaker, words: Path
) -> None:
    def folders(**changes: Any) -> tuple[int, int]:
        file = make_run(**changes)
        runs = expand(load_run(file), file)
        assert len(runs) == 2
        return len({run.data_folder for run in runs}), len({run.megatron_folder for run in runs})

    own, others = {"add": str(words)}, {"tokenizer": str(words.parent)}
    assert folders(model__vocabulary=own, sweep={"train.lr": [1e-3, 2e-3]}) == (1, 1)
    assert folders(model__vocabulary=own, sweep={"model.vocabulary.initialise": ["mean", "subword-mean"]}) == (1, 2)
    assert folders(sweep={"model.vocabulary": [own, others]}) == (2, 2)


def test_a_run_branches_off_another_with_its_tokens_alone(make_run: RunFileMaker, words: Path, tmp_path: Path) -> None:
    def branch(of: str, **changes: Any) -> str:
        branched = make_run(name="branch", train__from={"run": of, "iteration": 1}, train__steps=2, **changes)
        return refused("preprocess", branched)

    with_tokens = load_run(make_run(model__vocabulary={"add": str(words)}))
    record = {"run": {"model": {"vocabulary": {"add": "?"}}}, "data": {"tokenizer": "another"}}
    start = {"began": "", "start": 0, "steps": 2, "layout": {}, "versions": {}, "last": 1, **record}
    with_tokens.folder.mkdir(parents=True)
    (with_tokens.folder / "history.jsonl").write_text(json.dumps(start) + "\n")
    line = f"cptain: model.vocabulary: not what {with_tokens.folder} was trained with"
    assert line in branch(str(with_tokens.folder))
    assert line in branch(str(with_tokens.folder), model__vocabulary={"add": str(words)})
