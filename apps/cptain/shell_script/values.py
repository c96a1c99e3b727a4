"""Values of a script that only the cluster knows, carried through it as marks in its strings.

Nothing of a script is run and no file system is looked at, so the output of a command is not known, nor which files a
glob matches. Such a value is a mark with what it stands for; a mark that reaches Megatron's arguments is reported with
them. The marks are characters that no text has (of Unicode's private use).
"""

import re

from cptain.shell_script.quoting import Unread

_MOST_STARS = 4
ANY = "\ue000"  # what a * of a glob matches
BEGIN, _END = "\ue001", "\ue002"
_MARK = re.compile(f"{BEGIN}([^{_END}]*){_END}")
MARKS = frozenset((ANY, BEGIN, _END))


def unknown(what: str) -> str:
    """A value that only the cluster knows, such as "$(hostname)"."""
    return BEGIN + shown(what).replace("\n", " ") + _END


def is_known(value: str) -> bool:
    """Whether a value holds no mark of a command or a variable."""
    return BEGIN not in value


def shown(value: str) -> str:
    """A value for people: a mark as the script has it, and a * for any name."""
    return _MARK.sub(r"\1", value).replace(ANY, "*")


def unknowns(value: str) -> list[str]:
    """What of a value only the cluster knows."""
    return _MARK.findall(value)


def regex(pattern: str) -> str:
    """A shell pattern as a regular expression; a backslash makes the next character a plain one.

    Raises:
        Unread: a pattern of so many * that a search with it takes no end.
    """
    if pattern.count("*") > _MOST_STARS:
        raise Unread(f"the pattern {pattern[:40]!r}")
    result, at = "", 0
    while at < len(pattern):
        one = pattern[at]
        at += 1
        if one == "\\" and at < len(pattern):
            result += re.escape(pattern[at])
            at += 1
        elif one == "*":
            result += ".*"
        elif one == "?":
            result += "."
        elif one == "[" and (end := pattern.find("]", at + 1)) > 0:
            inner = pattern[at:end].replace("\\", "\\\\")
            result += "[" + ("^" + inner[1:] if inner[0] in "!^" else inner) + "]"
            at = end + 1
        else:
            result += re.escape(one)
    return result


def literal(pattern: str) -> str | None:
    """The text that a pattern matches where it has no wildcard, or None."""
    plain = re.sub(r"\\(.)", "", pattern, flags=re.DOTALL)
    return None if re.search(r"[*?\[]", plain) else re.sub(r"\\(.)", r"\1", pattern, flags=re.DOTALL)


def without_suffix(value: str, pattern: str) -> str | None:
    """A value whose end only the cluster knows, less a suffix that it may have there; None where it has none."""
    suffix, known = literal(pattern), value.rpartition(ANY)[2]
    if ANY not in value or suffix is None or not suffix.endswith(known) or len(suffix) <= len(known):
        return None
    return value.removesuffix(known)


def matched(value: str, pattern: str) -> tuple[bool | None, str]:
    """Whether a value matches a shell pattern (None: only the cluster knows), and what it then is.

    A file name that a glob left open, matched against *.idx, goes on as a name that ends so.
    """
    if not is_known(value):
        return None, value
    if re.fullmatch(regex(pattern), value, re.DOTALL):
        return True, value
    if ANY not in value:
        return False, value
    ending = literal(pattern[1:]) if pattern.startswith("*") else None
    known = value.rpartition(ANY)[2]
    if ending and ending.endswith(known):
        return True, value.removesuffix(known) + ending
    return (False if ending and not known.endswith(ending) and known else None), value
