"""The commands of a shell script as a tree; their words stay as they are written."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Assignment:
    """NAME=word, NAME[index]+=word, or NAME=(words)."""

    name: str
    index: str | None
    adds: bool
    word: str
    words: list[str] | None = None


@dataclass
class Redirect:
    """What a command reads, or where it writes: `word` is a file, or the text itself of << and <<<."""

    operator: str
    word: str
    literal: bool = False


@dataclass
class Node:
    """A command; `line` is its line in the script, from 1."""

    line: int
    redirects: list[Redirect] = field(default_factory=list)


@dataclass
class Simple(Node):
    """Assignments, and a command with its arguments."""

    assignments: list[Assignment] = field(default_factory=list)
    words: list[str | Assignment] = field(default_factory=list)


@dataclass
class Pipeline(Node):
    """Commands joined by |; `negated`: it begins with !."""

    commands: list[Node] = field(default_factory=list)
    negated: bool = False


@dataclass
class Chain(Node):
    """Pipelines, each with what joins it to the one before: "&&", "||", or ";"."""

    parts: list[tuple[str, Node]] = field(default_factory=list)


@dataclass
class If(Node):
    """Conditions with their bodies, the last without one where there is an else."""

    branches: list[tuple[Node | None, Node]] = field(default_factory=list)


@dataclass
class For(Node):
    """for NAME in words; None: the script's own arguments."""

    name: str = ""
    words: list[str] | None = None
    body: Node | None = None


@dataclass
class Loop(Node):
    """while, until (`until`), and for ((…)), whose three expressions are `counted`."""

    condition: Node | None = None
    body: Node | None = None
    until: bool = False
    counted: tuple[str, str, str] | None = None


@dataclass
class Case(Node):
    """case word in patterns) body ;; …"""

    word: str = ""
    branches: list[tuple[list[str], Node]] = field(default_factory=list)


@dataclass
class Function(Node):
    """A function's definition."""

    name: str = ""
    body: Node | None = None


@dataclass
class Group(Node):
    """{ …; }, or ( … ), whose variables are its own (`apart`)."""

    body: Node | None = None
    apart: bool = False


@dataclass
class Test(Node):
    """[[ … ]]: its words, with &&, ||, (, ) and ! among them."""

    words: list[str] = field(default_factory=list)


@dataclass
class Arithmetic(Node):
    """(( … ))."""

    expression: str = ""
