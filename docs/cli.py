"""docs/cli.md, from the program itself: `make docs` writes it, and tests/test_cli.py keeps it equal."""

from pathlib import Path

import click
from cptain.cli import main

_HEAD = """\
# The commands

Written by `make docs` from the program itself; what is here is what `cptain --help` and `cptain COMMAND --help` print.
In the image the four stages are `apptainer run --app COMMAND IMAGE …`, and every command is
`apptainer exec IMAGE cptain COMMAND …`.
"""


def reference() -> str:
    """The help of the program and of every command, in the program's order."""
    program = click.Context(main, info_name="cptain", terminal_width=100, **main.context_settings)
    parts = [_HEAD, _section(program)]
    for name in main.list_commands(program):
        command = main.get_command(program, name)
        assert command is not None
        parts.append(_section(click.Context(command, info_name=name, parent=program)))
    return "\n".join(parts)


def _section(context: click.Context) -> str:
    return f"## {context.command_path}\n\n```\n{context.get_help()}\n```\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(reference(), encoding="utf-8")
