"""The health of a training, watched in every rank: a loss that is lost, a step that does not end, a rank that is slow.

All three stand around Megatron's `train_step`, which is over before anything is logged, evaluated or saved: no
checkpoint has the weights of a step that was refused. After each step every rank gets one row of every other, so that
all come to the same verdict at the same step, whatever their pipeline stage.

What the launcher reads of it in the output (`cptain.training.follow`) is here too; it imports no torch.
"""

import faulthandler
import functools
import math
import os
import re
import socket
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SAID = "[cptain] "  # before a line that is for people
STUCK = re.compile(r"^Timeout \(\d+:\d\d:\d\d(?:\.\d+)?\)!$")  # how faulthandler begins a rank's stacks
_BEFORE = 100  # steps whose median a loss is held against: a divergence may take tens of them to rise
_SLOW, _SLOW_STEPS = 1.2, 10  # so many times the median, so many steps in a row: H100s of one kind differ by a few %
_APART = 0.5  # seconds between the stacks of two ranks of a node: they write to one pipe, and their times name them


class DivergedError(RuntimeError):
    """The loss or the gradient is no number any more, or the loss has left where it was."""


@dataclass(frozen=True)
class _Row:
    """What a rank says of itself after a step; `loss` counts where the stage is the last."""

    stage: float
    loss: float
    grad_norm: float
    seconds: float


class Health:
    """What one rank watches.

    Args:
        max_loss_spike: nats that a step's loss may be over the median of the steps before it.
        step_timeout: seconds that a step may take.
        cpu: computes on the CPU.
    """

    def __init__(self, max_loss_spike: float, step_timeout: float, cpu: bool) -> None:
        self._max_loss_spike, self._cpu = max_loss_spike, cpu
        self._timeout = step_timeout + _APART * int(os.environ.get("LOCAL_RANK", "0"))
        self._losses: deque[float] = deque(maxlen=_BEFORE)
        self._marks: list[tuple[Any, Any]] = []
        self._slow: Counter[int] = Counter()
        self._named: set[int] = set()

    def install(self) -> None:
        """Stand around every step of Megatron's, after its import and before training."""
        from megatron.training import training

        training.train_step = self._watched(training.train_step)

    def _watched(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train_step)
        def step(forward_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._marks.clear()
            # The timer is a thread of C: it writes, and ends the process, while Python waits in a collective for ever.
            # Start-up, saving and evaluation are outside; collectives there have Megatron's own limit.
            faulthandler.dump_traceback_later(self._timeout, exit=True)
            try:
                result = train_step(self._timed(forward_step), *args, **kwargs)
                rows = self._exchange(losses=result[0], grad_norm=result[5])
            finally:
                faulthandler.cancel_dump_traceback_later()
            self._judge(rows)
            self._look_for_slow_ranks(rows)
            return result

        return step

    def _exchange(self, losses: dict[str, Any], grad_norm: Any) -> list[_Row]:
        """The rows of all ranks, by rank: one collective of 16 bytes a rank, and the same numbers everywhere."""
        import torch
        from megatron.core import parallel_state

        stage = parallel_state.get_pipeline_model_parallel_rank()
        own = torch.tensor([stage, 0.0, grad_norm or 0.0, self._own_seconds()], dtype=torch.float32, device="cuda")
        if "lm loss" in losses:
            own[1] = losses["lm loss"]
        rows = own.new_empty(torch.distributed.get_world_size() * len(own))
        torch.distributed.all_gather_into_tensor(rows, own)
        return [_Row(*row) for row in rows.view(-1, len(own)).tolist()]

    def _judge(self, rows: list[_Row]) -> None:
        """Refuse a step.

        Raises:
            DivergedError: on every rank.
        """
        from megatron.training import get_args

        step = get_args().curr_iteration + 1
        last = max(rows, key=lambda row: row.stage)
        for what, value in (("loss", last.loss), ("gradient's norm", last.grad_norm)):
            if not math.isfinite(value):
                raise DivergedError(f"the {what} of step {step} is {value}")
        if self._losses and last.loss - (before := statistics.median(self._losses)) > self._max_loss_spike:
            raise DivergedError(
                f"the loss of step {step} is {last.loss:.4f}, where it was {before:.4f} (the median of the steps "
                f"before it, up to {_BEFORE}); train.max_loss_spike = {self._max_loss_spike:g}"
            )
        self._losses.append(last.loss)

    def _timed(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """`forward_step`, with marks before and after each micro batch's.

        A whole step takes every rank equally long, since all wait for the slowest. But nothing in the forward pass of a
        micro batch through one stage, with the reading of its data, waits for another stage (what comes from there is
        received before) or for another copy of the model (gradients are reduced after). It does wait for tensor- and
        context-parallel peers, which look equally slow, and which are of the same host in any layout that is fast. The
        first micro batch may wait for weights that --overlap-param-gather brings: `_own_seconds` leaves it out.
        """

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._mark()
            output = forward_step(*args, **kwargs)
            self._marks.append((begin, self._mark()))
            return output

        return timed

    def _mark(self) -> Any:
        """A point in time, on the GPU's own clock: the CPU only puts work into its queue."""
        if self._cpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _own_seconds(self) -> float:
        """Of a micro batch of this step: the median, the lower one of two. The GPU has passed all marks by now."""
        if self._cpu:
            return float(statistics.median_low(end - begin for begin, end in self._marks))
        return float(statistics.median_low(begin.elapsed_time(end) for begin, end in self._marks)) / 1000

    def _look_for_slow_ranks(self, rows: list[_Row]) -> None:
        """Name a rank once that is slower than others with the same stage; stages differ by nature."""
        of_stage: dict[float, list[float]] = defaultdict(list)
        for row in rows:
            of_stage[row.stage].append(row.seconds)
        for rank, row in enumerate(rows):
            slow = row.seconds > _SLOW * statistics.median_low(of_stage[row.stage])
            self._slow[rank] = self._slow[rank] + 1 if slow else 0
        if found := {rank for rank, steps in self._slow.items() if steps >= _SLOW_STEPS} - self._named:
            self._named |= found
            self._name(sorted(found), rows, of_stage)

    def _name(self, ranks: list[int], rows: list[_Row], of_stage: dict[float, list[float]]) -> None:
        """Say which hosts slow ranks are on; every rank is here, the last one, which logs the steps, says it."""
        import torch

        size, own = torch.distributed.get_world_size(), torch.distributed.get_rank()
        hosts: list[Any] = [None] * size
        torch.distributed.all_gather_object(hosts, f"{socket.gethostname()} (GPU {os.environ.get('LOCAL_RANK', '0')})")
        for rank in ranks if own == size - 1 else []:
            typical = statistics.median_low(of_stage[rows[rank].stage])
            print(
                f"{SAID}rank {rank} on {hosts[rank]} is slow: {rows[rank].seconds:.3f} s a micro batch forward, where "
                f"{typical:.3f} s is the median of its stage, and over {_SLOW:g} times that for {_SLOW_STEPS} steps",
                flush=True,
            )
