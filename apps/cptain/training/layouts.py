"""Every way to lay a run on a site's GPUs, and the fastest of those that fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from cptain.errors import CptainError
from cptain.model.architecture import Architecture
from cptain.run_file import RunFile
from cptain.training.fit import fits, least_recompute
from cptain.training.flags import check_parallel
from cptain.training.layout import Layout
from cptain.training.rates import Rate, nearest, step_seconds

_SIZES = (1, 2, 4, 8, 16, 32)
_MICRO_BATCHES = (1, 2, 4, 8)
_CERTAIN = 0.1  # of a predicted time


def _layouts(run: RunFile, architecture: Architecture, gpus: int, nodes: int) -> Iterator[Layout]:
    """Those that divide everything; tensor and context parallel within a node, whose GPUs talk fastest.

    What train.recompute and train.micro_batch_size give is kept.
    """
    train = run.train
    sizes = _MICRO_BATCHES if train.micro_batch_size == "auto" else (train.micro_batch_size,)
    shares = [size for size in _SIZES if architecture.experts % size == 0]
    for tensor, context, pipeline, expert, size in product(_SIZES, _SIZES, _SIZES, shares, sizes):
        if tensor * context > gpus or (context > 1 and pipeline > 1 and run.data.documents == "masked"):
            continue
        cut = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert}
        parallel = run.parallel.model_copy(update=cut)
        one = train.model_copy(update={"micro_batch_size": size})
        try:
            check_parallel(run.model_copy(update={"parallel": parallel, "train": one}), architecture, gpus * nodes)
        except CptainError:
            continue
        yield Layout(**cut, data=gpus * nodes // (tensor * pipeline * context), micro_batch_size=size)


@dataclass(frozen=True)
class Proposal:
    """A layout that fits, the seconds of its step, and the measured training that they are scaled from."""

    layout: Layout
    seconds: float
    rate: Rate

    @property
    def _key(self) -> tuple[float, int]:
        layout = self.layout
        return round(self.seconds, 6), layout.tensor * layout.pipeline * layout.context * layout.expert


def fastest(
    run: RunFile, architecture: Architecture, gpus: int, nodes: int, gpu_bytes: float, rates: list[Rate]
) -> list[Proposal]:
    """The layout with the shortest step; of equal ones that which cuts the model least.

    A cut that was never measured seems to cost no communication: such a layout comes second, and only where it would be
    faster by more than a prediction is wrong.

    Args:
        run: the run; its [parallel] is not looked at.
        architecture: the model's.
        gpus: of a node.
        nodes: of a job.
        gpu_bytes: of a GPU.
        rates: what was measured.
    """
    measured: list[Proposal] = []
    others: list[Proposal] = []
    for layout in _layouts(run, architecture, gpus, nodes):
        rate = nearest(rates, architecture, run.train.precision, layout)
        if rate is None:
            return []
        if run.train.recompute == "auto":
            layout = least_recompute(run, architecture, layout, gpu_bytes)
        else:
            layout = replace(layout, recompute=run.train.recompute)
        if fits(run, architecture, layout, gpu_bytes):
            one = Proposal(layout, step_seconds(run, architecture, layout, rate), rate)
            (measured if rate.cut_as(layout) else others).append(one)
    best = [min(some, key=lambda one: one._key) for some in (measured, others) if some]
    return [one for one in best if one is best[0] or one.seconds < (1 - _CERTAIN) * best[0].seconds]
