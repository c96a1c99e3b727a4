"""What a shell word becomes: quotes, ${…} in all its forms, $((…)), $(…), splitting at blanks, braces and globs.

As bash does it, with two exceptions: what only the cluster knows is a mark (`cptain.shell_script.values`), and a glob
matches no file but stands for every name that it could match.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cptain.shell_script.arithmetic import evaluate
from cptain.shell_script.quoting import Unread, end_of_bracket, end_of_part
from cptain.shell_script.values import ANY, BEGIN, is_known, literal, regex, shown, unknown, without_suffix
from cptain.shell_script.variables import Variables

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "e": "\x1b"}
_PARAMETER = re.compile(r"([A-Za-z_]\w*|\d+|[@*#?$!-])")
_OPERATION = re.compile(r"(:?[-=+?]|##?|%%?|//?|\^\^?|,,?|:|@)", re.DOTALL)
_LONGEST_TRIMMED = 10_000  # characters; a search for each place where a pattern may begin takes their square
_MOST_WORDS = 100_000
_LITERAL, _EXPANDED, _QUOTED, _BREAK = "literal", "expanded", "quoted", "break"


@dataclass
class Expansion:
    """Makes values of words.

    Attributes:
        variables: the script's.
        output_of: what the commands of $(…) print.
    """

    variables: Variables
    output_of: Callable[[str], str]

    def fields(self, word: str) -> list[str]:
        """The arguments that a word becomes: none, one or more."""
        return [one for braced in _braces(word) for one in self._split(braced)]

    def text(self, word: str) -> str:
        """A word's value where it is not split: in assignments, tests and redirections."""
        return "".join(" " if kind == _BREAK else text for kind, text in self._pieces(word))

    def redirected(self, word: str) -> str | None:
        """What the commands of < <(…) print; None for the name of a file."""
        return self.output_of(word[2:-1]) + "\n" if word.startswith("<(") else None

    def pattern(self, word: str) -> str:
        """A word as a pattern, whose quoted parts match themselves."""
        return "".join(
            re.sub(r"([*?\[\]\\])", r"\\\1", text) if kind == _QUOTED else text for kind, text in self._pieces(word)
        )

    def here_document(self, text: str) -> str:
        """The text of <<, in which $ and ` mean what they do in double quotes."""
        return "".join(piece for _, piece in self._inside_double(text))

    def arithmetic(self, expression: str) -> str:
        """The value of an expression, its $ parts expanded first."""

        def get(name: str) -> str:
            value = self.variables.get(name)
            return "" if value is None and name in self.variables.values else self._outside(name, value)

        return evaluate(self.here_document(expression).replace('"', ""), get, self.variables.assign)

    def integer(self, expression: str) -> int:
        """The value of an expression, which must be known here."""
        value = self.arithmetic(expression)
        if not is_known(value):
            raise Unread(f"{shown(value)}: known on the cluster only")
        return int(value)

    def _outside(self, name: str, value: str | None) -> str:
        """A variable's value; one that the script does not set is the cluster's, or empty where it is lower case."""
        if value is not None:
            return value
        if re.fullmatch(r"[A-Z][A-Z0-9_]+", name) and name not in self.variables.assigned:
            self.variables.outside.add(name)
            return unknown(f"${name}")
        return ""

    def _split(self, word: str) -> list[str]:
        done: list[str] = []
        current: str | None = None
        for kind, text in self._pieces(word):
            if kind == _BREAK:
                done += [] if current is None else [current]
                current = None
                continue
            if kind == _QUOTED:
                current = (current or "") + text
                continue
            text = text.replace("*", ANY)
            if kind == _LITERAL:
                current = (current or "") + text
                continue
            parts = cut_at_blanks(text, self.variables.get("IFS"))
            if not parts:
                continue
            if parts[0] == "":  # it begins with blanks
                if current is not None:
                    done.append(current)
                current, parts = None, parts[1:]
            for place, part in enumerate(parts):
                if place:
                    done.append(current or "")
                    current = None
                if part or place < len(parts) - 1:
                    current = (current or "") + part
        return done if current is None else [*done, current]

    def _pieces(self, word: str) -> Iterator[tuple[str, str]]:
        at = 0
        if word.startswith(("<(", ">(")):
            yield _QUOTED, unknown(word)
            at = end_of_bracket(word, 1)
        if word.startswith("~") and re.match(r"~(/|$)", word):
            yield _QUOTED, self.variables.get("HOME") or unknown("~")
            at = 1
        while at < len(word):
            end = end_of_part(word, at)
            part = word[at:end]
            if part.startswith("\\") and len(part) == 2:
                yield _QUOTED, "" if part[1] == "\n" else part[1]
            elif part.startswith(BEGIN):
                yield _QUOTED, part
            elif part.startswith("'"):
                yield _QUOTED, part[1:-1]
            elif part.startswith("$'"):
                yield _QUOTED, _ansi(part[2:-1])
            elif part.startswith(('"', '$"')):
                inner = part[part.index('"') + 1 : -1]
                if not inner:
                    yield _QUOTED, ""
                yield from self._inside_double(inner)
            elif part == "$" or part.startswith("`") or (part.startswith("$") and len(part) > 1):
                end, pieces = self._dollar(word, at, quoted=False)
                yield from pieces
            else:
                yield _LITERAL, part
            at = end

    def _inside_double(self, text: str) -> Iterator[tuple[str, str]]:
        at = 0
        while at < len(text):
            if text[at] == "\\" and at + 1 < len(text):
                escaped = text[at + 1]
                yield _QUOTED, "" if escaped == "\n" else escaped if escaped in '$`"\\' else "\\" + escaped
                at += 2
            elif text[at] == BEGIN:
                end = end_of_part(text, at)
                yield _QUOTED, text[at:end]
                at = end
            elif text[at] in "$`":
                at, pieces = self._dollar(text, at, quoted=True)
                yield from pieces
            else:
                end = min(
                    (place for place in map(text.find, "\\$`" + BEGIN, [at] * 4) if place >= 0), default=len(text)
                )
                yield _QUOTED, text[at:end]
                at = end

    def _dollar(self, text: str, at: int, quoted: bool) -> tuple[int, list[tuple[str, str]]]:
        """What the $ or ` at `at` becomes, and the index after it."""
        kind = _QUOTED if quoted else _EXPANDED
        if text[at] == "`":
            end = end_of_part(text, at)
            return end, [(kind, self.output_of(re.sub(r"\\([$`\\])", r"\1", text[at + 1 : end - 1])))]
        if text.startswith("$((", at):
            end = end_of_bracket(text, at + 1)
            if text[end - 2 : end] == "))":
                return end, [(kind, self.arithmetic(text[at + 3 : end - 2]))]
        if text.startswith("$(", at):
            end = end_of_bracket(text, at + 1)
            return end, [(kind, self.output_of(text[at + 2 : end - 1]))]
        if text.startswith("${", at):
            end = end_of_bracket(text, at + 1, in_double=quoted)
            return end, self._braced(text[at + 2 : end - 1], quoted)
        if match := re.compile(r"[A-Za-z_]\w*|\d|[@*#?$!-]").match(text, at + 1):
            return match.end(), self._plain(match[0], quoted)
        return at + 1, [(_QUOTED, "$")]

    def _plain(self, name: str, quoted: bool) -> list[tuple[str, str]]:
        if name in "@*" and not (quoted and name == "*"):
            return _listed(self.variables.arguments, quoted)
        return [(_QUOTED if quoted else _EXPANDED, self._outside(name, self.variables.get(name)))]

    def _braced(self, inner: str, quoted: bool) -> list[tuple[str, str]]:
        kind = _QUOTED if quoted else _EXPANDED
        length, indirect = inner.startswith("#") and len(inner) > 1, inner.startswith("!")
        match = _PARAMETER.match(inner, 1 if length or indirect else 0)
        if not match:
            raise Unread(f"${{{inner}}}")
        name, rest = match[1], inner[match.end() :]
        index = None
        if rest.startswith("["):
            end = rest.find("]")
            index, rest = rest[1:end], rest[end + 1 :]
        if indirect:
            if index in ("@", "*") or rest in ("@", "*"):
                if rest or not index:
                    raise Unread(f"${{{inner}}}")
                value = self.variables.values.get(name)
                return _listed(list(value) if isinstance(value, dict) else
                               [str(place) for place in range(len(self.variables.elements(name)))], quoted)  # fmt: skip
            name = self.variables.get(name) or ""
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise Unread(f"${{{inner}}}")
        if name in "@*" or index in ("@", "*"):
            elements = self.variables.elements(name)
            if length:
                return [(kind, str(len(elements)))]
            if rest.startswith(":") and rest[1:2] not in "-=+?":
                elements = self._slice(elements, rest[1:])
            elif rest[:1] in (":", "-", "+", "=", "?") and rest:
                chosen = self._operate(name, rest, " ".join(elements) if elements else None)
                if chosen is not None or not elements:
                    return [(kind, chosen or "")]
            elif rest:
                elements = [self._operate(name, rest, one) or "" for one in elements]
            joined = quoted and (index or name) == "*"
            return [(kind, " ".join(elements))] if joined else _listed(elements, quoted)
        value = self._element(name, index) if index is not None else self.variables.get(name)
        if length:
            known = self._outside(name, value)
            return [(kind, str(len(known)) if is_known(known) else unknown(f"${{{inner}}}"))]
        if not rest:
            return [(kind, self._outside(name, value))]
        if rest.startswith((":-", "-", ":+", "+")) and not quoted and self._uses_word(rest, value):
            pieces = self._pieces(rest.lstrip(":")[1:])  # its own quotes hold, and what is not in them is split
            return [(_EXPANDED if one == _LITERAL else one, text) for one, text in pieces]
        return [(kind, self._operate(name, rest, value) or "")]

    def _uses_word(self, rest: str, value: str | None) -> bool:
        missing = not value if rest.startswith(":") else value is None
        return missing == (rest.lstrip(":")[0] == "-")

    def _element(self, name: str, index: str) -> str | None:
        value = self.variables.values.get(name)
        if isinstance(value, dict):
            return value.get(self.text(index))
        elements, number = self.variables.elements(name), self.integer(index)
        return elements[number] if -len(elements) <= number < len(elements) else None

    def _slice(self, whole: list[str] | str, rest: str) -> list[str]:
        first, colon, count = rest.partition(":")
        begin = self.integer(first)
        stop = None
        if colon:
            number = self.integer(count)
            stop = len(whole) + number if number < 0 else (begin if begin >= 0 else len(whole) + begin) + number
        return list(whole[begin:stop])

    def _operate(self, name: str, rest: str, value: str | None) -> str | None:
        """${name<rest>}: `rest` is an operation and its word."""
        match = _OPERATION.match(rest)
        if not match:
            raise Unread(f"${{{name}{rest}}}")
        operator, word = match[1], rest[match.end() :]
        if operator.lstrip(":") in ("-", "=", "+", "?") and operator != ":":
            return self._or_default(name, operator, word, value)
        value = self._outside(name, value)
        if operator in ("#", "##", "%", "%%"):
            return _trimmed(value, operator, self.pattern(word))
        if not is_known(value):
            return unknown(f"${{{name}{rest}}}")
        if operator == ":":
            return "".join(self._slice(value, word))
        if operator in ("/", "//"):
            return self._replaced(value, operator, word)
        if operator in ("^", "^^", ",", ",,") and not word:
            change = str.upper if operator[0] == "^" else str.lower
            return change(value) if len(operator) == 2 else change(value[:1]) + value[1:]
        if operator == "@" and word in ("Q", "L", "U"):
            return {"Q": value, "L": value.lower(), "U": value.upper()}[word]
        raise Unread(f"${{{name}{rest}}}")

    def _or_default(self, name: str, operator: str, word: str, value: str | None) -> str | None:
        missing = not value if operator.startswith(":") else value is None
        kind = operator[-1]
        if kind == "+":
            return "" if missing else self.text(word)
        if not missing:
            return value
        if kind == "?":
            self.variables.outside.add(name)
            return unknown(f"${name}")
        default = self.text(word)
        if kind == "=":
            self.variables.assign(name, default)
        return default

    def _replaced(self, value: str, operator: str, word: str) -> str:
        place = 1 if word.startswith("/") else 0
        while place < len(word) and word[place] != "/":
            place = end_of_part(word, place)
        anchor = word[0] if word[:1] in ("#", "%") and operator == "/" else ""
        found = regex(self.pattern(word[len(anchor) : place]))
        found = found + r"\Z" if anchor == "%" else r"\A" + found if anchor == "#" else found
        replacement = self.text(word[place + 1 :])
        if not found:
            return value
        return re.sub(found, lambda _: replacement, value, count=0 if operator == "//" else 1, flags=re.DOTALL)


def _listed(elements: list[str], quoted: bool) -> list[tuple[str, str]]:
    """ "$@": an argument an element; without quotes each is split too."""
    pieces: list[tuple[str, str]] = []
    for place, element in enumerate(elements):
        if place:
            pieces.append((_BREAK, ""))
        pieces.append((_QUOTED if quoted else _EXPANDED, element))
    return pieces


def cut_at_blanks(text: str, ifs: str | None) -> list[str]:
    """Parts between blanks, or what IFS names; an empty first or last part says that blanks are there. A mark is never
    cut."""
    ifs = " \t\n" if ifs is None else ifs
    if text == "" or not ifs:
        return [text] if text else []
    blanks, others = (re.escape("".join(one for one in ifs if one.isspace() == space)) for space in (True, False))
    blank = f"[{blanks}]*" if blanks else ""
    cut = f"{blank}[{others}]{blank}" + (f"|[{blanks}]+" if blanks else "") if others else f"[{blanks}]+"
    return re.split(f"(?:{cut})(?![^\ue001\ue002]*\ue002)", text)


def _trimmed(value: str, operator: str, pattern: str) -> str:
    """${value#pattern} and its like: the shortest part (one sign) or the longest (two) that matches."""
    if len(value) > _LONGEST_TRIMMED and literal(pattern) is None:
        raise Unread(f"a pattern on a value of {len(value):,} characters")
    if operator.startswith("%"):
        if (cut := without_suffix(value, pattern)) is not None:
            return cut
        ends = range(len(value), -1, -1) if operator == "%" else range(len(value) + 1)
        return next((value[:at] for at in ends if re.fullmatch(regex(pattern), value[at:], re.DOTALL)), value)
    begins = range(len(value) + 1) if operator == "#" else range(len(value), -1, -1)
    return next((value[at:] for at in begins if re.fullmatch(regex(pattern), value[:at], re.DOTALL)), value)


def _ansi(text: str) -> str:
    """The value of $'…'."""

    def one(match: re.Match[str]) -> str:
        if match[1]:
            return chr(int(match[1][1:], 16))
        return _ESCAPES.get(match[2], match[2])

    return re.sub(r"\\(?:(x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{1,4})|(.))", one, text, flags=re.DOTALL)


def _braces(word: str) -> list[str]:
    """{a,b} and {1..8} outside quotes, as words."""
    at = 0
    while at < len(word):
        if word[at] == "{" and (match := re.compile(r"\{([^{}\"'`\\\s]*)\}").match(word, at)):
            numbers = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", match[1])
            if numbers:
                first, last = int(numbers[1]), int(numbers[2])
                if abs(last - first) > 100_000:
                    raise Unread(f"{{{match[1]}}}: too many words")
                step, width = (1 if last >= first else -1), len(numbers[1]) if numbers[1].startswith("0") else 0
                choices = [str(number).zfill(width) for number in range(first, last + step, step)]
            else:
                choices = match[1].split(",") if "," in match[1] else []
            rest_of_words = _braces(word[match.end() :]) if choices else []
            if len(choices) * len(rest_of_words) > _MOST_WORDS:
                raise Unread(f"{{{match[1]}}}: too many words")
            if choices:
                return [word[:at] + one + rest for one in choices for rest in rest_of_words]
        at = end_of_part(word, at)
    return [word]
