"""README.md of an exported model: what it was made from and how, with the metadata block that the Hugging Face hub
reads.

It is meant to be published, so it names no path: a base model that is a local folder is called by the folder's name.
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from cptain import __version__
from cptain.data.manifest import read_manifest
from cptain.data.steps import train_steps
from cptain.errors import CptainError
from cptain.model.architecture import read_config
from cptain.progress import human
from cptain.run_file import RunFile

MODEL_CARD = "README.md"
_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")  # a model's folder in the hub's cache
_KEPT = ("language", "license", "license_name", "license_link")  # of the base model's own card


def _hub_id(hf: str, base: Path) -> str | None:
    """The base model's name on the hub, where it is known."""
    if not Path(hf).is_absolute():
        return hf
    if match := next(filter(None, map(_CACHED.fullmatch, base.parts)), None):
        return f"{match['owner']}/{match['name']}"
    return None


def _base_metadata(base: Path) -> dict[str, Any]:
    try:
        known = metadata_load(base / MODEL_CARD) or {}
    except Exception:  # none, or none that can be read
        return {}
    return {key: known[key] for key in _KEPT if known.get(key)}


def _software(run: RunFile) -> str:
    """The versions that trained the model, as far as the run's provenance has them."""
    try:
        trained = json.loads((run.folder / "provenance.json").read_text(encoding="utf-8"))["train"]
        megatron, packages = trained.get("megatron"), trained["packages"]
        commit = f" ({trained['megatron_commit'][:12]})" if trained.get("megatron_commit") else ""
        found = {"Megatron-LM": f"{megatron}{commit}" if megatron else None, "cptain": trained["cptain"]}
        found |= {name: packages.get(name) for name in ("torch", "transformer-engine", "transformers")}
        return ", ".join(f"{name} {version}" for name, version in found.items() if version)
    except (OSError, ValueError, KeyError, TypeError):
        return f"cptain {__version__}"


def _rows(run: RunFile, base: Path, step: int) -> list[tuple[str, str]]:
    train, parallel = run.train, run.parallel
    steps, data = f"{step:,}", None
    try:
        records = read_manifest(run.data_folder, run.data.input)
        tokens = sum(record.tokens for record in records)
        data = f"{sum(record.documents for record in records):,} documents, {human(tokens)} tokens"
        steps += f" of {train_steps(run, records):,}"
    except CptainError:
        pass  # the checkpoint was trained elsewhere
    seen = step * train.tokens_per_step
    rows = [
        ("architecture", read_config(base)["architectures"][0]),
        ("steps", steps),
        ("tokens seen", f"{human(seen)} ({seen:,})"),
        ("data", data),
        ("sequence length", f"{train.seq_length:,}"),
        ("global batch size", f"{train.global_batch_size:,} sequences"),
        ("learning rate", f"{train.lr:g}, cosine to {train.min_lr:g}, {train.warmup_steps:,} steps of warm-up"),
        ("training precision", train.precision),
        ("parallel", f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, context {parallel.context}"),
        ("other Megatron arguments", " ".join(f"`{'…' if '/' in word else word}`" for word in train.megatron_args)),
        ("software", _software(run)),
    ]
    return [(name, value) for name, value in rows if value]


def model_card(run: RunFile, base: Path, iteration: int | None) -> str:
    """The card of a model that was exported from `iteration` (None: a release, which nothing trained) of a run.

    Args:
        run: the run, as its run file is now.
        base: the folder of the model that the run began with.
        iteration: optimizer steps.
    """
    hub_id = _hub_id(run.model.hf, base)
    name = hub_id or base.name
    about: dict[str, Any] = {"base_model": hub_id, "base_model_relation": "finetune" if hub_id else None}
    data = ModelCardData(
        **about,
        **_base_metadata(base),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["continual-pretraining", "megatron-lm", "cptain"],
    )
    lines = [f"# {run.name}", ""]
    if iteration is None:
        lines.append(f"{name}, exported from a Megatron-LM checkpoint with cptain {__version__}.")
    else:
        lines.append(
            f"{name} after continual pre-training with Megatron-LM: the checkpoint of step {iteration:,}, exported "
            f"with cptain {__version__}."
        )
        lines += ["", "| | |", "| --- | --- |"]
        lines += [f"| {key} | {value} |" for key, value in _rows(run, base, iteration)]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"
