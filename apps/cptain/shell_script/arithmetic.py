"""Bash's integer arithmetic: $((…)), ((…)), and the sizes that scripts compute from one another."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from cptain.shell_script.quoting import Unread
from cptain.shell_script.values import is_known, shown, unknown

_TOKEN = re.compile(
    r"\s*(0[xX][0-9a-fA-F]+|\d+#\w+|\d+|[A-Za-z_]\w*|\*\*|\+\+|--|<<=|>>=|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\S)"
)
_LEVELS = (
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<", ">", "<=", ">="), ("<<", ">>"), ("+", "-"),
    ("*", "/", "%"),
)  # fmt: skip
_BITS = 64


class _Unknown(Exception):
    """A variable whose value only the cluster knows."""


def _wrapped(number: int) -> int:
    half = 1 << (_BITS - 1)
    return (number + half) % (1 << _BITS) - half


def _operate(operator: str, left: int, right: int) -> int:
    if operator in ("/", "%"):
        if not right:
            raise Unread("division by 0")
        quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
        return quotient if operator == "/" else left - quotient * right
    if operator in ("<<", ">>", "**") and not 0 <= right < _BITS:
        raise Unread(f"{left} {operator} {right}")
    table: dict[str, Callable[[], int]] = {
        "+": lambda: left + right, "-": lambda: left - right, "*": lambda: left * right, "**": lambda: left**right,
        "<<": lambda: left << right, ">>": lambda: left >> right, "&": lambda: left & right, "|": lambda: left | right,
        "^": lambda: left ^ right, "==": lambda: left == right, "!=": lambda: left != right, "<": lambda: left < right,
        ">": lambda: left > right, "<=": lambda: left <= right, ">=": lambda: left >= right,
        "&&": lambda: left and right and 1, "||": lambda: 1 if left or right else 0,
    }  # fmt: skip
    return _wrapped(int(table[operator]()))


@dataclass
class _Evaluation:
    tokens: list[str]
    get: Callable[[str], str]
    assign: Callable[[str, str], None]
    at: int = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1] if self.at <= len(self.tokens) else ""

    def value(self, name: str, depth: int = 0) -> int:
        text = self.get(name).strip()
        if not is_known(text):
            raise _Unknown(f"{name} = {shown(text)}")
        if re.fullmatch(r"[A-Za-z_]\w*", text) and depth < 10:
            return self.value(text, depth + 1)
        return _number(text) if re.fullmatch(r"[-+]?\d\w*", text) else int(evaluate(text, self.get, self.assign) or 0)

    def expression(self) -> int:
        name, following = self.peek(), self.tokens[self.at + 1 : self.at + 2]
        if re.match(r"[A-Za-z_]", name) and following and re.fullmatch(r"=|([-+*/%&|^]|<<|>>)=", following[0]):
            self.at += 2
            right = self.expression()
            operator = following[0][:-1]
            result = _operate(operator, self.value(name), right) if operator else right
            self.assign(name, str(result))
            return result
        condition = self.binary(0)
        if self.peek() != "?":
            return condition
        self.take()
        yes = self.expression()
        if self.take() != ":":
            raise Unread("? without its :")
        no = self.expression()
        return yes if condition else no

    def binary(self, level: int) -> int:
        if level == len(_LEVELS):
            return self.power()
        left = self.binary(level + 1)
        while self.peek() in _LEVELS[level]:
            left = _operate(self.take(), left, self.binary(level + 1))
        return left

    def power(self) -> int:
        base = self.unary()
        if self.peek() != "**":
            return base
        self.take()
        return _operate("**", base, self.power())

    def unary(self) -> int:
        token = self.take()
        if token in ("-", "+", "!", "~"):
            operand = self.unary()
            return {"-": -operand, "+": operand, "!": int(not operand), "~": ~operand}[token]
        if token in ("++", "--"):
            return self.step(self.take(), token, before=True)
        if token == "(":
            result = self.expression()
            if self.take() != ")":
                raise Unread("( without its )")
            return result
        if re.match(r"\d", token):
            return _number(token)
        if not re.match(r"[A-Za-z_]", token):
            raise Unread(f"{' '.join(self.tokens)[:60]!r} as arithmetic")
        if self.peek() in ("++", "--"):
            return self.step(token, self.take(), before=False)
        return self.value(token)

    def step(self, name: str, operator: str, before: bool) -> int:
        old = self.value(name)
        new = old + (1 if operator == "++" else -1)
        self.assign(name, str(new))
        return new if before else old


def _number(text: str) -> int:
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    base, hash_sign, rest = digits.partition("#")
    try:
        if hash_sign:
            return sign * int(rest, int(base))
        if digits.lower().startswith("0x"):
            return sign * int(digits, 16)
        return sign * int(digits, 8 if digits.startswith("0") else 10)
    except ValueError:
        raise Unread(f"{text!r} as a number") from None


def evaluate(expression: str, get: Callable[[str], str], assign: Callable[[str, str], None]) -> str:
    """The value of an arithmetic expression whose $ parts are expanded, or a mark that only the cluster knows it.

    Args:
        expression: what is between the brackets.
        get: a variable's value; "" where it is not set.
        assign: for =, ++ and the like.

    Raises:
        Unread: it is no arithmetic, or divides by 0.
    """
    if not is_known(expression):
        return unknown(f"$(({expression}))")
    tokens = _TOKEN.findall(expression)
    if not tokens:
        return "0"
    evaluation = _Evaluation(tokens, get, assign)
    try:
        result = evaluation.expression()
        while evaluation.peek() == ",":
            evaluation.take()
            result = evaluation.expression()
    except _Unknown as error:
        return unknown(f"$(({expression.strip()})) with {error}")
    if evaluation.at < len(tokens):
        raise Unread(f"{expression.strip()[:60]!r} as arithmetic")
    return str(result)
