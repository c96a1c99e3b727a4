"""The few programs whose output scripts make arguments of, each computed here from its input; none is run.

The output of any other is known on the cluster only.
"""

import ast
import os
import re
from collections.abc import Callable

from cptain.shell_script.values import ANY, is_known, shown, unknown

Program = Callable[[list[str], str], str | None]
"""From arguments and standard input to what it prints; None where this one does not compute it."""


def _basename(arguments: list[str], _: str) -> str | None:
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        return None
    name = arguments[0].rstrip("/").rpartition("/")[2]
    suffix = arguments[1] if len(arguments) == 2 else ""
    return (name.removesuffix(suffix) if name != suffix else name) + "\n"


def _dirname(arguments: list[str], _: str) -> str | None:
    if len(arguments) != 1:
        return None
    folder, slash, _name = arguments[0].rstrip("/").rpartition("/")
    return (folder or ("/" if slash else ".")) + "\n"


def _realpath(arguments: list[str], _: str) -> str | None:
    names = [one for one in arguments if not one.startswith("-")]
    return os.path.normpath(names[0]) + "\n" if len(names) == 1 and names[0].startswith("/") else None


def _readlink(arguments: list[str], text: str) -> str | None:
    return _realpath(arguments, text) if arguments[:1] == ["-f"] else None


def _cat(arguments: list[str], text: str) -> str | None:
    return text if arguments in ([], ["-"]) else None


def _wc(arguments: list[str], text: str) -> str | None:
    return f"{text.count(chr(10))}\n" if arguments in (["-l"], ["--lines"]) else None


def _seq(arguments: list[str], _: str) -> str | None:
    if not 1 <= len(arguments) <= 3 or not all(re.fullmatch(r"-?\d+", one) for one in arguments):
        return None
    numbers = [int(one) for one in arguments]
    first, step = (numbers[0] if len(numbers) > 1 else 1), (numbers[1] if len(numbers) == 3 else 1)
    last = numbers[-1]
    if not step or abs(last - first) // abs(step) > 100_000:
        return None
    return "".join(f"{number}\n" for number in range(first, last + (1 if step > 0 else -1), step))


def _head(arguments: list[str], text: str) -> str | None:
    match = re.fullmatch(r"(?:-n ?|-)(\d+)", " ".join(arguments)) if arguments else re.fullmatch("(10)", "10")
    return "".join(text.splitlines(keepends=True)[: int(match[1])]) if match else None


def _tail(arguments: list[str], text: str) -> str | None:
    match = re.fullmatch(r"(?:-n ?|-)(\d+)", " ".join(arguments))
    return "".join(text.splitlines(keepends=True)[-int(match[1]) :]) if match and int(match[1]) else None


def _sort(arguments: list[str], text: str) -> str | None:
    lines = sorted(text.splitlines(keepends=True))
    return "".join(dict.fromkeys(lines)) if arguments == ["-u"] else "".join(lines) if not arguments else None


def _uniq(arguments: list[str], text: str) -> str | None:
    lines = text.splitlines(keepends=True)
    kept = [line for place, line in enumerate(lines) if not place or line != lines[place - 1]]
    return "".join(kept) if not arguments else None


def _tr(arguments: list[str], text: str) -> str | None:
    if len(arguments) == 2 and arguments[0] == "-d" and len(arguments[1]) == 1:
        return text.replace(arguments[1], "")
    one, other = [part.replace("\\n", "\n") for part in arguments] if len(arguments) == 2 else ("", "")
    return text.replace(one, other) if len(one) == len(other) == 1 else None


def _cut(arguments: list[str], text: str) -> str | None:
    match = re.fullmatch(r"-d ?(.) -f ?(\d+)", " ".join(arguments)) or re.fullmatch(r"()-f ?(\d+)", " ".join(arguments))
    if not match or not int(match[2]):
        return None
    separator, place = match[1] or "\t", int(match[2]) - 1
    rows = [line.split(separator) for line in text.splitlines()]
    return "".join((row[0] if len(row) == 1 else "".join(row[place : place + 1])) + "\n" for row in rows)


def _awk(arguments: list[str], text: str) -> str | None:
    program = arguments[0] if len(arguments) == 1 else ""
    if match := re.fullmatch(r"\s*BEGIN\s*\{\s*print (.+?);?\s*\}\s*", program):
        computed = _computed(match[1])
        return None if computed is None else f"{computed:.6g}\n" if computed % 1 else f"{computed:.0f}\n"
    match = re.fullmatch(r"\s*\{\s*print \$(\d+);?\s*\}\s*", program)
    if not match or not int(match[1]):
        return None
    return "".join("".join(line.split()[int(match[1]) - 1 : int(match[1])]) + "\n" for line in text.splitlines())


def _bc(arguments: list[str], text: str) -> str | None:
    """Whole numbers alone, and no division: how many digits bc keeps of that depends on more than its operands."""
    if arguments not in ([], ["-l"]) or not re.fullmatch(r"[\d\s+*()-]+", text):
        return None
    computed = _computed(text.strip())
    return None if computed is None else f"{computed:.0f}\n"


def _computed(expression: str) -> float | None:
    """The value of + - * / ( ) and int() on numbers."""
    try:
        return _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError):
        return None


def _value(node: ast.expr) -> float:
    operators = {ast.Add: float.__add__, ast.Sub: float.__sub__, ast.Mult: float.__mul__, ast.Div: float.__truediv__}
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and (operator := operators.get(type(node.op))):
        return operator(_value(node.left), _value(node.right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "int" and len(node.args) == 1:
        return float(int(_value(node.args[0])))
    raise ValueError(ast.dump(node))


_PROGRAMS: dict[str, Program] = {
    "basename": _basename, "dirname": _dirname, "cat": _cat, "wc": _wc, "seq": _seq, "head": _head, "tail": _tail,
    "sort": _sort, "uniq": _uniq, "tr": _tr, "cut": _cut, "awk": _awk, "bc": _bc,
    "realpath": _realpath, "readlink": _readlink,
}  # fmt: skip
_WITHOUT_INPUT = {"basename", "dirname", "seq", "realpath", "readlink"}
_OF_FILE = {"cat", "wc", "head", "tail", "sort", "uniq"}  # the last argument may be a file, in the place of the input


def output(words: list[str], text: str | None, read: Callable[[str], str | None]) -> str:
    """What a program prints, or a mark that only the cluster knows it.

    Args:
        words: its name and arguments.
        text: its standard input; None where nothing says what that is.
        read: what is in a file that the scheduler gives a job; None for any other.
    """
    name, arguments = words[0], words[1:]
    if name in _OF_FILE and arguments and (content := read(arguments[-1])) is not None:
        of_file = _PROGRAMS[name](arguments[:-1], content)
        if of_file is not None:
            return of_file
    whole = " ".join(words)
    if (program := _PROGRAMS.get(name)) is None or not is_known(whole):
        return unknown(f"$({shown(whole)})") + "\n"
    if text is None or not is_known(text):
        reads_nothing = name in _WITHOUT_INPUT or (name == "awk" and "BEGIN" in whole)
        if not reads_nothing:
            return (text if text and name == "cat" and not arguments else unknown(f"$(… | {shown(whole)})")) + ""
    computed = program(arguments, text or "")
    return unknown(f"$({shown(whole)})") + "\n" if computed is None else computed


def printf(arguments: list[str]) -> str | None:
    """What printf prints; None for a format that is not known here."""
    form, rest = arguments[0].replace("\\n", "\n").replace("\\t", "\t"), arguments[1:]
    parts = re.split(r"(%%|%0?\d{0,3}[sd])", form)
    if "%" in "".join(parts[::2]):
        return None
    takes = sum(part != "%%" for part in parts[1::2])
    result = ""
    while True:
        for place, part in enumerate(parts):
            if place % 2 == 0 or part == "%%":
                result += part.replace("%%", "%")
                continue
            value = rest.pop(0) if rest else ""
            if part == "%s" or not is_known(value) or ANY in value:
                result += value
            elif not re.fullmatch(r"-?\d*", value) and part[-1] == "d":
                return None
            else:
                result += part % (int(value or 0) if part[-1] == "d" else value)
        if not rest or not takes:
            return result
