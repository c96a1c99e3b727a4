"""The compound commands of a script, followed without running any: loops, conditions, pipelines, functions.

Assignments, loops, conditions and functions are followed as bash would. A program is noted and not started; no file is
written, and none is read but those that the script itself sources. What a condition asks of files is answered with no,
and said (`Reading.assumed`): a script that has not run yet finds no checkpoint.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from cptain.shell_script import tree
from cptain.shell_script.conditions import Condition
from cptain.shell_script.expansion import Expansion
from cptain.shell_script.leave import Leave
from cptain.shell_script.quoting import Unread
from cptain.shell_script.syntax import Parser
from cptain.shell_script.values import is_known, shown, unknown
from cptain.shell_script.variables import Value, Variables

_MOST_COMMANDS = 200_000


@dataclass(frozen=True)
class Started:
    """A program that the script would start.

    Attributes:
        line: of the script.
        words: its name and arguments.
    """

    line: int
    words: list[str]


@dataclass
class Reading:
    """What is found while a script is followed.

    Attributes:
        started: programs, in order.
        assumed: what was taken for granted, each with its line.
        printed: what the commands that are followed now have printed.
        sourced: files that were read beside the script.
        commands: how many were followed.
        ended: where the script ends before its last line.
    """

    started: list[Started] = field(default_factory=list)
    assumed: dict[str, None] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)
    sourced: list[str] = field(default_factory=list)
    commands: int = 0
    ended: str = ""


def _sets(node: tree.Node) -> bool:
    """Whether a command sets variables, which an argument may hang on."""
    if isinstance(node, tree.Simple):
        return bool(node.assignments) or any(isinstance(word, tree.Assignment) for word in node.words)
    return isinstance(node, tree.Group)


@dataclass
class Control:
    """Follows a script.

    Attributes:
        folder: where relative paths of `source` begin.
        files: what the scheduler leaves for a job, by the name that the script has for it.
        programs: what a program prints on the cluster, where that follows from the scheduler's directives.
        variables, functions: the script's own.
        reading: what is found.
        depth: of functions, sourced files and commands in commands.
        line: the script's line that is followed now.
        nested: how deep in text that is not the script's own, whose lines do not count.
        unsure: the last condition's answer is a guess.
        program: the program whose success that is.
        lines: what is left of the input of the loop that `read` reads.
    """

    folder: Path
    files: dict[str, str] = field(default_factory=dict)
    programs: dict[str, str] = field(default_factory=dict)
    variables: Variables = field(default_factory=Variables)
    functions: dict[str, tree.Node] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)
    depth: int = 0
    line: int = 0
    nested: int = 0
    unsure: bool = False
    program: str = ""
    lines: list[str] | None = None

    def __post_init__(self) -> None:
        self.words = Expansion(self.variables, self.output_of)

    def follow(self, text: str) -> None:
        """Follow a script's text, to its end or its exit.

        Raises:
            Unread: what cptain cannot read, with its line.
        """
        try:
            self.variables.note_assigned(text)
            self.run(Parser(text).parse(), None)
        except Leave:
            pass
        except Unread as error:
            if str(error).startswith("line "):
                raise
            raise Unread(f"line {self.line}: cptain cannot read this: {error}") from None
        except RecursionError:
            raise Unread(f"line {max(1, self.line)}: commands in one another without end") from None

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Commands of another text than the script's, whose lines are not the script's."""
        self.nested += 1
        try:
            yield
        finally:
            self.nested -= 1

    def assume(self, what: str) -> None:
        """Note what was taken for granted."""
        self.reading.assumed.setdefault(f"line {self.line}: {what}")

    def output_of(self, text: str) -> str:
        """What the commands of $(…) print, without the last line ends."""
        if text.strip().startswith("<"):
            content = self.files.get(self.words.text(text.strip()[1:].strip()))
            return content.rstrip("\n") if content is not None else unknown(f"$({text.strip()})")
        inner, tree = self.apart(), Parser(text).parse()
        with suppress(Leave), inner.elsewhere():
            inner.run(tree, None)
        self.variables.status = inner.variables.status
        return "".join(inner.reading.printed).rstrip("\n")

    def apart(self) -> "Control":
        """A shell with variables of its own, which notes where this one does; what it prints is its own."""
        if self.depth > 60:
            raise Unread("commands in commands without end")
        values: dict[str, Value] = {
            name: value if isinstance(value, str) else value.copy() for name, value in self.variables.values.items()
        }
        variables = replace(self.variables, values=values, arguments=list(self.variables.arguments), status=0)
        reading = replace(self.reading, printed=[])
        shell = type(self)(
            self.folder, self.files, self.programs, variables, dict(self.functions), reading, self.depth + 1
        )
        shell.line, shell.nested = self.line, self.nested
        return shell

    def run(self, node: tree.Node, text: str | None) -> bool:
        """Follow a command; `text` is its standard input. Gives whether it succeeds."""
        self.reading.commands += 1
        if self.reading.commands > _MOST_COMMANDS:
            raise Unread(f"more than {_MOST_COMMANDS:,} commands: a loop without end?")
        self.line = self.line if self.nested else node.line
        follow: Callable[[tree.Node, str | None], bool] = getattr(self, f"_{type(node).__name__.lower()}")
        if isinstance(node, tree.Simple):
            return follow(node, text)
        text = self._input(node, text)
        kept = len(self.reading.printed)
        done = follow(node, text)
        if self._is_redirected(node):
            del self.reading.printed[kept:]
        return done

    def _is_redirected(self, node: tree.Node) -> bool:
        return any(one.operator.lstrip("1") in (">", ">>", ">|", "&>", "&>>") for one in node.redirects)

    def _input(self, node: tree.Node, text: str | None) -> str | None:
        for redirect in node.redirects:
            if redirect.operator == "<<":
                text = redirect.word if redirect.literal else self.words.here_document(redirect.word)
            elif redirect.operator == "<<<":
                text = self.words.text(redirect.word) + "\n"
            elif redirect.operator == "<":
                if (printed := self.words.redirected(redirect.word)) is not None:
                    text = printed
                    continue
                file = self.words.text(redirect.word)
                text = self.files.get(file, unknown(f"$(< {shown(file)})"))
        return text

    def _chain(self, node: tree.Chain, text: str | None) -> bool:
        done = True
        for joint, part in node.parts:
            if joint != ";" and self.program and _sets(part):
                self.assume(f"that {self.program:.80} succeeds")
            if joint == ";" or done == (joint == "&&"):
                guess, self.unsure, self.program = self.unsure, False, ""
                try:
                    done = self.run(part, text)
                except Leave as leave:
                    if not (joint != ";" and guess and leave.how == "exit"):
                        raise
                    self.assume("an exit, if a check of files or of the cluster fails: taken as passed")
                    done = True
        self.variables.status = int(not done)
        return done

    def _pipeline(self, node: tree.Pipeline, text: str | None) -> bool:
        done = True
        for place, command in enumerate(node.commands):
            inner = self.apart()  # each has variables of its own, the last too
            try:
                done = inner.run(command, text)
            except Leave:
                done = not inner.variables.status
            text = "".join(inner.reading.printed)
            if place == len(node.commands) - 1:
                self.reading.printed.append(text)
                self.unsure, self.program = inner.unsure, inner.program
        return done != node.negated

    def _if(self, node: tree.If, text: str | None) -> bool:
        guessed = False
        for condition, body in node.branches:
            self.unsure, self.program = False, ""
            chosen = condition is None or self.run(condition, text)
            guessed = guessed or self.unsure
            if self.program:
                self.assume(f"that {self.program:.80} succeeds")
            self.unsure = False
            if not chosen:
                continue
            try:
                return self.run(body, text)
            except Leave as leave:
                if not (guessed and leave.how == "exit"):
                    raise
                self.assume("an exit, if a check of files or of the cluster fails: taken as passed")
        return True

    def _for(self, node: tree.For, text: str | None) -> bool:
        words = node.words
        values = (
            self.variables.arguments if words is None else [one for word in words for one in self.words.fields(word)]
        )
        for value in list(values):
            self.variables.assign(node.name, value)
            if not self._turn(node.body, text):
                break
        return True

    def _turn(self, body: tree.Node | None, text: str | None) -> bool:
        """One turn of a loop; False where it was the last."""
        try:
            self.run(body, text) if body else None
        except Leave as leave:
            if leave.how not in ("break", "continue"):
                raise
            if leave.count > 1:
                raise Leave(leave.how, leave.count - 1) from None
            return leave.how == "continue"
        return True

    def _loop(self, node: tree.Loop, text: str | None) -> bool:
        if node.counted:
            begin, condition, step = node.counted
            self.words.arithmetic(begin)
            while not condition or self._positive(self.words.arithmetic(condition)):
                if not self._turn(node.body, text):
                    break
                self.words.arithmetic(step)
                self.reading.commands += 1
            return True
        lines = list((text or "").splitlines(keepends=True))
        self.lines, outer = lines, self.lines
        while True:
            self.unsure = False
            going = self.run(node.condition, text) != node.until if node.condition else False
            if not going or self.unsure:
                if self.unsure:
                    self.assume("a loop whose end only the cluster knows: passed over")
                break
            if not self._turn(node.body, text):
                break
        self.lines, self.unsure = outer, False
        return True

    def _positive(self, value: str) -> bool:
        if not is_known(value):
            self.assume(f"{shown(value)}: known on the cluster only: taken as 0")
            self.unsure = True
            return False
        return int(value) != 0

    def _case(self, node: tree.Case, text: str | None) -> bool:
        value = self.words.text(node.word)
        for patterns, body in node.branches:
            for pattern in patterns:
                answer = self._condition([node.word, "==", pattern], True)
                if answer or (answer is None and pattern == "*"):
                    return self.run(body, text)
        if not is_known(value):
            self.assume(f"case {shown(value)}: known on the cluster only: none of its patterns is taken")
        return True

    def _function(self, node: tree.Function, text: str | None) -> bool:
        if node.body:
            self.functions[node.name] = node.body
        return True

    def _group(self, node: tree.Group, text: str | None) -> bool:
        if node.body is None:
            return True
        if not node.apart:
            return self.run(node.body, text)
        inner = self.apart()
        with suppress(Leave):
            inner.run(node.body, text)
        self.reading.printed += inner.reading.printed
        return not inner.variables.status

    def _arithmetic(self, node: tree.Arithmetic, text: str | None) -> bool:
        return self._positive(self.words.arithmetic(node.expression))

    def _test(self, node: tree.Test, text: str | None) -> bool:
        return self.answer(node.words, True)

    def answer(self, words: list[str], double: bool) -> bool:
        """A test's answer; what only the cluster knows is no, and noted."""
        found = self._condition(words, double)
        if found is not None:
            return found
        said = " ".join(shown(self.words.text(word)) if double else shown(word) for word in words)
        denied = bool(words) and words[0] == "!"
        self.assume(f"whether {said}: known on the cluster only: taken as {'yes' if denied else 'no'}")
        self.unsure = True
        return denied

    def _condition(self, words: list[str], double: bool) -> bool | None:
        def same(word: str) -> str:
            return word

        def narrow(word: str, value: str) -> None:
            name = word.strip('"').removeprefix("${").removeprefix("$").removesuffix("}")
            if name.isidentifier():
                self.variables.assign(name, value)
                self.assume(f"{name} stands for every file {shown(value)}, of which the cluster knows which are there")

        def number(word: str) -> str:
            return self.words.arithmetic(word if double else word.strip() or "0")

        text, pattern = (self.words.text, self.words.pattern) if double else (same, same)
        condition = Condition(words, double, text, pattern, number, self._is_set, narrow)
        return condition.result()

    def _is_set(self, name: str) -> bool:
        return self.variables.get(name) is not None

    def source(self, name: str, arguments: list[str]) -> bool:
        """Follow a file that the script sources, or starts with bash; one that is not here is noted."""
        raise NotImplementedError

    def _simple(self, node: tree.Simple, text: str | None) -> bool:
        raise NotImplementedError
