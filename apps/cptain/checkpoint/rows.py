"""Which rows of Hugging Face tensors are which rows of a Megatron tensor, as runs of consecutive rows.

The layouts of `mapping` move rows and change none. Given the numbers of rows in the place of rows, they say where each
goes; so any part of a tensor can be read in any order, and no whole tensor is ever held.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from cptain.checkpoint.mapping import Rule
from cptain.model.architecture import Architecture


@dataclass(frozen=True)
class Run:
    """`count` rows of one index of a Megatron tensor, from `row`: those of Hugging Face tensor `part` from `first`."""

    row: int
    part: int
    first: int
    count: int


def row_runs(rule: Rule, architecture: Architecture) -> list[Run]:
    """The runs of one index of a rule, in the order of Megatron's rows.

    Raises:
        ValueError: a layout that does more than to move rows.
    """
    heights = [shape[0] for shape in rule.hf_shapes(architecture)]
    starts = [0, *accumulate(heights)]
    numbered = [torch.arange(start, start + height) for start, height in zip(starts, heights, strict=False)]
    order = rule.layout(numbered, architecture)
    if not torch.equal(order.sort().values, torch.arange(starts[-1])):
        raise ValueError(f"{rule.key}: its layout does not move rows alone")
    follows = order[1:] == order[:-1] + 1
    follows &= ~torch.isin(order[1:], torch.tensor(starts))
    begins = [0, *((~follows).nonzero().flatten() + 1).tolist(), len(order)]
    runs = []
    for row, end in pairwise(begins):
        first = int(order[row])
        part = max(number for number, start in enumerate(starts[:-1]) if start <= first)
        runs.append(Run(row, part, first - starts[part], end - row))
    return runs


def overlapping(runs: list[Run], first: int, stop: int) -> Iterator[tuple[Run, int, int]]:
    """The runs that hold Megatron's rows `first` to `stop`, each with the first of them and the one behind its last."""
    for run in runs[max(0, bisect_right(runs, first, key=lambda run: run.row) - 1) :]:
        if run.row >= stop:
            return
        yield run, max(first, run.row), min(stop, run.row + run.count)


def chunk_rows(runs: list[Run], rule: Rule, architecture: Architecture) -> list[tuple[int, int]]:
    """How to cut one index into chunks, as (first row, rows): tensors that lie one after another, such as the gate and
    the up projection, which Megatron reads apart; else the whole."""
    heights = [shape[0] for shape in rule.hf_shapes(architecture)]
    if [run.count for run in runs] == heights:
        return [(run.row, run.count) for run in runs]
    return [(0, sum(heights))]


def runs_of_part(runs: list[Run], part: int) -> list[Run]:
    """The runs of one Hugging Face tensor, in the order of its own rows."""
    return sorted((run for run in runs if run.part == part), key=lambda run: run.first)
