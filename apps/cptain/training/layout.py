"""How a training lies on its GPUs: over how many the model is cut, how often it is copied, and what a step recomputes.

Pipeline stages hold as many layers each where that divides. Where it does not, Megatron lets the first and the last
stage differ from those between them, which stay alike: 126 layers on 8 stages are 15, 6 × 16 and 15.
"""

from dataclasses import dataclass
from typing import Literal

from cptain.run_file import RunFile

Recompute = Literal["none", "selective", "full"] | int
"""What the backward pass computes again: a number is that many layers of each pipeline stage."""


@dataclass(frozen=True)
class Layout:
    """The sizes that memory and speed follow from.

    Attributes:
        tensor, pipeline, context: over how many GPUs the model, its layers and a sequence are cut.
        data: copies of the model.
        expert: over how many of the GPUs that have equal weights otherwise its experts are shared out.
        micro_batch_size: sequences that a copy computes at a time.
        recompute: what is recomputed in the backward pass.
    """

    tensor: int
    pipeline: int
    context: int
    data: int
    micro_batch_size: int = 1
    recompute: Recompute = "none"
    expert: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline * self.context * self.data

    def micro_batches(self, global_batch_size: int) -> int:
        """How many a copy computes in a step."""
        return max(1, global_batch_size // (self.micro_batch_size * self.data))

    def __str__(self) -> str:
        names = ("tensor", "pipeline", "context", "data", *(("expert",) if self.expert > 1 else ()))
        parts = (f"{name} {getattr(self, name)}" for name in names)
        recompute = f"{self.recompute} layers a stage" if isinstance(self.recompute, int) else self.recompute
        return f"{', '.join(parts)}; micro batch {self.micro_batch_size}; recompute {recompute}"


def layout_of(run: RunFile, processes: int) -> Layout:
    """The layout that a run file gives; what it leaves to cptain ("auto") is the least: micro batch 1, nothing again.

    Args:
        run: the run.
        processes: GPUs of all nodes together.
    """
    parallel, train = run.parallel, run.train
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        data=max(1, processes // parallel.model_size),
        micro_batch_size=1 if train.micro_batch_size == "auto" else train.micro_batch_size,
        recompute="none" if train.recompute == "auto" else train.recompute,
        expert=parallel.expert,
    )


def stage_layers(layers: int, stages: int) -> list[int]:
    """How many layers each pipeline stage holds, the first to the last.

    The last holds the fewest, as it computes the logits. Of the cuts that Megatron can make the one whose largest
    stage is smallest.

    Args:
        layers: of the model, at least one a stage.
        stages: pipeline parallel size.
    """
    even, rest = divmod(layers, stages)
    if not rest:
        return [even] * stages
    cuts = []
    for middle in (even + 1, even):
        ends = layers - middle * (stages - 2)
        if ends >= 2:
            cuts.append([ends - ends // 2, *[middle] * (stages - 2), ends // 2])
    return min(cuts, key=max)


def recomputed_layers(layout: Layout, layers: int) -> int:
    """How many of a stage's layers are computed again as a whole."""
    if isinstance(layout.recompute, int):
        return min(layout.recompute, layers)
    return layers if layout.recompute == "full" else 0
