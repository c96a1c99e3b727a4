"""How the tokenized files blend in training: parts of the mix, and the weight of every file."""

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from cptain.data.manifest import Record
from cptain.errors import CptainError
from cptain.run_data import MixPart


@dataclass(frozen=True)
class Part:
    """Files that share their part of the training tokens by the tokens they have.

    Attributes:
        name: for people: the table's name or glob, or the file.
        weight: their share, among those of all parts; 0 where only a [[data.stage]] says it.
        records: theirs.
        repeat: how often an epoch sees them.
    """

    name: str
    weight: float
    records: list[Record]
    repeat: float = 1.0

    @property
    def tokens(self) -> int:
        """Of all its files."""
        return sum(record.tokens for record in self.records)


def parts(mix: str | list[MixPart], records: list[Record]) -> list[Part]:
    """The parts of a mix, of the files that have tokens: all of them together, each by itself, or a table's.

    "tokens" is one part, so that every token is seen once an epoch. "uniform" makes every file a part, all alike. Of
    tables exactly one must match each file.

    Raises:
        CptainError: a file that no table matches, or more than one; a table that matches no file.
    """
    filled = [record for record in records if record.tokens]
    if mix == "tokens":
        return [Part("all files", float(sum(record.tokens for record in filled)), filled)]
    if isinstance(mix, str):
        return [Part(record.prefix, 1.0, [record]) for record in filled]
    members: list[list[Record]] = [[] for _ in mix]
    for record in filled:
        path = Path(record.input).parts
        tables = [number for number, part in enumerate(mix) if _matches(path, Path(part.input).parts)]
        if len(tables) != 1:
            named = " and ".join(mix[number].title for number in tables) or "no table"
            raise CptainError(f"data.mix: {record.input} is matched by {named}: exactly one table must match a file")
        members[tables[0]].append(record)
    for part, matched in zip(mix, members, strict=True):
        if not matched:
            raise CptainError(f"data.mix: {part.title} matches no file of data.input that has tokens")
    return [_table(part, matched) for part, matched in zip(mix, members, strict=True)]


def _table(part: MixPart, records: list[Record]) -> Part:
    if part.repeat is None:
        return Part(part.title, part.weight or 0.0, records)
    return Part(part.title, part.repeat * sum(record.tokens for record in records), records, part.repeat)


def blend(mix: str | list[MixPart], records: list[Record]) -> list[tuple[float, Record]]:
    """The files that have tokens, in the order of `records`, each with its weight. Errors are those of `parts`."""
    weights: dict[str, float] = {}
    for part in parts(mix, records):
        tokens = part.tokens
        weights |= {record.prefix: part.weight * record.tokens / tokens for record in part.records}
    return [(weights[record.prefix], record) for record in records if record.tokens]


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches a glob, ** being any depth. By name alone: the text may be gone when training starts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[depth:], pattern[1:]) for depth in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
