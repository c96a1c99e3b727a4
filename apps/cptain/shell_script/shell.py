"""A script, followed command by command without running any: which programs it would start, with which arguments.

A program is noted and not started; no file is written, and none is read but those that the script itself sources.
"""

import re
from contextlib import suppress
from dataclasses import dataclass

from cptain.shell_script import tree
from cptain.shell_script.builtins import BUILTINS, TRANSPARENT
from cptain.shell_script.control import Control, Started
from cptain.shell_script.leave import Leave
from cptain.shell_script.programs import output
from cptain.shell_script.quoting import Unread
from cptain.shell_script.syntax import Parser
from cptain.shell_script.values import is_known, shown
from cptain.shell_script.variables import Value

_MOST_SOURCED = 1 << 20  # bytes of a sourced file: a table of settings, not a program


@dataclass
class Shell(Control):
    """Follows a script: its simple commands; `Control` has the others."""

    def assign(self, one: tree.Assignment) -> None:
        """An assignment of the script."""
        variables = self.variables
        if one.words is not None:
            kept = variables.values.get(one.name) if one.adds else None
            variables.values.pop(one.name, None) if not one.adds else None
            variables.assign(one.name, self._array(one.words, kept))
            return
        value = self.words.text(one.word)
        if one.index is not None:
            table = variables.values.get(one.name)
            if isinstance(table, dict):
                key = self.words.text(one.index)
                table[key] = table.get(key, "") + value if one.adds else value
                return
            elements, place = variables.elements(one.name), self.words.integer(one.index)
            if not -len(elements) <= place <= len(elements):
                raise Unread(f"{one.name}[{place}] of an array of {len(elements)}: gaps are not read")
            elements += [""] * (place == len(elements))
            elements[place] = elements[place] + value if one.adds else value
            variables.values[one.name] = elements
            return
        variables.assign(one.name, (variables.get(one.name) or "") + value if one.adds else value)

    def _array(self, words: list[str], kept: Value | None) -> Value:
        if isinstance(kept, dict) or (words and words[0].startswith("[")):
            pairs: dict[str, str] = dict(kept) if isinstance(kept, dict) else {}
            for word in words:
                key, equals, value = word.removeprefix("[").partition("]=")
                if not equals:
                    raise Unread(f"the array element {word}")
                pairs[self.words.text(key)] = self.words.text(value)
            return pairs
        before = [kept] if isinstance(kept, str) else list(kept or [])
        return before + [one for word in words for one in self.words.fields(word)]

    def _simple(self, node: tree.Simple, text: str | None) -> bool:
        declared = [one for one in node.words if isinstance(one, tree.Assignment)]
        words = [one for word in node.words if isinstance(word, str) for one in self.words.fields(word)]
        text = self._input(node, text)
        if not words:
            self.variables.status = 0
            for assignment in node.assignments:
                self.assign(assignment)
            return self.variables.status == 0
        before = {one.name: self.variables.values.get(one.name) for one in node.assignments}
        for assignment in node.assignments:
            self.assign(assignment)
        kept = len(self.reading.printed)
        done = self.call(words, text, declared)
        for name, value in before.items():
            self.variables.values.pop(name, None) if value is None else self.variables.values.update({name: value})
        if self._is_redirected(node):
            del self.reading.printed[kept:]
        self.variables.status = int(not done)
        return done

    def call(self, words: list[str], text: str | None, declared: list[tree.Assignment] | None = None) -> bool:
        """A command by its name: a function, a builtin of the shell, or a program, which is noted."""
        name = words[0]
        if function := self.functions.get(name):
            if self.depth > 60:
                raise Unread(f"{name} calls itself without end")
            arguments, self.variables.arguments = self.variables.arguments, words[1:]
            self.depth += 1
            try:
                return self.run(function, text)
            except Leave as leave:
                if leave.how != "return":
                    raise
                return self.variables.status == 0
            finally:
                self.variables.arguments, self.depth = arguments, self.depth - 1
        if builtin := BUILTINS.get(name):
            return builtin(self, words[1:], text, declared or [])
        if name in TRANSPARENT and len(words) > 1 and not words[1].startswith("-"):
            return self.call(words[1:], text)
        self.reading.started.append(Started(self.line, words))
        self._inner_script(words)
        self.unsure, self.program = True, shown(" ".join(words))  # whether it succeeds
        if (known := self.programs.get(" ".join(words))) is not None:
            self.reading.printed.append(known)
        else:
            self.reading.printed.append(output(words, text, self.files.get))
        return True

    def _inner_script(self, words: list[str]) -> None:
        """Follow what a program is given to run in a shell: bash -c "…", ssh HOST "…", srun bash FILE."""
        shells = [place for place, word in enumerate(words) if word.rpartition("/")[2] in ("bash", "sh")]
        inner = self.apart()
        with suppress(Leave), inner.elsewhere():
            for place in shells:
                rest = words[place + 1 :]
                while rest and rest[0].startswith("-") and not re.fullmatch(r"-\w*c", rest[0]):
                    rest = rest[1:]
                if rest and rest[0].startswith("-"):
                    inner.variables.arguments = rest[3:]
                    inner.run(Parser(rest[1]).parse() if rest[1:] else tree.Chain(0), None)
                elif rest:
                    inner.source(rest[0], rest[1:])
                return
            for word in words[1:]:
                if "pretrain_gpt.py" in word and any(blank in word for blank in " \n"):
                    inner.run(Parser(word).parse(), None)

    def source(self, name: str, arguments: list[str]) -> bool:
        """Follow a file that the script sources, or starts with bash; one that is not here is noted."""
        content = self._sourced(name)
        if content is None:
            self.assume(f"{shown(name)} is not here to be read: taken to set nothing that matters")
            return True
        kept, line = self.variables.arguments, self.line
        self.variables.arguments = arguments or kept
        if self.depth > 60:
            raise Unread(f"{name} sources itself without end")
        self.depth += 1
        self.reading.sourced.append(name)
        try:
            with self.elsewhere():
                self.variables.note_assigned(content)
                self.run(Parser(content).parse(), None)
        except Leave as leave:
            if leave.how != "return":
                raise
        except Unread as error:
            raise Unread(f"line {line}: it sources {name}: {error}") from None
        finally:
            self.variables.arguments, self.line, self.depth = kept, line, self.depth - 1
        return True

    def _sourced(self, name: str) -> str | None:
        """The text of a file that the script sources, by its path, or below the script's folder or one above it."""
        for folder in (self.folder, *self.folder.parents) if is_known(name) else ():
            with suppress(OSError, ValueError):
                file = folder / name
                if file.is_file() and file.stat().st_size <= _MOST_SOURCED:
                    return file.read_text(encoding="utf-8")
        return None
