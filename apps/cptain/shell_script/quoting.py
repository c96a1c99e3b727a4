"""Where a quoted or a $ part of a shell word ends: the one piece of grammar that parser and expansion share.

Nothing here is executed. Positions are indexes into the script's text.
"""

from cptain.errors import CptainError

_CLOSES = {"(": ")", "{": "}"}


class Unread(CptainError):
    """A construction that cptain cannot read; where, is added by whoever knows the line."""


def end_of_part(text: str, at: int) -> int:
    """The index after the part that begins at `at`: one escaped character, a quoted string, a $ expression, or one
    plain character.

    Raises:
        Unread: it does not end.
    """
    character, following = text[at], text[at + 1 : at + 2]
    if character == "\\":
        return min(at + 2, len(text))
    if character == "\ue001":  # a mark of what only the cluster knows, in a text that the script made
        return _after(text, text.find("\ue002", at), "a mark")
    if character == "'":
        return _after(text, text.find("'", at + 1), "'")
    if character == '"':
        return _end_of_double(text, at + 1)
    if character == "`":
        return _end_of_backquote(text, at + 1)
    if character == "$" and following == "'":
        return _end_of_ansi(text, at + 2)
    if character == "$" and following == '"':
        return _end_of_double(text, at + 2)
    if character == "$" and following and following in _CLOSES:
        return end_of_bracket(text, at + 1)
    return at + 2 if character == "$" and following and following in "$#?!@*-" else at + 1


def end_of_bracket(text: str, at: int, in_double: bool = False) -> int:
    """The index after the bracket that closes the ( or { at `at`, quotes and inner brackets skipped.

    Args:
        text: the script.
        at: the bracket's index.
        in_double: inside double quotes, where ' is no quote in ${…}.
    """
    opens, closes, depth, place = text[at], _CLOSES[text[at]], 0, at
    while place < len(text):
        if text[place] == opens:
            depth += 1
        elif text[place] == closes:
            depth -= 1
            if not depth:
                return place + 1
        elif opens == "(" and text[place] == "#" and text[place - 1] in " \t\n":  # a comment, with quotes of its own
            place = _after(text, text.find("\n", place), "(") - 1
            continue
        plain = opens == "{" and in_double and text[place] == "'"
        place = place + 1 if plain or text[place] == opens else end_of_part(text, place)
    raise Unread(f"{opens} without its {closes}")


def _after(text: str, found: int, what: str) -> int:
    if found < 0:
        raise Unread(f"{what} without its end")
    return found + 1


def _end_of_double(text: str, at: int) -> int:
    while at < len(text):
        if text[at] == '"':
            return at + 1
        if text.startswith("${", at):
            at = end_of_bracket(text, at + 1, in_double=True)
        else:
            at = at + 1 if text[at] == "'" or text[at : at + 2] in ("$'", '$"') else end_of_part(text, at)
    raise Unread('" without its end')


def _end_of_backquote(text: str, at: int) -> int:
    while at < len(text):
        if text[at] == "`":
            return at + 1
        at += 2 if text[at] == "\\" else 1
    raise Unread("` without its end")


def _end_of_ansi(text: str, at: int) -> int:
    while at < len(text):
        if text[at] == "'":
            return at + 1
        at += 2 if text[at] == "\\" else 1
    raise Unread("$' without its end")
