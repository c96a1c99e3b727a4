"""The data and the model of a script as keys: pairs and weights, what it validates with, whose tokenizer it is."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cptain.errors import one_line
from cptain.shell_script.values import ANY, is_known, shown, unknowns

if TYPE_CHECKING:
    from cptain.shell_script.mapping import Mapping

_SPLIT = "969,30,1"  # Megatron's, where --data-path comes without --split
_OF_OTHER_FORKS = {"--use-z-loss", "--rope-theta", "--use-embedding-scaling", "--wandb-name"}
_PER_SPLIT = "--per-split-data-args-path"
# Arguments that say what is trained on, and which of them says what is validated with too.
_TRAINED_ON = {"--data-path": "", "--train-data-path": "", "--data-args-path": "", _PER_SPLIT: _PER_SPLIT}
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
    """Set data.tokenized, data.mix, data.split, data.validation and data.strip, and model.hf."""
    flag = next((one.flag for one in reversed(mapping.script.arguments) if one.flag in _TRAINED_ON), "--data-path")
    words = _words(mapping, flag)
    prefixes = _prefixes(mapping, flag, words["train"])
    if not prefixes:
        mapping.differs.append(
            f"the data: the script gives no {flag} that is known here: data.tokenized is to be filled in"
        )
        mapping.put("data.tokenized", [NO_DATA], "to be filled in: the script's is not known")
    else:
        mapping.put("data.tokenized", list(prefixes), f"line {_line(mapping, flag)}", flag)
        _mix(mapping, prefixes)
    _split(mapping, flag)
    _validation(mapping, _TRAINED_ON[flag] or "--valid-data-path", words["valid"])
    if words["test"]:
        mapping.differs.append(
            f"{_TRAINED_ON[flag] or '--test-data-path'}: no set is kept for a test after the training"
        )
    flags = {one.flag for one in mapping.script.arguments}
    if "--use-mpi" in flags and not flags & _OF_OTHER_FORKS:
        mapping.put(
            "data.strip",
            True,
            "of text in data.input: the lab's fork, which has --use-mpi, strips it; the default does not",
        )
    _model(mapping)


def _words(mapping: Mapping, flag: str) -> dict[str, list[str]]:
    """What the script trains on, validates and tests with: weights and prefixes, as Megatron reads them.

    --data-args-path names a file of them, --per-split-data-args-path one of JSON; they are read where they are here.
    """
    script = mapping.script
    given = {one.flag: one.values for one in script.arguments}
    words = {name: given.get(f"--{name}-data-path", []) for name in ("train", "valid", "test")}
    if flag.endswith("data-path"):
        return words | {"train": given.get(flag, [])}
    file = Path(script.file.parent, shown(script.value(flag) or ""))
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if _TRAINED_ON[flag] else {"train": text}
        return {
            name: of.split() if isinstance(of := content.get(name) or [], str) else [str(word) for word in of]
            for name in words
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        mapping.differs.append(f"{flag} {file}: not here to be read ({one_line(error)})")
        return {name: [] for name in words}


def _prefixes(mapping: Mapping, flag: str, words: list[str]) -> dict[str, float | None]:
    """The pairs that words name, each with its weight; what only the cluster knows is said and left out."""
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
    return prefixes


def _validation(mapping: Mapping, flag: str, words: list[str]) -> None:
    """A [[data.validation]] table for each pair that the script validates with, called by its file's name."""
    if mapping.number("--eval-iters") == 0:
        return
    tables = mapping.tables["data.validation"]
    prefixes = _prefixes(mapping, flag, words)
    for path in prefixes:
        stem = PurePosixPath(path.removesuffix("/*")).name.removesuffix("_document").removesuffix("_text")
        name = re.sub(r"[^\w.-]+", "-", stem).lstrip("-._") or "set"
        alike = sum(one["name"] == name or one["name"].startswith(f"{name}-") for one in tables)
        tables.append({"name": f"{name}-{alike + 1}" if alike else name, "tokenized": path})
    if len(prefixes) > 1:
        mapping.differs.append(
            f"{flag}: the script has one loss of all its pairs; here each is a set with its own loss"
        )


def _line(mapping: Mapping, flag: str) -> int:
    return next((one.line for one in mapping.script.arguments if one.flag == flag), mapping.script.line)


def _mix(mapping: Mapping, prefixes: dict[str, float | None]) -> None:
    weights = set(prefixes.values())
    if weights == {None} or (len(prefixes) == 1 and "*" not in next(iter(prefixes))):
        return  # each token once an epoch
    if len(weights) == 1:
        mapping.put("data.mix", "uniform", "the script gives every file the same weight")
        return
    for path, weight in prefixes.items():
        mapping.tables["data.mix"].append({"input": path, "weight": weight})
        if "*" in path:
            mapping.differs.append(
                f"{path}: each of its files has weight {weight:g} in the script; here all of them together"
            )


def _split(mapping: Mapping, flag: str) -> None:
    given = mapping.given("--split")
    if flag in ("--train-data-path", _PER_SPLIT):
        mapping.put("data.split", "1,0,0", f"{flag}: it is trained on whole")
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
