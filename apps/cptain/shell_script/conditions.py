"""[ … ] and [[ … ]]: tests of a script, of which those of files are known on the cluster only."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from cptain.shell_script.quoting import Unread
from cptain.shell_script.values import ANY, is_known, matched

_OF_FILES = set("abcdefghkprstuwxGLNOS")
_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": int.__eq__, "-ne": int.__ne__, "-lt": int.__lt__, "-le": int.__le__, "-gt": int.__gt__, "-ge": int.__ge__,
}  # fmt: skip


@dataclass
class Condition:
    """Evaluates the words of one test.

    Attributes:
        words: between the brackets, as written in [[ ]], expanded in [ ].
        double: whether the brackets are double.
        text: what a word becomes.
        pattern: what a word becomes as a pattern.
        number: what an operand of -eq and its like becomes.
        is_set: whether a variable is set, for -v.
        narrow: told of a word whose value the test has made more exact (`values.matched`).
    """

    words: list[str]
    double: bool
    text: Callable[[str], str]
    pattern: Callable[[str], str]
    number: Callable[[str], str]
    is_set: Callable[[str], bool]
    narrow: Callable[[str, str], None]
    at: int = 0

    def result(self) -> bool | None:
        """True or False; None where only the cluster knows.

        Raises:
            Unread: a test that cptain does not know.
        """
        if not self.words:
            return False
        found = self._any()
        if self.at < len(self.words):
            raise Unread(f"the test {' '.join(self.words)[:60]!r}")
        return found

    def _peek(self) -> str:
        return self.words[self.at] if self.at < len(self.words) else ""

    def _any(self) -> bool | None:
        left = self._all()
        while self._peek() == ("||" if self.double else "-o"):
            self.at += 1
            right = self._all()
            left = True if left or right else None if None in (left, right) else False
        return left

    def _all(self) -> bool | None:
        left = self._not()
        while self._peek() == ("&&" if self.double else "-a"):
            self.at += 1
            right = self._not()
            left = False if False in (left, right) else None if None in (left, right) else True
        return left

    def _not(self) -> bool | None:
        if self._peek() == "!" and self.at + 1 < len(self.words):
            self.at += 1
            inner = self._not()
            return None if inner is None else not inner
        if self._peek() in ("(", "\\(") and self.double:
            self.at += 1
            inner = self._any()
            self.at += 1
            return inner
        return self._one()

    def _one(self) -> bool | None:
        rest = self.words[self.at :]
        ends = ("&&", "||", ")") if self.double else ("-a", "-o")
        stop = next((place for place, word in enumerate(rest) if word in ends and place), len(rest))
        operands = rest[:stop]
        self.at += len(operands)
        if len(operands) == 1:
            value = self.text(operands[0])
            return bool(value) if is_known(value) else None
        if len(operands) == 2:
            return self._unary(operands[0], operands[1])
        if len(operands) == 3:
            return self._binary(*operands)
        raise Unread(f"the test {' '.join(operands)[:60]!r}")

    def _unary(self, operator: str, word: str) -> bool | None:
        if operator == "-v":
            return self.is_set(self.text(word))
        if operator in ("-n", "-z"):
            value = self.text(word)
            # A variable of the environment: it may be there, but a script that asks has an answer for its absence.
            known = value if is_known(value) else re.sub(r"\ue001\$\w+\ue002", "", value)
            return (bool(known) == (operator == "-n")) if is_known(known) else None
        if operator[:1] == "-" and operator[1:] in _OF_FILES:
            return None if self.text(word) else False
        raise Unread(f"the test {operator} {word}")

    def _binary(self, word: str, operator: str, other: str) -> bool | None:
        if operator in _NUMBERS:
            left, right = self.number(word), self.number(other)
            if not (is_known(left) and is_known(right)):
                return None
            return _NUMBERS[operator](int(left), int(right))
        value = self.text(word)
        if operator in ("=", "==", "!="):
            if self.double:
                found, narrower = matched(value, self.pattern(other))
                if found and narrower != value:
                    self.narrow(word, narrower)
            else:
                right = self.text(other)
                found = value == right if is_known(value) and is_known(right) else None
            return found if found is None or operator != "!=" else not found
        if not is_known(value) or ANY in value:
            return None
        if operator == "=~":
            return re.search(self.pattern(other).replace("[[:digit:]]", "[0-9]"), value) is not None
        if operator in ("<", ">", "\\<", "\\>"):
            return value < self.text(other) if "<" in operator else value > self.text(other)
        if operator in ("-nt", "-ot", "-ef"):
            return None
        raise Unread(f"the test {word} {operator} {other}")
