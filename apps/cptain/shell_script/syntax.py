"""A shell script as a tree: the grammar of bash, as far as scripts that start trainings use it.

Words stay as they are written; `cptain.shell_script.expansion` makes values of them. What is not known here is refused
by line, and never passed over: a construction that was skipped would be a training with other arguments.
"""

import re
from bisect import bisect_right

from cptain.shell_script.quoting import Unread, end_of_bracket, end_of_part
from cptain.shell_script.tree import (
    Arithmetic,
    Assignment,
    Case,
    Chain,
    For,
    Function,
    Group,
    If,
    Loop,
    Node,
    Pipeline,
    Redirect,
    Simple,
    Test,
)

_NAME = r"[A-Za-z_]\w*"
_ASSIGNS = re.compile(rf"({_NAME})(?:\[([^\]]*)\])?(\+?)=")
_ENDS_WORD = " \t\n;|&<>()"
_REDIRECT = re.compile(r"(\d*|\{\w+\})(<<<|<<-|<<|<>|<&|>&|>>|>\||<|>|&>>|&>)")


class Parser:
    """Reads one script. `parse` is the way in.

    Args:
        text: the script.
    """

    def __init__(self, text: str) -> None:
        self._text, self._at = text.replace("\r\n", "\n"), 0
        if self._text.endswith("\\") and not self._text.endswith("\\\\"):
            self._text = self._text[:-1]  # a line that goes on after the end
        self._starts = [0, *(place + 1 for place, one in enumerate(self._text) if one == "\n")]
        self._pending: list[tuple[Redirect, str, bool]] = []  # here-documents whose text follows the line

    @property
    def line(self) -> int:
        """The line that is being read, from 1."""
        return bisect_right(self._starts, self._at)

    def parse(self) -> Chain:
        """The whole script.

        Raises:
            Unread: with the line in its message.
        """
        try:
            tree = self._list(())
            if self._at < len(self._text):
                raise Unread(f"{self._text[self._at : self._at + 20].splitlines()[0]!r} out of place")
        except Unread as error:
            raise Unread(f"line {self.line}: cptain cannot read this: {error}") from None
        return tree

    def _blank(self, newlines: bool = False) -> None:
        """Skip blanks, continued lines and comments, and with `newlines` line ends."""
        while self._at < len(self._text):
            if self._text[self._at] in " \t":
                self._at += 1
            elif self._text.startswith("\\\n", self._at):
                self._at += 2
            elif self._text[self._at] == "#" and (self._at == 0 or self._text[self._at - 1] in " \t\n;()|&"):
                self._at = (self._text.find("\n", self._at) + len(self._text) + 1) % (len(self._text) + 1)
            elif newlines and self._text[self._at] == "\n":
                self._newline()
            else:
                return

    def _newline(self) -> None:
        self._at += 1
        for redirect, delimiter, tabs in self._pending:
            lines = []
            while True:
                if self._at >= len(self._text):
                    raise Unread(f"<<{delimiter} without its end")
                stop = (self._text.find("\n", self._at) + len(self._text) + 1) % (len(self._text) + 1)
                line = self._text[self._at : stop]
                self._at = min(stop + 1, len(self._text))
                line = line.lstrip("\t") if tabs else line
                if line == delimiter:
                    break
                lines.append(line + "\n")
            redirect.word = "".join(lines)
        self._pending = []

    def _starts_with(self, text: str) -> bool:
        return self._text.startswith(text, self._at)

    def _peek(self) -> str:
        """The word that comes next, as written; empty where an operator does."""
        place = self._at
        while place < len(self._text) and self._text[place] not in _ENDS_WORD + "\"'`$\\":
            place += 1
        if place < len(self._text) and self._text[place] not in _ENDS_WORD:
            return ""
        return self._text[self._at : place]

    def _word(self) -> str:
        """Read a word as it is written."""
        begin = self._at
        if self._text[begin : begin + 2] in ("<(", ">("):  # the name of a pipe, from or to these commands
            self._at = end_of_bracket(self._text, begin + 1)
        while self._at < len(self._text) and self._text[self._at] not in _ENDS_WORD:
            if self._text.startswith("\\\n", self._at):
                break
            self._at = end_of_part(self._text, self._at)
        if begin == self._at:
            raise Unread(f"a word is missing before {self._text[begin : begin + 10]!r}")
        return self._text[begin : self._at] + (self._glued() if self._starts_with("\\\n") else "")

    def _glued(self) -> str:
        """What of the next line belongs to a word that a backslash at the line's end interrupts."""
        self._at += 2
        more = self._at < len(self._text) and self._text[self._at] not in _ENDS_WORD
        return self._word() if more else ""

    def _expect(self, word: str) -> None:
        self._blank(newlines=True)
        if self._peek() != word:
            raise Unread(f"{word} is missing")
        self._at += len(word)

    def _list(self, ends: tuple[str, ...]) -> Chain:
        """Commands up to one of the words `ends`, a ) or a ;;, none of which is read."""
        chain, joint = Chain(self.line), ";"
        while True:
            self._blank(newlines=True)
            if self._at >= len(self._text) or self._starts_with(")") or self._starts_with(";;"):
                return chain
            if self._peek() in ends:
                return chain
            chain.parts.append((joint, self._pipeline()))
            self._blank()
            joint = next((one for one in ("&&", "||") if self._starts_with(one)), ";")
            if joint != ";":
                self._at += 2
            elif self._starts_with("&") or (self._starts_with(";") and not self._starts_with(";;")):
                self._at += 1

    def _pipeline(self) -> Node:
        pipeline = Pipeline(self.line)
        while self._peek() in ("!", "time"):
            pipeline.negated ^= self._peek() == "!"
            self._word()
            self._blank()
            if self._peek() == "-p":
                self._word()
                self._blank()
        while True:
            pipeline.commands.append(self._command())
            self._blank()
            if not self._starts_with("|") or self._starts_with("||"):
                break
            self._at += 2 if self._starts_with("|&") else 1
            self._blank(newlines=True)
        return pipeline if len(pipeline.commands) > 1 or pipeline.negated else pipeline.commands[0]

    def _command(self) -> Node:
        line, word = self.line, self._peek()
        compound = {
            "if": self._if, "for": self._for, "while": self._while, "until": self._while, "case": self._case,
            "{": self._group, "[[": self._test, "function": self._function,
        }  # fmt: skip
        if word in ("select", "coproc"):
            raise Unread(word)
        if self._starts_with("(("):
            node: Node = self._arithmetic(line)
        elif self._starts_with("("):
            self._at += 1
            node = Group(line, body=self._list(()), apart=True)
            self._close(")")
        elif word in compound:
            node = compound[word](line)
        elif word and word[-1] != "=" and re.match(rf"{re.escape(word)}\s*\(\s*\)", self._text[self._at :]):
            node = self._function(line)
        else:
            return self._simple(line)
        self._blank()
        while redirect := self._redirect():
            node.redirects.append(redirect)
            self._blank()
        return node

    def _close(self, bracket: str) -> None:
        self._blank(newlines=True)
        if not self._starts_with(bracket):
            raise Unread(f"{bracket} is missing")
        self._at += len(bracket)

    def _if(self, line: int) -> Node:
        node = If(line)
        self._word()
        while True:
            condition = self._list(("then",))
            self._expect("then")
            node.branches.append((condition, self._list(("elif", "else", "fi"))))
            if (word := self._peek()) not in ("elif", "else", "fi"):
                raise Unread("fi is missing")
            self._word()
            if word == "else":
                node.branches.append((None, self._list(("fi",))))
                self._expect("fi")
                return node
            if word == "fi":
                return node

    def _body(self) -> Node:
        self._blank()
        if self._starts_with(";"):
            self._at += 1
        self._expect("do")
        body = self._list(("done",))
        self._expect("done")
        return body

    def _for(self, line: int) -> Node:
        self._word()
        self._blank()
        if self._starts_with("(("):
            parts = [part.strip() for part in self._arithmetic(line).expression.split(";")]
            if len(parts) != 3:
                raise Unread("for (( without its three parts")
            return Loop(line, body=self._body(), counted=(parts[0], parts[1], parts[2]))
        name = self._word()
        words: list[str] | None = None
        self._blank(newlines=True)
        if self._peek() == "in":
            self._word()
            words = []
            self._blank()
            while self._at < len(self._text) and self._text[self._at] not in "\n;":
                words.append(self._word())
                self._blank()
        return For(line, name=name, words=words, body=self._body())

    def _while(self, line: int) -> Node:
        until = self._word() == "until"
        condition = self._list(("do",))
        return Loop(line, condition=condition, body=self._body(), until=until)

    def _case(self, line: int) -> Node:
        self._word()
        self._blank()
        node = Case(line, word=self._word())
        self._expect("in")
        while True:
            self._blank(newlines=True)
            if self._peek() == "esac":
                self._word()
                return node
            if self._starts_with("("):
                self._at += 1
            patterns = []
            while True:
                self._blank()
                patterns.append(self._word())
                self._blank()
                self._at += 1
                if self._text[self._at - 1 : self._at] == ")":
                    break
                if self._text[self._at - 1 : self._at] != "|":
                    raise Unread("case without its )")
            node.branches.append((patterns, self._list(("esac",))))
            if self._starts_with(";;&"):
                raise Unread(";;&")
            if self._starts_with(";;"):
                self._at += 2

    def _group(self, line: int) -> Node:
        self._at += 1
        body = self._list(("}",))
        self._expect("}")
        return Group(line, body=body)

    def _function(self, line: int) -> Node:
        if self._peek() == "function":
            self._word()
            self._blank()
        name = self._word()
        self._blank()
        if self._starts_with("("):
            self._at += 1
            self._close(")")
        self._blank(newlines=True)
        return Function(line, name=name, body=self._command())

    def _arithmetic(self, line: int) -> Arithmetic:
        end = end_of_bracket(self._text, self._at)
        expression = self._text[self._at + 2 : end - 2]
        if self._text[end - 2 : end] != "))":
            raise Unread("(( without its ))")
        self._at = end
        return Arithmetic(line, expression=expression)

    def _test(self, line: int) -> Node:
        self._at += 2
        node = Test(line)
        while True:
            self._blank(newlines=True)
            if self._peek() == "]]":
                self._at += 2
                return node
            operator = next((one for one in ("&&", "||", "(", ")", "<", ">") if self._starts_with(one)), None)
            if operator:
                self._at += len(operator)
                node.words.append(operator)
            elif node.words and node.words[-1] == "=~":
                node.words.append(self._regex())
            else:
                node.words.append(self._word())

    def _regex(self) -> str:
        begin = self._at
        while self._at < len(self._text) and self._text[self._at] not in " \t\n":
            self._at = end_of_part(self._text, self._at)
        return self._text[begin : self._at]

    def _redirect(self) -> Redirect | None:
        match = _REDIRECT.match(self._text, self._at)
        if not match:
            return None
        if self._text.startswith("(", match.end()) and match[2] in "<>":
            return None  # <(…), an argument
        self._at = match.end()
        self._blank()
        word = self._word()
        redirect = Redirect(match[2], word)
        if match[2] in ("<<", "<<-"):
            delimiter = re.sub(r"[\\'\"]", "", word)
            redirect.operator, redirect.literal = "<<", delimiter != word
            self._pending.append((redirect, delimiter, match[2] == "<<-"))
        return redirect

    def _array(self) -> list[str]:
        self._at += 1
        words: list[str] = []
        while True:
            self._blank(newlines=True)
            if self._starts_with(")"):
                self._at += 1
                return words
            words.append(self._word())

    def _assignment(self) -> Assignment | None:
        match = _ASSIGNS.match(self._text, self._at)
        if not match:
            return None
        self._at = match.end()
        if self._starts_with("("):
            return Assignment(match[1], match[2], bool(match[3]), "", self._array())
        empty = self._at >= len(self._text) or self._text[self._at] in _ENDS_WORD
        return Assignment(match[1], match[2], bool(match[3]), "" if empty else self._word())

    def _simple(self, line: int) -> Simple:
        node = Simple(line)
        declares = False
        while True:
            self._blank()
            if self._at >= len(self._text):
                break
            if redirect := self._redirect():
                node.redirects.append(redirect)
                continue
            if self._text[self._at] in "\n;|&)":  # and no redirection, which <( and >( are not
                break
            if (not node.words or declares) and (assignment := self._assignment()):
                (node.words if declares else node.assignments).append(assignment)
                continue
            node.words.append(self._word())
            declares = declares or node.words[0] in ("export", "local", "declare", "typeset", "readonly")
        if not (node.words or node.assignments or node.redirects):
            raise Unread(f"{self._text[self._at : self._at + 10]!r}: a command is missing")
        return node
