"""data.documents = "masked": no document sees another, in what the real Megatron computes of the data that it reads."""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RunFileMaker, cptain, write_jsonl
from cptain.data.indexed_dataset import EncodedDocuments, IndexedDatasetWriter
from cptain.history import read_history
from cptain.run_file import load_run
from cptain.training.metrics import metrics_file, read_metrics

_SEQ = 64
# In the place of a sitecustomize: every rank keeps what each micro batch was read from, and its logits and losses.
_RECORDER = """
import os

if "RANK" in os.environ:
    import itertools
    import torch
    from cptain.megatron import cross_entropy
    from cptain.training.documents import Documents

    pieces, numbers = [], itertools.count()
    get, loss = Documents.get, cross_entropy.language_model_loss

    def read(self, idx, offset=0, length=None):
        ids = get(self, idx, offset, length)
        pieces.append((int(idx), ids.astype("int64")))
        return ids

    def measured(labels, logits, z_loss):
        rows = logits.detach().clone().transpose(0, 1).flatten(0, 1)
        losses = loss(labels, logits, z_loss)
        kept = {"pieces": pieces[:], "logits": rows, "trains": logits.requires_grad}
        kept["losses"] = losses.detach().flatten()
        torch.save(kept, f"{os.environ['RECORD']}/{os.environ['RANK']}-{next(numbers):04}.pt")
        pieces.clear()
        return losses

    Documents.get, cross_entropy.language_model_loss = read, measured
"""


@dataclass
class Piece:
    """A document's part in a micro batch.

    Attributes:
        document: its number.
        ids: its tokens, with the last label where that is of the document.
        begin: its first token's place in the micro batch.
        logits: of its tokens.
        losses: of its tokens.
        trains: whether they are of a training step.
        ends: whether its last token's label is another document's.
    """

    document: int
    ids: np.ndarray
    begin: int
    logits: torch.Tensor
    losses: torch.Tensor
    trains: bool
    ends: bool


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the ranks keep everything in."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_RECORDER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "record").mkdir()
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    return tmp_path / "record"


def recorded(folder: Path, rank: int) -> list[Piece]:
    """What a rank kept, which is removed."""
    found = []
    for file in sorted(folder.glob(f"{rank}-*.pt")):
        one = torch.load(file, weights_only=False)
        place, left = 0, _SEQ
        for document, ids in one["pieces"]:
            taken, ended = min(len(ids), left), len(ids) < left + 1
            rows = slice(place, place + taken)
            if taken:
                found.append(
                    Piece(document, ids, place, one["logits"][rows], one["losses"][rows], one["trains"], ended)
                )
            place, left = place + taken, left - taken
            if not ended or not taken:  # the sample's last label
                left = _SEQ
        assert place == len(one["losses"])
    for file in folder.iterdir():
        file.unlink()
    return found


def write_pair(prefix: Path, documents: list[Any]) -> None:
    writer = IndexedDatasetWriter(prefix.with_suffix(".bin"), np.uint16)
    for ids in documents:
        lengths = np.array([len(ids)], dtype=np.int32)
        writer.add(EncodedDocuments(np.array(ids, dtype=np.uint16), lengths, np.ones(1, dtype=np.int64)))
    writer.write_index(prefix.with_suffix(".idx"))


def test_changing_one_document_changes_no_bit_of_another(
    make_run: RunFileMaker, ready_run: Path, tmp_path: Path, record: Path
) -> None:
    """Eight documents of 16 tokens, shuffled: each comes to each place between other ones again and again."""
    write_pair(tmp_path / "pair", np.random.default_rng(0).integers(5, 400, (8, 16)).tolist())
    train = {"seq_length": _SEQ, "global_batch_size": 64, "steps": 1, "warmup_steps": 0}
    file = make_run(
        data__input=None,
        data__tokenized=[str(tmp_path / "pair")],
        data__split="1,0,0",
        model__megatron=str(load_run(ready_run).megatron_folder),
        **{f"train__{key}": value for key, value in train.items()},
    )
    assert cptain("preprocess", file).exit_code == 0
    for name, documents, more, rank in (
        ("joined", "joined", "parallel.tensor=1", 0),
        ("tensor", "masked", "parallel.tensor=2", 0),
        ("pipeline", "masked", "parallel.pipeline=2", 1),
    ):
        settings = (f"name={name}", f"data.documents={documents}", f"data.output={load_run(file).data_folder}", more)
        result = cptain("train", file, "--cpu", *(word for one in settings for word in ("--set", one)))
        assert result.exit_code == 0, result.output
        alike = defaultdict(list)
        for piece in recorded(record, rank):
            if piece.trains:
                alike[piece.document, piece.begin].append(piece)
        assert sum(map(len, alike.values())) == 64 * 4
        assert len(alike) == 8 * 8
        differ = {
            place % _SEQ
            for (_, place), (first, *others) in alike.items()
            for other in others
            if not (torch.equal(first.logits, other.logits) and torch.equal(first.losses[:-1], other.losses[:-1]))
        }
        assert differ == ({16, 32, 48} if documents == "joined" else set()), name


def test_a_document_among_others_is_as_it_is_alone_and_a_run_of_them_trains_and_exports(
    make_run: RunFileMaker, ready_run: Path, tmp_path: Path, record: Path
) -> None:
    write_jsonl(tmp_path / "en.jsonl", [f"Text {n}" + " of many" * (n % 7) for n in range(90)])
    write_jsonl(tmp_path / "ja.jsonl", [f"第{n}話。" + "名前はまだ無い。" * (n % 5) for n in range(60)])
    shared = load_run(ready_run).megatron_folder
    train = {"train__steps": 1, "train__warmup_steps": 0, "train__save_interval": 1}
    sets = [{"name": "ja", "input": str(tmp_path / "ja.jsonl")}]
    data = {
        "data__input": [str(tmp_path / "en.jsonl")],
        "data__documents": "masked",
        "data__split": None,
        "data__validation": sets,
    }
    file = make_run(model__megatron=str(shared), **data, **train)
    for stage in (("preprocess", file), ("train", file, "--cpu"), ("export", file)):
        result = cptain(*stage)
        assert result.exit_code == 0, result.output
    run = load_run(file)

    from transformers import AutoModelForCausalLM

    alone = AutoModelForCausalLM.from_pretrained(run.model.hf, dtype=torch.float32).eval()
    pieces = recorded(record, 0)
    first = next(place for place, piece in enumerate(pieces) if piece.trains)
    last = max(place for place, piece in enumerate(pieces) if piece.trains)
    metrics = read_metrics(metrics_file(run))
    for step, key, some in (
        (0, "validation_loss/ja", pieces[:first]),
        (1, "loss", pieces[first : last + 1]),
    ):
        assert sum(len(piece.losses) for piece in some) == 8 * _SEQ
        assert sum(piece.ends for piece in some) > 5
        for piece in some:
            with torch.no_grad():
                logits = alone(torch.tensor(piece.ids[None])).logits[0, : len(piece.losses)]
            assert torch.allclose(piece.logits[:, : logits.shape[1]], logits, atol=1e-5)
        # What follows a document is not trained on.
        trained = torch.cat([piece.losses[: -1 if piece.ends else None] for piece in some])
        assert metrics[step][key] == pytest.approx(float(trained.mean()), abs=1e-5)
    card = next(run.hf_folder.glob("*/README.md")).read_text()
    assert "| documents | masked |" in card
    (start,) = read_history(run.folder)
    assert start.data["masked"] is True
