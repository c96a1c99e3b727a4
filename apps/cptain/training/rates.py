"""How long a step takes, from what was measured: rates.toml, and the run's own trainings.

Nothing is invented: a time is that of the nearest measured training, scaled by what kernels take (`step_time`). What a
layout costs in communication is in the measured rate alone: so the nearest training is first of all one that is cut
alike.
"""

import json
import math
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cptain.model.architecture import Architecture, Mixture
from cptain.model.sizes import flops_per_token
from cptain.run_file import RunFile
from cptain.training.layout import Layout
from cptain.training.step_time import whole_step

_TABLE = Path(__file__).with_name("rates.toml")
SHAPE = (
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "tied_embeddings",
    "mixture",
)
"""The fields of an architecture that speed follows from, with num_layers."""


@dataclass(frozen=True)
class Rate:
    """A measured training.

    Attributes:
        architecture: its shape; what speed does not follow from is empty.
        shape: its name for people.
        seq_length: tokens of a sequence.
        global_batch_size: sequences of a step.
        precision: as train.precision.
        layout: how it lay on its GPUs.
        tokens_per_second: a GPU.
        card, megatron, torch: what it ran on.
        where: the place that says so.
    """

    architecture: Architecture
    shape: str
    seq_length: int
    global_batch_size: int
    precision: str
    layout: Layout
    tokens_per_second: float
    card: str
    megatron: str
    torch: str
    where: str

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.seq_length * self.global_batch_size / self.tokens_per_second / self.layout.gpus

    @property
    def teraflops(self) -> float:
        """A GPU's, by Megatron's count: attention as causal, nothing computed again."""
        return self.tokens_per_second * flops_per_token(self.architecture, self.seq_length) / 1e12

    def cut_as(self, layout: Layout) -> bool:
        """Whether it was cut over GPUs in the ways that cost most to communicate as `layout` is."""
        sizes = ("tensor", "context", "expert")
        return all(getattr(self.layout, size) == getattr(layout, size) for size in sizes)

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:,.0f} tokens/s a GPU on {self.card} ({self.architecture.num_layers} layers of "
            f"{self.shape}, {self.seq_length} tokens, {self.precision}, {self.layout}; {self.megatron}, "
            f"torch {self.torch}; {self.where})"
        )


def read_rate(entry: dict[str, Any], shapes: dict[str, dict[str, Any]]) -> Rate:
    """A table of rates.toml, or a line of a run's plan.jsonl, whose shape is a table of its own.

    Raises:
        KeyError, TypeError: what it lacks.
    """
    shape = entry["shape"]
    sizes = {"mixture": None} | (shapes[shape] if isinstance(shape, str) else shape)
    sizes["mixture"] = Mixture(**sizes["mixture"]) if sizes["mixture"] else None
    return Rate(
        architecture=Architecture(
            num_layers=entry["num_layers"],
            **{name: sizes[name] for name in SHAPE},
            max_position_embeddings=0,
            rotary_base=0.0,
            rope_scaling_factor=None,
            norm_epsilon=0.0,
        ),
        shape=shape if isinstance(shape, str) else "this model",
        layout=Layout(**entry["layout"]),
        **{name: entry[name] for name in ("seq_length", "global_batch_size", "precision", "tokens_per_second")},
        **{name: entry[name] for name in ("card", "megatron", "torch", "where")},
    )


def shape_of(architecture: Architecture) -> dict[str, Any]:
    """What `read_rate` reads as a shape."""
    values = asdict(architecture)
    return {name: values[name] for name in SHAPE}


def known_rates() -> list[Rate]:
    """Those that ship with cptain."""
    table = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    return [read_rate(entry, table["shapes"]) for entry in table["measured"]]


def nearest(rates: list[Rate], architecture: Architecture, precision: str, layout: Layout) -> Rate | None:
    """The measured training to scale from; None where none has the precision, or none is of experts as the model is.

    Of those that are cut alike over GPUs, the one whose model is nearest in size; then the one whose micro batch and
    number of GPUs are. Later ones first, which are the run's own.
    """

    def apart(one: float, other: float) -> float:
        return abs(math.log2(one / other))

    def distance(place: int) -> tuple[float, ...]:
        rate = rates[place]
        return (
            apart(rate.layout.tensor, layout.tensor),
            apart(rate.layout.context, layout.context),
            apart(rate.layout.expert, layout.expert),
            apart(flops_per_token(rate.architecture, 0), flops_per_token(architecture, 0)),
            rate.layout.recompute != layout.recompute,
            apart(rate.layout.micro_batch_size, layout.micro_batch_size),
            apart(rate.layout.gpus, layout.gpus),
            -place,
        )

    alike = [
        place
        for place, rate in enumerate(rates)
        if rate.precision == precision and bool(rate.architecture.mixture) == bool(architecture.mixture)
    ]
    return rates[min(alike, key=distance)] if alike else None


def step_seconds(run: RunFile, architecture: Architecture, layout: Layout, rate: Rate) -> float:
    """The time of an optimizer step, scaled from a measured training by what is computed of both."""
    train = run.train
    mine = whole_step(architecture, train.seq_length, train.global_batch_size, train.precision, layout)
    its = whole_step(rate.architecture, rate.seq_length, rate.global_batch_size, rate.precision, rate.layout)
    return rate.seconds * mine / its


def own_rates(run: RunFile) -> list[Rate]:
    """What trainings of the run measured, oldest first; lines that cannot be read are left out."""
    found = []
    for line in read_plan_log(run):
        try:
            found.append(read_rate(line, {}))
        except (KeyError, TypeError):
            continue
    return found


def plan_log(run: RunFile) -> Path:
    """Where trainings of the run leave what was predicted of them and what was measured, a JSON object a line."""
    return run.logs_folder / "plan.jsonl"


def read_plan_log(run: RunFile) -> list[dict[str, Any]]:
    """The lines of the run's plan.jsonl; one that a killed process left half-written is left out."""
    found = []
    try:
        lines = plan_log(run).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def predict(run: RunFile, architecture: Architecture, layout: Layout) -> tuple[float, Rate] | None:
    """Seconds of a step, and the measured training that they are scaled from; None where nothing alike was measured."""
    rate = nearest([*known_rates(), *own_rates(run)], architecture, run.train.precision, layout)
    return (step_seconds(run, architecture, layout, rate), rate) if rate else None
