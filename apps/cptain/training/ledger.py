"""The domain ledger: of each [[data.mix]] table the tokens that a step trained on, and their loss.

A token's loss mask says which domain it is of (`cptain.training.sequences`), as for validation sets, so that no other
tensor travels between the ranks. The last pipeline stage, which has the losses, adds them up on its device; one
all-reduce a logged step (cptain logs each) makes the sums those of the global batch. A token is of its document's
domain, and so is the loss of what follows it. The launcher, which loads no torch, reads what is said here.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

DOMAINS = "[domains] "  # before a line of the log with a step's `Sums` of each domain, by name

Sums = tuple[int, int, float]
"""Tokens, how many of them are trained on, and the sum of the losses of these."""


class Ledger:
    """What one rank adds up.

    Args:
        names: of the domains, in the order of their numbers.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._sums: Any = None  # tokens, those trained on, losses; by number

    def add(self, losses: Any, numbers: Any) -> None:
        """The losses of a micro batch's tokens, and the number of each, negative where it is not trained on: two
        tensors of one shape."""
        import torch

        if not self._names:
            return
        if self._sums is None:
            self._sums = torch.zeros((3, len(self._names) + 1), dtype=torch.float64, device=losses.device)
        trains = (numbers > 0).double()
        self._sums.index_add_(1, numbers.abs(), torch.stack([torch.ones_like(trains), trains, losses * trains]))

    def install(self) -> None:
        """Stand around every step of Megatron's, after its import and before training."""
        from megatron.training import training

        if self._names:
            training.train_step = self._watched(training.train_step)

    def _watched(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = train_step(*args, **kwargs)
            self._say()
            return result

        return step

    def _say(self) -> None:
        """Let the last rank, which logs the steps, say the sums of all copies of the model, and begin anew."""
        import torch
        from megatron.core import parallel_state

        if self._sums is None:  # not the last pipeline stage
            return
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(self._sums, group=group)
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            told = zip(self._names, self._sums.T.tolist()[1:], strict=True)
            sums = {name: [int(tokens), int(trained), losses] for name, (tokens, trained, losses) in told}
            print(DOMAINS + json.dumps(sums), flush=True)
        self._sums.zero_()
