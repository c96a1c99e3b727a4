"""The start of pretrain_gpt.py in a script, and its arguments, each with the line that it stands on."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from cptain.errors import CptainError, bad_usage
from cptain.shell_script.control import Reading
from cptain.shell_script.directives import Directives, read_directives
from cptain.shell_script.quoting import Unread
from cptain.shell_script.shell import Shell
from cptain.shell_script.values import MARKS, shown, unknowns

TRAINER = "pretrain_gpt.py"
_LARGEST = 4 << 20  # bytes; Swallow's longest has 50 kB


@dataclass(frozen=True)
class Argument:
    """One of Megatron's arguments.

    Attributes:
        flag: with its dashes.
        values: what follows it; a switch has none.
        line: of the script.
    """

    flag: str
    values: list[str]
    line: int

    @property
    def is_list(self) -> bool:
        """Whether it takes any number of values."""
        return self.flag.endswith("data-path")

    def __str__(self) -> str:
        return shown(" ".join([self.flag, *self.values]))


@dataclass
class Script:
    """What a script was found to do.

    Attributes:
        file: the script.
        arguments: of pretrain_gpt.py.
        line: where it is started.
        others: lines of further starts of it.
        directives: the scheduler's.
        reading: how the script was followed.
        extra: words among the arguments that only the cluster knows, and that may be any.
    """

    file: Path
    arguments: list[Argument]
    line: int
    others: list[int] = field(default_factory=list)
    directives: Directives = field(default_factory=Directives)
    reading: Reading = field(default_factory=Reading)
    extra: list[str] = field(default_factory=list)

    def value(self, flag: str) -> str | None:
        """The value of an argument, the last of several as Megatron takes it; None where it is not given."""
        return next((" ".join(one.values) for one in reversed(self.arguments) if one.flag == flag), None)


def read_script(file: Path, given: tuple[str, ...] = (), variables: tuple[str, ...] = ()) -> Script:
    """Follow a script and find the trainer that it starts.

    Args:
        file: the script.
        given: its own arguments, $1 and on.
        variables: NAME=VALUE, of the environment that it is started in.

    Raises:
        CptainError: it cannot be read (exit status 2), or starts no pretrain_gpt.py.
    """
    text = _text(file)
    directives = read_directives(text)
    shell = Shell(file.resolve().parent, programs=directives.programs())
    path = str(file.resolve())
    shell.variables.script, shell.variables.arguments = path, list(given)
    shell.variables.values.update({**directives.variables(), "BASH_SOURCE": [path]})
    for one in variables:
        name, equals, value = one.partition("=")
        if not (equals and name.isidentifier()):
            bad_usage(f"-v {one}: allowed: NAME=VALUE")
        shell.variables.values[name] = value
    for name, content in directives.files().items():
        mark = f"/{name}"  # a name that no file of the script's has
        shell.variables.values[name[1:]] = mark
        shell.files[mark] = content
    try:
        shell.follow(text)
    except Unread as error:
        raise CptainError(f"{file}: {error}", 2) from None
    starts = [one for one in shell.reading.started if any(_is_trainer(word) for word in one.words)]
    if not starts:
        raise CptainError(f"{file}: it starts no {TRAINER}{_what_instead(shell.reading)}")
    first = starts[0]
    place = next(number for number, word in enumerate(first.words) if _is_trainer(word))
    arguments, extra = _arguments(first.words[place + 1 :], text, first.line, file)
    others = [one.line for one in starts[1:]]
    return Script(file, arguments, first.line, others, directives, shell.reading, extra)


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST:
            bad_usage(f"{file}: no shell script: over {_LARGEST >> 20} MB")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        bad_usage(f"{file}: cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}")
    if "\0" in text or MARKS & set(text):
        bad_usage(f"{file}: no shell script: it holds characters that no text has")
    return text


def _is_trainer(word: str) -> bool:
    return word.rpartition("/")[2] == TRAINER


def _what_instead(reading: Reading) -> str:
    """What the script starts in its place, or where it ends, for the error."""
    quiet = {"module", "mkdir", "basename", "dirname", "cat", "wc", "head", "awk", "cut", "grep", "sed", "date", "rm"}
    found = dict.fromkeys(shown(" ".join(one.words[:3])) for one in reading.started if one.words[0] not in quiet)
    said = "; it starts " + ", ".join(f"{one:.50}" for one in list(found)[:4]) if found else ""
    if reading.ended:
        said += f"; it ends at {reading.ended}: give its own arguments after FILE, if it takes any"
    return said


def _arguments(words: list[str], text: str, line: int, file: Path) -> tuple[list[Argument], list[str]]:
    found: list[Argument] = []
    extra: list[str] = []
    lines = text.splitlines()
    for word in words:
        if re.match(r"--\w", word):
            flag, equals, value = word.partition("=")
            found.append(Argument(flag, [value] if equals else [], _line_of(flag, lines, line)))
        elif unknowns(word) == [shown(word)] and (not found or (found[-1].values and not found[-1].is_list)):
            extra.append(shown(word))
        elif found:
            found[-1].values.append(word)
        elif word.strip():
            raise CptainError(f"{file}: line {line}: {shown(word)!r:.60} after {TRAINER} is no argument of Megatron's")
    return found, extra


def _line_of(flag: str, lines: list[str], start: int) -> int:
    """The line that an argument stands on: the first from the start of the trainer on, or the last before it."""
    pattern = re.compile(rf"(?<![\w-]){re.escape(flag)}(?![\w-])")
    there = [number for number, one in enumerate(lines, 1) if pattern.search(one.partition(" #")[0])]
    there = [number for number in there if not lines[number - 1].lstrip().startswith("#")]
    return next((number for number in there if number >= start), there[-1] if there else start)
