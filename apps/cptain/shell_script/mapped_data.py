"""The data and the model of a script as keys: pairs with their weights, the split, and whose tokenizer it is."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from cptain.shell_script.values import ANY, is_known, shown, unknowns

if TYPE_CHECKING:
    from cptain.shell_script.mapping import Mapping

_SPLIT = "969,30,1"  # Megatron's, where --data-path comes without --split
_OF_OTHER_FORKS = {"--use-z-loss", "--rope-theta", "--use-embedding-scaling", "--wandb-name"}
NO_DATA = "/path/to/tokenized/data/**/*"
NO_MODEL = "/path/to/the/huggingface/model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def _blend(words: list[str]) -> list[tuple[float | None, str]]:
    """Weights and prefixes, as Megatron reads --data-path: pairs of both where every other word is a number."""
    if len(words) % 2 == 0:
        try:
            return [(float(words[place]), words[place + 1]) for place in range(0, len(words), 2)]
        except ValueError:
            pass
    return [(None, word) for word in words]


def _as_path(value: str) -> str:
    """A path for the run file: a * stands for what the cluster has, a variable of the environment as it is."""
    escaped = re.sub(r"[\[?*]", lambda match: f"[{match[0]}]", value)
    return shown(escaped.replace(ANY, "*"))


def map_data(mapping: Mapping) -> None:
    """Set data.tokenized, data.mix, data.split and data.strip, and model.hf."""
    words, flag = _given_data(mapping)
    prefixes: dict[str, float | None] = {}
    for weight, prefix in _blend(words):
        if any(not re.fullmatch(r"\$\w+", mark) for mark in unknowns(prefix)):
            mapping.differs.append(f"{flag}: {shown(prefix)}: known on the cluster only: it is left out")
            continue
        path = _as_path(prefix)
        before = prefixes.get(path)
        prefixes[path] = weight if before is None or weight is None else before + weight
        if not path.startswith(("/", "$", "~")):
            mapping.differs.append(f"{flag}: {path}: relative to the folder of the job, and here to this file's")
    if not prefixes:
        mapping.differs.append(
            f"the data: the script gives no {flag} that is known here: data.tokenized is to be filled in"
        )
        mapping.put("data.tokenized", [NO_DATA], "to be filled in: the script's is not known")
    else:
        mapping.put("data.tokenized", list(prefixes), f"line {_line(mapping, flag)}", flag)
        _mix(mapping, prefixes)
    _split(mapping, flag)
    flags = {one.flag for one in mapping.script.arguments}
    if "--use-mpi" in flags and not flags & _OF_OTHER_FORKS:
        mapping.put(
            "data.strip",
            True,
            "of text in data.input: the lab's fork, which has --use-mpi, strips it; the default does not",
        )
    _model(mapping)


def _line(mapping: Mapping, flag: str) -> int:
    return next((one.line for one in mapping.script.arguments if one.flag == flag), mapping.script.line)


def _given_data(mapping: Mapping) -> tuple[list[str], str]:
    for flag in ("--data-path", "--train-data-path"):
        for one in reversed(mapping.script.arguments):
            if one.flag == flag:
                return one.values, flag
    return [], "--data-path"


def _mix(mapping: Mapping, prefixes: dict[str, float | None]) -> None:
    weights = set(prefixes.values())
    if weights == {None} or (len(prefixes) == 1 and "*" not in next(iter(prefixes))):
        return  # each token once an epoch
    if len(weights) == 1:
        mapping.put("data.mix", "uniform", "the script gives every file the same weight")
        return
    for path, weight in prefixes.items():
        mapping.mix.append({"input": path, "weight": weight})
        if "*" in path:
            mapping.differs.append(
                f"{path}: each of its files has weight {weight:g} in the script; here all of them together"
            )


def _split(mapping: Mapping, flag: str) -> None:
    given = mapping.given("--split")
    if flag == "--train-data-path":
        mapping.put("data.split", "1,0,0", "--train-data-path is trained on whole")
        if mapping.given("--valid-data-path"):
            mapping.differs.append("--valid-data-path: validation sets are text here: [[data.validation]]")
    elif given:
        parts = [part.strip() for part in given.replace("/", ",").split(",")]
        mapping.put("data.split", ",".join([*parts, "0", "0"][:3]), "", "--split")
    else:
        mapping.put("data.split", _SPLIT, "Megatron's default, as the script says nothing")


def _model(mapping: Mapping) -> None:
    """The Hugging Face model: the tokenizer's, which is all that a script of Megatron's says of it."""
    tokenizer = mapping.given("--tokenizer-model") or ""
    path = PurePosixPath(tokenizer)
    if path.name in ("tokenizer.json", "tokenizer.model"):
        tokenizer = str(path.parent)
    if path.suffix in (".model", ".json", ".vocab", ".txt") and not path.name.startswith("tokenizer."):
        tokenizer = ""  # a file of a tokenizer of another kind, and no folder of a model
    loaded = mapping.script.value("--load")
    came = f"; its weights came from {shown(loaded)}" if loaded and loaded != mapping.script.value("--save") else ""
    if tokenizer and is_known(tokenizer) and (tokenizer.startswith("/") or _HUB_ID.fullmatch(tokenizer)):
        mapping.put("model.hf", tokenizer, f"the script's tokenizer{came}", "--tokenizer-model", "--tokenizer-type")
    else:
        mapping.put("model.hf", NO_MODEL, f"to be filled in: the script names no Hugging Face model{came}")
        mapping.differs.append("model.hf is to be filled in: the script names no Hugging Face model")
