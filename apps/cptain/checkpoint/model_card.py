"""README.md of an exported model: what it was made from and how, with the metadata block that the Hugging Face hub
reads.

It is meant to be published, so it names no path: a base model that is a local folder is called by the folder's name.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from cptain import __version__
from cptain.data.trained_on import epochs_seen
from cptain.data.vocabulary import Extension
from cptain.history import Start, read_history, stretches
from cptain.model.architecture import read_config
from cptain.progress import human
from cptain.run_file import CHECKPOINTS, RunFile
from cptain.run_stages import Stage
from cptain.run_train import Train

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


def _software(versions: dict[str, Any]) -> str:
    """The versions that trained, as far as the history has them."""
    megatron, packages = versions.get("megatron"), versions.get("packages", {})
    commit = f" ({versions['megatron_commit'][:12]})" if versions.get("megatron_commit") else ""
    found = {"Megatron-LM": f"{megatron}{commit}" if megatron else None, "cptain": versions.get("cptain")}
    found |= {name: packages.get(name) for name in ("torch", "transformer-engine", "transformers")}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def _branched(branch: dict[str, Any] | None) -> str:
    """train.from in words."""
    if branch is None:
        return ""
    what = "" if branch["optimizer"] else "the weights of "
    return f"{what}step {branch['iteration']:,} of the run {Path(branch['run']).name}"


def _tokenized(data: dict[str, Any]) -> str:
    return f", {human(data['tokenized'])} of them tokenized by others" if data.get("tokenized") else ""


def _part_names(mix: str | list[dict[str, Any]]) -> dict[str, str]:
    """The names of the tables of [[data.mix]] in the card, by title; that of a glob, which is a path, is its place."""
    tables = [] if isinstance(mix, str) else mix
    return {one.get("name") or one["input"]: one.get("name") or f"part {place}" for place, one in enumerate(tables, 1)}


def _amounts(weights: dict[str, float] | None, repeats: dict[str, float] | None, names: dict[str, str]) -> str:
    told = [f"{names[title]} {weight:g}" for title, weight in (weights or {}).items()]
    return ", ".join(told + [f"{names[title]} {often:g} times" for title, often in (repeats or {}).items()])


def _mixed(data: dict[str, Any], steps: int) -> str:
    """[[data.mix]] and [[data.stage]] in words."""
    names = _part_names(data["mix"])
    tables = dict(zip(names, data["mix"], strict=False))
    weights, repeats = (
        {title: one[key] for title, one in tables.items() if one.get(key)} for key in ("weight", "repeat")
    )
    told = [_amounts(weights, repeats, names)]
    for one in data.get("stage", ()):
        begin = Stage.model_construct(**one).begin(steps)
        told.append(f"from step {begin + 1:,} {_amounts(one.get('weight'), one.get('repeat'), names)}")
    return "; ".join(filter(None, told))


def _described(start: Start) -> dict[str, str]:
    """How one start of training trained, a line of the card each."""
    train, layout, data = start.run["train"], start.layout, start.data
    said = Train.model_construct(**train)  # as it was said, by whichever version
    arguments = " ".join(f"`{'…' if '/' in word else word}`" for word in train["megatron_args"])
    kinds = ("tensor", "pipeline", "context", *(("expert",) if "expert" in layout else ()))
    sizes = ", ".join(f"{kind} {layout[kind]}" for kind in kinds)
    return {
        "data": f"{data['documents']:,} documents, {human(data['tokens'])} tokens{_tokenized(data)}" if data else "",
        "begins with": _branched(train.get("from")),
        "mix": _mixed(start.run["data"], start.steps),
        "documents": start.run["data"].get("documents", ""),
        "validation sets": ", ".join(one["name"] for one in start.run["data"].get("validation", ())),
        "sequence length": f"{train['seq_length']:,}",
        "global batch size": said.described_batch,
        "learning rate": said.described_schedule(start.steps),
        "optimizer": f"Adam, betas {said.adam_beta1:g} and {said.adam_beta2:g}, epsilon {said.adam_eps:g}, "
        f"weight decay {said.weight_decay:g}, gradients clipped at {said.clip_grad:g}"
        + (f", z-loss {said.z_loss:g}" if said.z_loss else ""),
        "seed": str(said.seed),
        "training precision": train["precision"] + (f" ({said.fp8_recipe})" if said.fp8_recipe else ""),
        "parallel": f"{sizes}, {layout['processes']} processes",
        "other Megatron arguments": arguments,
        "software": _software(start.versions),
        "accepted": "; ".join(start.accepted),
    }


def _rows(run_folder: Path, base: Path, step: int) -> list[tuple[str, str]]:
    """What trained the steps 1 to `step`; where that changed on the way, with the steps of each."""
    done = stretches(read_history(run_folder), step)
    asked = f" of {done[-1][0].steps:,}" if done else ""
    rows = [("architecture", read_config(base)["architectures"][0]), ("steps", f"{step:,}{asked}")]
    if not done:  # trained by another tool
        return rows
    train = Train.model_construct(**done[-1][0].run["train"])  # none of what is asked of it can change in a run
    seen = train.tokens_seen(step)
    rows.append(("tokens seen", f"{human(seen)} ({seen:,})"))
    names = _part_names(done[-1][0].run["data"]["mix"]).values()
    epochs = epochs_seen(done[-1][0].data, train, step)
    rows.append(("epochs", ", ".join(f"{name} {often:.3g}" for name, often in zip(names, epochs, strict=False))))
    described = [(_described(start), first, end) for start, first, end in done]
    for name in described[-1][0]:
        values: list[tuple[str, int, int]] = []
        for one, first, end in described:
            if values and values[-1][0] == one[name]:
                values[-1] = (one[name], values[-1][1], end)
            else:
                values.append((one[name], first, end))
        if len(values) == 1:
            rows.append((name, values[0][0]))
        else:
            told = (f"{value or 'none'} (steps {first:,} to {end:,})" for value, first, end in values)
            rows.append((name, "; ".join(told)))
    return [(name, value) for name, value in rows if value]


def _vocabulary(extension: Extension) -> str:
    """What was added to the base model's vocabulary, and how it began."""
    began = {
        "subword-mean": "the mean of those of the pieces that the base's tokenizer splits it into",
        "copy": "that of the first piece that the base's tokenizer splits it into",
        "mean": "the mean of those of all",
    }[extension.initialise]
    new = f"{len(extension.pieces):,} of them new (ids {extension.first:,} to {extension.size - 1:,})"
    return f"{extension.size:,} tokens, {new}; a new token's rows began as {began}"


def model_card(run: RunFile, base: Path, iteration: int | None, extension: Extension | None = None) -> str:
    """The card of a model that was exported from `iteration` (None: a release, which nothing trained) of a run.

    Args:
        run: the run. How it was trained is in its history; its run file may have been edited since.
        base: the folder of the model that the run began with.
        iteration: optimizer steps.
        extension: tokens that the model has and the base has not.
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
        rows = _rows(run.folder, base, iteration)
        if extension:
            rows.insert(1, ("vocabulary", _vocabulary(extension)))
        lines += [f"| {key} | {value} |" for key, value in rows]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def merged_card(name: str, licence: Path, models: list[tuple[Path, float, str]]) -> str:
    """The card of an average of models.

    Args:
        name: of the merged model.
        licence: the folder of a model whose card says licence and language.
        models: folder, weight and a hash of each.
    """
    data = ModelCardData(
        **_base_metadata(licence),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", "cptain"],
    )
    whole = sum(weight for _, weight, _ in models)
    lines = [
        f"# {name}",
        "",
        f"The weighted average of {len(models)} models, computed in fp64 with cptain {__version__}.",
        "",
        "| model | weight | share | SHA-256 |",
        "| --- | --- | --- | --- |",
        *(
            f"| {_called(folder)} | {weight:g} | {weight / whole:.2%} | `{digest}` |"
            for folder, weight, digest in models
        ),
        "",
        "The hash of a model is over the sizes and hashes of its files, which `verify.json` lists.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def _called(folder: Path) -> str:
    """What a model is called, without its path: of a run's checkpoint or export, which all runs call alike, with the
    run's name."""
    in_a_run = folder.parent.name in ("hf", CHECKPOINTS)
    return f"{folder.parent.parent.name}, {folder.name}" if in_a_run else folder.name
