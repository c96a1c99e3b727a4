"""The variables of a shell script."""

import re
from dataclasses import dataclass, field

from cptain.shell_script.quoting import Unread
from cptain.shell_script.values import unknown

Value = str | list[str] | dict[str, str]
_ASSIGNED = re.compile(r"(?:^|[\s;(&|{])([A-Za-z_]\w*)\+?=", re.MULTILINE)
_MOST = 100_000  # elements of an array
_LONGEST = 10_000_000  # characters of a value


@dataclass
class Variables:
    """The variables of a script.

    Attributes:
        values: by name; a list is an array.
        arguments: $1 and on.
        script: $0.
        status: $?.
        outside: names that the script read without setting them.
        assigned: names that it sets somewhere.
    """

    values: dict[str, Value] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    script: str = ""
    status: int = 0
    outside: set[str] = field(default_factory=set)
    assigned: set[str] = field(default_factory=set)

    def note_assigned(self, text: str) -> None:
        """Names that a text assigns anywhere: where they are not set yet they are empty, and not the cluster's."""
        self.assigned |= set(_ASSIGNED.findall(text))

    def get(self, name: str) -> str | None:
        """A variable's text, an array's first; None where it is not set."""
        if name.isdigit():
            place = int(name)
            if not place:
                return self.script
            return self.arguments[place - 1] if place <= len(self.arguments) else None
        if name in "@*":
            return " ".join(self.arguments)
        special = {
            "#": str(len(self.arguments)),
            "?": str(self.status),
            "$": unknown("$$"),
            "!": unknown("$!"),
            "-": "",
        }
        if name in special:
            return special[name]
        value = self.values.get(name)
        if isinstance(value, list):
            return value[0] if value else None
        return value.get("0") if isinstance(value, dict) else value

    def elements(self, name: str) -> list[str]:
        """All of an array; a plain variable is an array of one."""
        if name in ("@", "*"):
            return list(self.arguments)
        value = self.values.get(name)
        if isinstance(value, dict):
            return list(value.values())
        return list(value) if isinstance(value, list) else [] if value is None else [value]

    def assign(self, name: str, value: Value) -> None:
        """Set one."""
        if isinstance(value, str) and len(value) > _LONGEST:
            raise Unread(f"{name} grows beyond {_LONGEST:,} characters")
        if isinstance(value, str) and isinstance(kept := self.values.get(name), list):
            kept[:1] = [value]
            return
        if not isinstance(value, str) and len(value) > _MOST:
            raise Unread(f"{name} grows beyond {_MOST:,} elements")
        self.values[name] = value
