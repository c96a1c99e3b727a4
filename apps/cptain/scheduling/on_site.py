"""A run on a site: its layout there, whether it fits its GPUs, and how long a step takes.

What `cptain plan` shows and `cptain jobs` refuses by.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from cptain.data.vocabulary import run_architecture
from cptain.model.architecture import Architecture
from cptain.run_file import RunFile
from cptain.scheduling.sites import Site
from cptain.training.disk import is_here
from cptain.training.fit import refusal, settle
from cptain.training.flags import check_parallel
from cptain.training.layout import Layout
from cptain.training.rates import predict


@dataclass(frozen=True)
class OnSite:
    """A run on a site.

    Attributes:
        architecture: the model's.
        layout: with every "auto" decided.
        choices: a line for every "auto".
        gpu_bytes: of a GPU; None where the site does not say, or has none.
        refusal: why the run cannot fit; None where it may.
    """

    architecture: Architecture
    layout: Layout
    choices: list[str]
    gpu_bytes: float | None
    refusal: str | None


def processes(run: RunFile, site: Site | None) -> int:
    """Of all nodes together, as `train` starts them; without a site, those of one copy of the model."""
    nodes = run.jobs.nodes
    if site is None:
        return run.parallel.least_gpus
    return nodes * (site.gpus or math.ceil(run.parallel.least_gpus / nodes))


def on_site(run: RunFile, site: Site | None, architecture: Architecture) -> OnSite:
    """Lay a run on a site's GPUs.

    Raises:
        CptainError: exit status 2; sizes that do not divide.
    """
    count = processes(run, site)
    check_parallel(run, architecture, count)
    gpu_bytes = site.gpu_memory * 2**30 if site and site.gpus and site.gpu_memory else None
    layout, choices = settle(run, architecture, count, gpu_bytes)
    why = refusal(run, architecture, layout, gpu_bytes) if gpu_bytes else None
    return OnSite(architecture, layout, choices, gpu_bytes, why)


def model_is_here(run: RunFile) -> bool:
    """False for a model of the hub, or on another machine; or where what its new tokens are made of is there."""
    model, vocabulary = Path(run.model.hf), run.model.vocabulary
    needed = [Path(run.base_tokenizer), Path(vocabulary.add or str(vocabulary.tokenizer))] if vocabulary else []
    return model.is_absolute() and model.is_dir() and all(path.is_absolute() and is_here(path) for path in needed)


def estimated_step(run: RunFile, site: Site) -> float | None:
    """Seconds of a step; None where the model is not seen from here, or nothing alike was measured."""
    if not (site.gpus and site.gpu_memory and model_is_here(run)):
        return None
    here = on_site(run, site, run_architecture(run))
    predicted = predict(run, here.architecture, here.layout)
    return predicted[0] if predicted else None
