"""Validation sets with names, in one pass of Megatron's own validation.

No Megatron of the three can validate with several sets unless each is read whole. Here one data set holds a round of
all of them, the same sequences at each validation, so that losses compare; a round repeats without end, and wherever a
resumed run begins in it, as many sequences in a row hold each of its sequences once. A sequence's loss mask says which
set it is of (its number and 1; 0 counts for nothing), so that no other tensor has to travel between the ranks.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cptain.training.documents import Documents, File


@dataclass(frozen=True)
class Named:
    """A set, as far as it is known without Megatron.

    Attributes:
        name: for people.
        documents: its texts.
    """

    name: str
    documents: Documents

    def sequences(self, seq_length: int) -> int:
        """How many whole ones it has."""
        return (int(self.documents.sequence_lengths.sum(dtype="int64")) - 1) // seq_length


def read_sets(file: Path) -> list[Named]:
    """The sets that a file names (`cptain.data.validation.write_validation`)."""
    found = []
    for one in json.loads(file.read_text(encoding="utf-8")):
        files = {prefix: File(prefix) for prefix, _, _ in one["parts"]}
        parts = [(files[prefix], range(first, stop)) for prefix, first, stop in one["parts"]]
        found.append(Named(one["name"], Documents(parts)))
    return found


class Rounds:
    """Round after round of some sequences of several sets.

    Args:
        sets: each set's sequences, as Megatron's data sets give them.
        counts: how many of each.
        batch: a round is filled to a multiple of this with sequences that do not count.
        length: of the data set.
    """

    def __init__(self, sets: list[Any], counts: list[int], batch: int, length: int) -> None:
        self._sets, self._length = sets, length
        self._places = [(number, place) for number, count in enumerate(counts) for place in range(count)]
        self._round = round_length(counts, batch)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(index) % self._round
        counts = place < len(self._places)
        number, sequence = self._places[place if counts else 0]
        sample: dict[str, Any] = self._sets[number][sequence]
        return {**sample, "loss_mask": sample["loss_mask"] * (number + 1 if counts else 0)}


def round_length(counts: list[int], batch: int) -> int:
    """Sequences of a round, whole batches."""
    return -(-sum(counts) // batch) * batch


def build(sets: list[Named], args: Any, sequences_of: Callable[[Documents, int], Any]) -> Rounds | None:
    """The data set to validate with, and Megatron told how many batches a round has.

    Args:
        sets: what to validate with.
        args: Megatron's.
        sequences_of: builds the data set of so many sequences; None on a rank that reads no data.
    """
    batch = args.global_batch_size
    counts = [min(args.eval_iters * batch, one.sequences(args.seq_length)) for one in sets]
    built = [sequences_of(one.documents, count) for one, count in zip(sets, counts, strict=True)]
    whole = round_length(counts, batch)
    args.eval_iters = whole // batch
    if any(one is None for one in built):
        return None
    rounds = args.train_iters // args.eval_interval + 3  # one before the first step and after the last, and one begun
    return Rounds(built, counts, batch, args.consumed_valid_samples + rounds * whole)


def install() -> None:
    """Validate before the first step of a run too, after Megatron's import and before training: what a set's loss was
    shows what was forgotten since. Megatron's own loop begins with a step."""
    from megatron.training import get_args, training

    train = training.train

    def begun(
        step: Any, model: Any, optimizer: Any, schedule: Any, train_data: Any, data: Any, *more: Any, **named: Any
    ) -> Any:
        args = get_args()
        if args.iteration == 0 and args.do_valid:
            # As Megatron does around each validation; every rank has just loaded its weights, and waits for none.
            overlaps = training.should_disable_forward_pre_hook(args)
            if overlaps:
                training.disable_forward_pre_hook(model, param_sync=False)
            process, config = more[:2]
            groups = {name: named[name] for name in ("p2p_communicator", "pg_collection") if name in named}  # from 0.19
            training.evaluate_and_print_results("iteration 0", step, data, model, 0, process, config, **groups)
            if overlaps:
                training.enable_forward_pre_hook(model)
        return train(step, model, optimizer, schedule, train_data, data, *more, **named)

    training.train = begun


def loss_by_set(losses: torch.Tensor, numbers: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Sum of the losses and count of the tokens of each set, under the names that the log has them by.

    Args:
        losses: of tokens.
        numbers: of the same shape: which set each token is of, from 1; 0 is none.
        names: of the sets.
    """
    found = {}
    for number, name in enumerate(names, 1):
        of_set = (numbers == number).to(losses.dtype)
        found[f"validation/{name}"] = torch.stack([(losses * of_set).sum(), of_set.sum()])
    return found
