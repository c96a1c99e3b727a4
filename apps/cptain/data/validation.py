"""[[data.validation]]: sets of text of their own, each with a loss of its own.

A set is tokenized as a run's data is, by the same stage and with the same recipe, into a folder of its own below the
data folder. What is validated on is not trained on: a file that both match is refused, and a text of a set that the
training data has too, token by token, is left out of the set. preprocess looks for those once both are made.
"""

import hashlib
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptain import atomic
from cptain.data.check import check_data
from cptain.data.inputs import input_files
from cptain.data.manifest import Record, read_manifest
from cptain.data.overlap import texts_in_both
from cptain.data.preprocess import preprocess
from cptain.data.split import read_lengths
from cptain.data.tokenized import find_pairs, folders_of_pairs
from cptain.data.tokenizer import tokenizer_facts
from cptain.errors import CptainError, bad_usage
from cptain.run_file import RunFile
from cptain.summary import say, under

_FOLDER = ".validation"
_LEFT_OUT = "left-out.json"
_COMPARED = "without the token that ends a text"  # how; another way needs another word


def set_runs(run: RunFile) -> dict[str, RunFile]:
    """The run's validation sets by name, each as the run whose data it would be."""
    return {
        one.name: run.model_copy(
            update={
                "data": run.data.model_copy(
                    update={
                        "input": [one.input] if one.input else [],
                        "tokenized": [one.tokenized] if one.tokenized else [],
                        "output": run.data_folder / _FOLDER / one.name,
                        "mix": "tokens",
                        "validation": [],
                    }
                )
            }
        )
        for one in run.data.validation
    }


def data_folders(run: RunFile) -> list[Path]:
    """The folders that a training of the run reads tokens from, each once."""
    every = [run, *set_runs(run).values()]
    return list(dict.fromkeys(folder for one in every for folder in (one.data_folder, *folders_of_pairs(one))))


def preprocess_all(run: RunFile, *arguments: Any) -> bool:
    """Tokenize a run's data and its validation sets, and leave out of these what the data has too.

    Args:
        run: the run.
        arguments: of `cptain.data.preprocess.preprocess`, for each.

    Returns:
        Whether a file was tokenized.

    Raises:
        CptainError: a file that is in both, or a set of which nothing is left; see also `preprocess`.
    """
    sets = set_runs(run)
    _are_apart(run, sets)
    worked = preprocess(run, *arguments)
    for name, one in sets.items():
        print(f"preprocess: validation {name}:", file=sys.stderr)
        with under("validation", name):
            worked |= preprocess(one, *arguments)
    for name, one in sets.items():
        with under("validation", name):
            _leave_out(run, name, one)
    return worked


def _files(run: RunFile) -> dict[str, Path]:
    """The files of text and the pairs of a run, by where they really are."""
    pairs = [pair.with_name(f"{pair.name}.bin") for pair in find_pairs(run.data.tokenized)]
    return {os.path.realpath(file): file for file in (*input_files(run.data.input).values(), *pairs)}


def _are_apart(run: RunFile, sets: dict[str, RunFile]) -> None:
    trained = _files(run) if sets else {}
    for name, one in sets.items():
        for other in (trained[place] for place in _files(one) if place in trained):
            bad_usage(f"data.validation: {name}: {other} is trained on too: leave it out of one")


def _made_of(records: list[Record], of_set: list[Record]) -> str:
    """A hash of the training data and a set's, by which one knows whether what was left out is still right."""
    lines = [
        [_COMPARED],
        *([record.prefix, record.sha256, record.tokens, str(record.recipe)] for record in [*records, *of_set]),
    ]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _left_out(one: RunFile, records: list[Record], of_set: list[Record]) -> dict[str, list[int]] | None:
    """The numbers of the set's texts that the training data has too, by pair; None where that is not known."""
    try:
        content = json.loads((one.data_folder / _LEFT_OUT).read_text(encoding="utf-8"))
        found: dict[str, list[int]] = content["texts"]
        return found if content["made_of"] == _made_of(records, of_set) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _leave_out(run: RunFile, name: str, one: RunFile) -> None:
    """Once the data and the set are made: find what is in both."""
    try:
        records = read_manifest(run.data_folder, run.data.sources)
        of_set = read_manifest(one.data_folder, one.data.sources)
    except CptainError:
        return  # another part of the work is not done, or texts were counted alone
    found = _left_out(one, records, of_set)
    if found is None:
        few = {one.data_folder / record.prefix: record.prefix for record in of_set}
        eod = tokenizer_facts(run.tokenizer, run.tokenizers_folder).eos
        both = texts_in_both(list(few), [run.data_folder / record.prefix for record in records], eod)
        found = {few[prefix]: texts for prefix, texts in both.items()}
        atomic.write_json(one.data_folder / _LEFT_OUT, {"made_of": _made_of(records, of_set), "texts": found})
    if count := sum(map(len, found.values())):
        say(f"preprocess: validation {name}: {count:,} texts are trained on too: left out", left_out=count)


@dataclass(frozen=True)
class ToValidate:
    """A validation set as a training reads it.

    Attributes:
        name: of the set.
        parts: prefix of a pair, and a range of its texts, first and stop.
        tokens: of them.
        texts: how many they are.
        left_out: texts that the training data has too.
    """

    name: str
    parts: list[tuple[str, int, int]]
    tokens: int
    texts: int
    left_out: int

    def __str__(self) -> str:
        also = f"; {self.left_out:,} more are trained on too, and left out" if self.left_out else ""
        return f"validation {self.name}: {self.texts:,} texts, {self.tokens:,} tokens{also}"


def check_validation(run: RunFile, records: list[Record]) -> list[ToValidate]:
    """The run's validation sets, checked as its data is.

    Args:
        run: the run.
        records: of its data.

    Raises:
        CptainError: a set that is not made, or of which less than a sequence is left; another training script.
    """
    if run.data.validation and run.train.script is not None:
        bad_usage("data.validation: only cptain's own training script reads such sets, and not train.script")
    found = []
    for name, one in set_runs(run).items():
        of_set = check_data(one)
        left_out = _left_out(one, records, of_set)
        if left_out is None:
            raise CptainError(f"data.validation: {name}: not compared with the data as it is now: run preprocess again")
        found.append(_to_validate(name, one, of_set, left_out))
        if found[-1].tokens <= run.train.seq_length:
            bad_usage(
                f"data.validation: {name}: {found[-1].tokens} tokens to validate with are less than a sequence "
                f"(train.seq_length = {run.train.seq_length})"
            )
    return found


def _to_validate(name: str, one: RunFile, records: list[Record], left_out: dict[str, list[int]]) -> ToValidate:
    parts: list[tuple[str, int, int]] = []
    tokens = texts = 0
    for record in records:
        prefix = str(one.data_folder / record.prefix)
        _, lengths = read_lengths(prefix)
        bounds = [-1, *left_out.get(record.prefix, ()), len(lengths)]
        for before, after in itertools.pairwise(bounds):
            if inside := int(lengths[before + 1 : after].sum(dtype="int64")):
                parts.append((prefix, before + 1, after))
                tokens, texts = tokens + inside, texts + after - before - 1
    return ToValidate(name, parts, tokens, texts, sum(map(len, left_out.values())))


def validation_file(run: RunFile, sets: list[ToValidate]) -> Path | None:
    """<run>/validation-sets.json; None where there are no sets."""
    return run.folder / "validation-sets.json" if sets else None


def write_validation(run: RunFile, sets: list[ToValidate]) -> Path | None:
    """Write <run>/validation-sets.json for the training script, and return its path; None where there are no sets."""
    file = validation_file(run, sets)
    if file is None:
        return None
    atomic.write_json(file, [{"name": one.name, "parts": one.parts} for one in sets])
    return file
