"""The shell's own commands, of which those that would change anything outside the script change nothing here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from cptain.shell_script.expansion import cut_at_blanks
from cptain.shell_script.leave import Leave
from cptain.shell_script.programs import printf
from cptain.shell_script.quoting import Unread
from cptain.shell_script.syntax import Parser
from cptain.shell_script.tree import Assignment
from cptain.shell_script.values import shown, unknown, unknowns

if TYPE_CHECKING:
    from cptain.shell_script.shell import Shell

Builtin = Callable[["Shell", list[str], "str | None", "list[Assignment]"], bool]

TRANSPARENT = {"command", "builtin", "exec", "nohup", "time"}
"""Commands that start the one that follows, and show nothing of it."""


def _nothing(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    return True


def _false(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    return False


def _echo(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    end = "\n"
    while words and re.fullmatch(r"-[neE]+", words[0]):
        end = "" if "n" in words[0] else end
        words = words[1:]
    shell.reading.printed.append(" ".join(words) + end)
    return True


def _printf(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    name = words[1] if words[:1] == ["-v"] and len(words) > 2 else ""
    words = words[2:] if name else words
    printed = printf(words) if words and words[0] != "--" else None
    shown_as = printed if printed is not None else unknown(f"$(printf {' '.join(map(shown, words))})")
    if name:
        shell.variables.assign(name, shown_as)
    else:
        shell.reading.printed.append(shown_as)
    return True


def _declare(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    options = "".join(word[1:] for word in words if word.startswith("-"))
    if "n" in options:
        raise Unread("declare -n")
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name.isidentifier():  # export "A=b"
            shell.variables.assign(name, value)
        elif "A" in options and name.isidentifier():
            shell.variables.values.setdefault(name, {})
    for one in declared:
        if "A" in options and one.words is not None:
            shell.variables.values[one.name] = {}
        shell.assign(one if "A" not in options or not one.words else _keyed(one))
        if "i" in options and isinstance(text_of := shell.variables.values[one.name], str):
            shell.variables.assign(one.name, shell.words.arithmetic(text_of))
    return True


def _keyed(one: Assignment) -> Assignment:
    if any(not word.startswith("[") for word in one.words or []):
        raise Unread(f"{one.name}=(…) without keys")
    return one


def _unset(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    for word in words:
        shell.variables.values.pop(word, None)
        if "-f" in words:
            shell.functions.pop(word, None)
    return True


def _set(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    if "--" in words:
        shell.variables.arguments = words[words.index("--") + 1 :]
    elif words and words[0][:1] not in "-+":
        shell.variables.arguments = words
    return True


def _shift(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    count = int(words[0]) if words and words[0].isdigit() else 1
    if count > len(shell.variables.arguments):
        return False
    shell.variables.arguments = shell.variables.arguments[count:]
    return True


def _test(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    return shell.answer(words, double=False)


def _bracket(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    if words[-1:] != ["]"]:
        raise Unread("[ without its ]")
    return shell.answer(words[:-1], double=False)


def _cd(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    folder = next((word for word in words if not word.startswith("-")), "")
    now = shell.variables.get("PWD") or unknown("$PWD")
    shell.variables.assign("PWD", os.path.normpath(folder) if folder.startswith("/") else os.path.join(now, folder))
    return True


def _pwd(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    shell.reading.printed.append((shell.variables.get("PWD") or unknown("$PWD")) + "\n")
    return True


def _leave(how: str) -> Builtin:
    def leave(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
        number = int(words[0]) if words and words[0].isdigit() else None
        if how in ("exit", "return") and number is not None:
            shell.variables.status = number
        if how == "exit":
            shell.reading.ended = f"line {shell.line}: exit {shell.variables.status}"
        raise Leave(how, number or 1)

    return leave


def _eval(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    with shell.elsewhere():
        return shell.run(Parser(" ".join(words)).parse(), text)


def _source(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    return shell.source(words[0], words[1:]) if words else True


def _read(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    """A line of the input: of the loop that it is the condition of, or its own."""
    names, array = [], False
    place = 0
    while place < len(words):
        if words[place].startswith("-"):
            array = array or "a" in words[place]
            place += 2 if words[place][-1] in "pdntu" else 1
            continue
        names.append(words[place])
        place += 1
    lines = shell.lines
    if lines is None:
        lines = (text or "").splitlines(keepends=True)
    if not lines:
        return False
    line = lines.pop(0).rstrip("\n")
    if any(what.startswith("$(<") for what in unknowns(line)):
        shell.unsure = True
        return False
    parts = [one for one in cut_at_blanks(line, shell.variables.get("IFS")) if one]
    if array:
        shell.variables.values[names[0]] = parts
        return True
    for number, name in enumerate(names or ["REPLY"]):
        last = number == len(names or ["REPLY"]) - 1
        value = (
            " ".join(parts[number:])
            if last and number
            else line.strip()
            if last
            else "".join(parts[number : number + 1])
        )
        shell.variables.assign(name, value)
    return True


def _mapfile(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    names = [word for word in words if not word.startswith("-")]
    shell.variables.values[names[-1] if names else "MAPFILE"] = (text or "").splitlines()
    return True


def _let(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    results = [shell.words.arithmetic(word) for word in words]
    return bool(results) and results[-1] != "0"


def _getopts(shell: Shell, words: list[str], text: str | None, declared: list[Assignment]) -> bool:
    shell.assume("getopts: options of the script itself: none is given")
    return False


_WITHOUT_EFFECT = (
    "pushd popd trap wait kill ulimit umask shopt alias unalias hash disown jobs bg fg type enable sleep sync"
)
BUILTINS: dict[str, Builtin] = {
    ":": _nothing, "true": _nothing, "false": _false, "echo": _echo, "printf": _printf, "test": _test, "[": _bracket,
    "unset": _unset, "set": _set, "shift": _shift, "eval": _eval, "source": _source, ".": _source, "read": _read,
    "mapfile": _mapfile, "readarray": _mapfile, "let": _let, "cd": _cd, "pwd": _pwd, "getopts": _getopts,
    **dict.fromkeys(("export", "local", "declare", "typeset", "readonly"), _declare),
    **{how: _leave(how) for how in ("exit", "return", "break", "continue")},
    **dict.fromkeys(_WITHOUT_EFFECT.split(), _nothing),
}  # fmt: skip
