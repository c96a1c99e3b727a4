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
from cptain.model.architecture import read_architecture
from cptain.run_file import load_run
from cptain.training import layouts, packing
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


@pytest.fixture
def make_shuffled(make_run: RunFileMaker, ready_run: Path, tmp_path: Path) -> RunFileMaker:
    """Writes run files of a step over eight documents of 16 tokens, shuffled: each of them comes to each place of a
    micro batch again and again, between other ones."""
    writer = IndexedDatasetWriter(tmp_path / "pair.bin", np.uint16)
    lengths = np.full(8, 16, dtype=np.int32)
    ids = np.random.default_rng(0).integers(5, 400, 8 * 16).astype(np.uint16)
    writer.add(EncodedDocuments(ids, lengths, np.ones(8, dtype=np.int64)))
    writer.write_index(tmp_path / "pair.idx")
    data = {"input": None, "tokenized": [str(tmp_path / "pair")], "split": "1,0,0"}
    train = {"seq_length": _SEQ, "global_batch_size": 64, "steps": 1, "warmup_steps": 0}
    shared = {f"data__{key}": value for key, value in data.items()}
    shared |= {f"train__{key}": value for key, value in train.items()}
    return lambda **changes: make_run(model__megatron=str(load_run(ready_run).megatron_folder), **shared | changes)


def places_that_differ(pieces: list[Piece]) -> set[int]:
    """Where in a sequence a document's logits and losses are not the same, bit for bit, whatever stands around it. The
    last loss is of the next document's first token, and not trained on."""
    alike = defaultdict(list)
    for piece in pieces:
        if piece.trains:
            alike[piece.document, piece.begin].append(piece)
    assert sum(map(len, alike.values())) == 64 * 4
    assert len(alike) == 8 * 8
    return {
        place % _SEQ
        for (_, place), (first, *others) in alike.items()
        for other in others
        if not (torch.equal(first.logits, other.logits) and torch.equal(first.losses[:-1], other.losses[:-1]))
    }


@pytest.mark.parametrize(
    ("documents", "pipeline", "differ"), [("joined", 1, {16, 32, 48}), ("masked", 2, set())], ids=["joined", "masked"]
)
def test_a_document_changes_the_logits_of_others_or_no_bit_of_them(
    make_shuffled: RunFileMaker, record: Path, documents: str, pipeline: int, differ: set[int]
) -> None:
    file = make_shuffled(data__documents=documents, parallel__pipeline=pipeline)
    for stage in (("preprocess", file), ("train", file, "--cpu")):
        result = cptain(*stage)
        assert result.exit_code == 0, result.output
    assert places_that_differ(recorded(record, pipeline - 1)) == differ


def test_a_document_among_others_is_what_transformers_makes_of_it_alone(
    make_shuffled: RunFileMaker, tmp_path: Path, record: Path
) -> None:
    """In training and in validation, with documents of any length; and such a run exports."""
    write_jsonl(tmp_path / "ja.jsonl", [f"第{n}話。" + "名前はまだ無い。" * (n % 5) for n in range(400)])
    sets = [{"name": "ja", "input": str(tmp_path / "ja.jsonl")}]
    data = {"documents": "masked", "split": None, "validation": sets}
    data["mix"] = [{"name": "all", "input": str(tmp_path / "pair"), "weight": 1}]
    file = make_shuffled(parallel__tensor=2, **{f"data__{key}": value for key, value in data.items()})
    for stage in (("preprocess", file), ("train", file, "--cpu"), ("export", file)):
        result = cptain(*stage)
        assert result.exit_code == 0, result.output
    run, pieces = load_run(file), recorded(record, 0)
    assert places_that_differ(pieces) == set()

    from transformers import AutoModelForCausalLM

    alone = AutoModelForCausalLM.from_pretrained(run.model.hf, dtype=torch.float32).eval()
    first, *_, last = (place for place, piece in enumerate(pieces) if piece.trains)
    metrics = read_metrics(metrics_file(run))
    for step, key, some in ((0, "validation_loss/ja", pieces[:first]), (1, "loss", pieces[first : last + 1])):
        for piece in some[:200]:
            with torch.no_grad():
                logits = alone(torch.tensor(piece.ids[None])).logits[0, : len(piece.losses)]
            of_rank = piece.logits.shape[1]  # rank 0 has the first half of the vocabulary
            assert torch.allclose(piece.logits, logits[:, :of_rank], atol=1e-5)
        trained = torch.cat([piece.losses[: -1 if piece.ends else None] for piece in some])
        assert metrics[step][key] == pytest.approx(float(trained.mean()), abs=1e-5)
    assert metrics[1]["tokens/all"] == 64 * _SEQ
    assert metrics[1]["loss/all"] == pytest.approx(metrics[1]["loss"], abs=1e-5)
    assert "| documents | masked |" in next(run.hf_folder.glob("*/README.md")).read_text()
    (start,) = read_history(run.folder)
    assert start.data["masked"] is True


@pytest.mark.parametrize(
    "command", [("train", "--dry-run"), ("plan",), ("jobs", "--site", "pbs")], ids=lambda one: one[0]
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__context": 2, "parallel__pipeline": 2}, 'not with data.documents = "masked" and pipeline stages'),
        ({"train__script": "own.py"}, 'data.documents = "masked": only cptain\'s own training script masks'),
        ({"data__documents": "apart"}, "data.documents"),
    ],
)
def test_what_cannot_mask_documents_is_refused(
    make_jobs_run: RunFileMaker, command: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    result = cptain(command[0], make_jobs_run(**{"data__documents": "masked", **changes}), *command[1:])
    assert result.exit_code == 2
    assert message in result.output


def test_a_run_that_has_begun_masks_or_joins_on_as_it_did(own_trained_run: Path) -> None:
    more = ("--cpu", "--dry-run", "--set", "train.steps=12", "--set", "data.documents=masked")
    result = cptain("train", own_trained_run, *more)
    assert result.exit_code == 1
    assert 'was trained on other data: data.documents "joined" → "masked": give the run another name' in result.output
    accepted = cptain("train", own_trained_run, *more, "--accept", "data")
    assert accepted.exit_code == 0, accepted.output
    assert 'changed since step 8: data.documents: "joined" → "masked"' in accepted.output


def test_no_layout_that_cannot_mask_is_proposed(make_run: RunFileMaker, model: Path) -> None:
    for documents, both in (("joined", True), ("masked", False)):
        run = load_run(make_run(data__documents=documents))
        found = list(layouts._layouts(run, read_architecture(model), gpus=2, nodes=2))
        assert {layout.context for layout in found} == {layout.pipeline for layout in found} == {1, 2}
        assert any(layout.context * layout.pipeline == 4 for layout in found) is both


def test_context_parallel_ranks_have_the_pieces_of_each_document_that_transformer_engine_expects() -> None:
    """An early and a late one of 2 × size, with all that is said of their tokens; fill is not trained on."""
    lengths = [5, 1, 12, 30, 4, 7]
    tokens = np.arange(1, sum(lengths) + 1)
    row = torch.from_numpy(np.stack([tokens, np.concatenate([*map(np.arange, lengths)]), tokens + 1, tokens % 3 - 1]))
    for size, whole in ((2, 4), (2, 64), (3, 96)):
        filled = [-(-length // (2 * size)) * 2 * size for length in lengths]
        filled[-1] += -sum(filled) % whole
        documents = [
            np.pad(one, ((0, 0), (0, length - one.shape[1])))
            for one, length in zip(np.split(row.numpy(), np.cumsum(lengths)[:-1], axis=1), filled, strict=True)
        ]
        for rank in range(size):
            pieces = [np.split(one, 2 * size, axis=1) for one in documents]
            expected = np.concatenate([one[place] for one in pieces for place in (rank, 2 * size - 1 - rank)], axis=1)
            found, found_lengths = packing.share(row, torch.tensor(lengths), size, rank, whole)
            assert found_lengths.tolist() == filled
            assert np.array_equal(found.numpy(), expected)
            assert found.shape[1] == sum(filled) // size
