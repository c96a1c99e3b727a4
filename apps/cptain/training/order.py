"""The order of the data of a run with stages ([[data.stage]]): each part of the mix is a stream, and stages take of it.

A stream is its part's documents in an order that is shuffled for each epoch, joined, and cut into sequences, which
are shuffled within the epoch that they begin in; so an epoch trains on each token once. Nothing of it depends on how
many sequences are asked for, and so nothing that was trained on changes when a later stage does. (Megatron's
GPTDataset shuffles as many epochs together as a run needs.) A stage's sequence is the next one of a part's stream, of
the part that is furthest behind its weight, by Megatron's own function.

What is drawn comes of numpy's RandomState, whose numbers no release of numpy changes.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cptain import atomic
from cptain.training.documents import Documents, File
from cptain.training.sequences import data_set_class

Array = npt.NDArray[Any]


def _shuffles(seed: int, order: str, epoch: int) -> np.random.RandomState:
    """What one epoch of a part is shuffled with."""
    digest = hashlib.sha256(f"{seed} {order} {epoch}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


def stream(lengths: Array, seq_length: int, count: int, seed: int, order: str) -> tuple[Array, Array, Array]:
    """The first sequences of a part's stream.

    Args:
        lengths: of its documents, in tokens.
        seq_length: of a sequence, in tokens.
        count: how many sequences at least.
        seed: of the run.
        order: what else the order is made of (`cptain.data.stages.identity`).

    Returns:
        What GPTDataset calls document_index, sample_index (where each sequence begins: place in document_index and
        tokens into that document) and shuffle_index: sequence by place in the stream.
    """
    tokens = int(lengths.sum(dtype=np.int64))
    epochs = ((max(count, 1) - 1) * seq_length) // tokens + 1  # the last place is of the epoch that begins before it
    sequences = -(-epochs * tokens // seq_length)
    ends = [-(-epoch * tokens // seq_length) for epoch in range(epochs + 1)]
    places = np.arange(sequences, dtype=np.int64)
    documents, held, epoch = [], 0, 0
    while held <= sequences * seq_length:  # the last sequence needs one token of the next as its last label
        shuffles = _shuffles(seed, order, epoch)
        documents.append(shuffles.permutation(len(lengths)).astype(np.int32))
        if epoch < epochs:
            shuffles.shuffle(places[ends[epoch] : ends[epoch + 1]])
        held, epoch = held + tokens, epoch + 1
    document_index = np.concatenate(documents)
    starts = np.zeros(len(document_index) + 1, dtype=np.int64)
    np.cumsum(lengths[document_index], dtype=np.int64, out=starts[1:])
    begins = np.arange(sequences + 1, dtype=np.int64) * seq_length
    first = np.searchsorted(starts, begins, side="right") - 1
    last = int(first[-1]) + 1
    return document_index[:last], np.stack([first, begins - starts[first]], axis=1), places


def choose(stages: list[dict[str, Any]], parts: int) -> tuple[Array, Array]:
    """Which part each sequence of the run is of, and its place in that part's stream.

    Args:
        stages: of blend.json.
        parts: how many there are.
    """
    from megatron.core.datasets import helpers

    taken = np.zeros(parts, dtype=np.int64)
    of_parts, places = [], []
    for stage in stages:
        seen = [part for part in range(parts) if stage["weights"][part]]
        of_part = np.zeros(stage["sequences"], dtype=np.int16)
        place = np.zeros(stage["sequences"], dtype=np.int64)
        weights = [stage["weights"][part] for part in seen]
        helpers.build_blending_indices(of_part, place, weights, len(seen), stage["sequences"], False)
        of_part = np.array(seen, dtype=np.int16)[of_part]
        of_parts.append(of_part)
        places.append(place + taken[of_part])
        taken += np.bincount(of_part, minlength=parts)
    return np.concatenate(of_parts), np.concatenate(places)


def numbers_of(content: dict[str, Any]) -> dict[str, int]:
    """The number of each file's domain, from blend.json; none where the mix has no tables."""
    parts = enumerate(content.get("parts", ()), 1)
    return {prefix: number for number, part in parts for prefix in part["files"]}


class Staged:
    """The run's sequences in their order, as Megatron's loader reads them.

    Args:
        of_part: which part each is of.
        places: its place in that part's data set.
        parts: the data sets, None of a part that is not seen.
    """

    def __init__(self, of_part: Array, places: Array, parts: list[Any]) -> None:
        self._of_part, self._places, self._parts = of_part, places, parts

    def __len__(self) -> int:
        return len(self._of_part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = int(self._of_part[index])
        sample: dict[str, Any] = self._parts[part][int(self._places[index])]
        return sample


def build(content: dict[str, Any], args: Any, bounds: tuple[float, float], config: Any, reads: bool) -> Staged | None:
    """The data set of a run with stages.

    Args:
        content: of blend.json.
        args: Megatron's.
        bounds: fractions between which every file is trained on.
        config: Megatron's GPTDatasetConfig.
        reads: whether this rank reads data; rank 0 must.

    Returns:
        None on a rank that reads none.
    """
    import torch

    of_part, places = choose(content["stages"], len(content["parts"]))
    counts = np.bincount(of_part, minlength=len(content["parts"])).tolist()

    numbers = numbers_of(content)

    def streams() -> list[Any]:
        found: list[Any] = []
        for part, count in zip(content["parts"], counts, strict=True):
            pairs = [(file, file.part(bounds)) for file in map(File, part["files"])] if count else []
            documents = Documents([pair for pair in pairs if pair[1]], numbers) if count else None
            found.append(
                _data_set(documents, part["order"], count, args, config, data_set_class(content)) if documents else None
            )
        return found

    first = torch.distributed.get_rank() == 0
    made = streams() if first else []  # and writes what the others then read
    torch.distributed.barrier()
    return Staged(of_part, places, made or streams()) if reads else None


def _data_set(documents: Documents, order: str, count: int, args: Any, config: Any, of_class: Any) -> Any:
    """Megatron's data set of a part, in the order of its stream, which is kept in files where ranks share it."""
    from megatron.core.datasets.utils import Split

    key = hashlib.sha256(f"{args.seed} {order} {args.seq_length} {count}".encode()).hexdigest()
    names = ("documents", "sequences", "shuffle")
    files = [Path(args.data_cache_path) / f"stream-{key[:32]}-{name}.npy" for name in names]
    if not all(file.is_file() for file in files):
        made = stream(documents.sequence_lengths, args.seq_length, count, args.seed, order)
        for file, array in zip(files, made, strict=True):
            with atomic.atomic_file(file) as partial, open(partial, "wb") as opened:
                np.save(opened, array)

    class Stream(of_class):  # type: ignore[misc]
        def _build_document_sample_shuffle_indices(self) -> tuple[Array, ...]:
            return tuple(np.load(file, mmap_mode="r") for file in files)

    texts = np.arange(len(documents), dtype=np.int32)
    return Stream(documents, documents.path_prefix, texts, count, Split.train, config)
