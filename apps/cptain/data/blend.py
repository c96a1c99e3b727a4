"""How the tokenized files blend in training: the file that Megatron takes as --data-args-path.

Its content is `weight prefix weight prefix …`. By file, not on the command line: 10,000 input files are more than a
command line holds. Megatron splits the file at white space; `cptain.training.pretrain` reads it with shell quoting
instead, which is the same for every path without white space or quotes.
"""

import fnmatch
import shlex
from pathlib import Path
from typing import Any

from cptain import atomic
from cptain.data.manifest import Record
from cptain.errors import CptainError
from cptain.run_file import MixPart, RunFile


def weights(mix: str | list[MixPart], records: list[Record]) -> list[float]:
    """A weight a record, in their order.

    "tokens" weighs a file by its tokens, so that every token is seen once an epoch. Tables share their weight among
    the files they match, by tokens; every file must match exactly one.

    Raises:
        CptainError: a file that no table matches, or more than one; a table that matches no file.
    """
    if mix == "tokens":
        return [float(record.tokens) for record in records]
    if isinstance(mix, str):
        return [1.0] * len(records)
    members: list[list[int]] = [[] for _ in mix]
    for place, record in enumerate(records):
        parts = Path(record.input).parts
        tables = [number for number, part in enumerate(mix) if _matches(parts, Path(part.input).parts)]
        if len(tables) != 1:
            named = " and ".join(mix[number].input for number in tables) or "no table"
            raise CptainError(f"data.mix: {record.input} is matched by {named}: exactly one table must match a file")
        members[tables[0]].append(place)
    result = [0.0] * len(records)
    for part, places in zip(mix, members, strict=True):
        if not places:
            raise CptainError(f"data.mix: {part.input} matches no file of data.input that has tokens")
        tokens = sum(records[place].tokens for place in places)
        for place in places:
            result[place] = part.weight * records[place].tokens / tokens
    return result


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches a glob, ** being any depth. By name alone: the text may be gone when training starts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[depth:], pattern[1:]) for depth in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def write_blend(run: RunFile, records: list[Record]) -> Path:
    """Write <run>/data-args.txt and return its path."""
    filled = [record for record in records if record.tokens]
    lines = []
    for weight, record in zip(weights(run.data.mix, filled), filled, strict=True):
        lines.append(f"{weight:.12g} {shlex.quote(str(run.data_folder / record.prefix))}\n")
    file = run.folder / "data-args.txt"
    atomic.write_text(file, "".join(lines))
    return file


def trained_on(run: RunFile, records: list[Record]) -> dict[str, Any]:
    return {"documents": sum(r.documents for r in records), "tokens": sum(r.tokens for r in records)}


def other_data(before: dict[str, Any], now: dict[str, Any]) -> str:
    return "" if before == now else f"{before} -> {now}"
