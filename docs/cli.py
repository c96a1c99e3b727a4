"""docs/cli.md, from the program itself: `make docs` writes it, and tests/test_cli.py keeps it equal."""

from pathlib import Path

import click
from cptain.cli import main

_HEAD = """\
# The commands

Written by `make docs` from the program itself; what is here is what `cptain --help` and `cptain COMMAND --help` print.
In the image the four stages are `apptainer run --app COMMAND IMAGE …`, and every command is
`apptainer exec IMAGE cptain COMMAND …`.

**Shell completion** comes with click. In a venv, add the line of your shell to its start-up file:

```
eval "$(_CPTAIN_COMPLETE=bash_source cptain)"        # ~/.bashrc
eval "$(_CPTAIN_COMPLETE=zsh_source cptain)"         # ~/.zshrc
_CPTAIN_COMPLETE=fish_source cptain | source         # ~/.config/fish/config.fish
```

On a cluster, put a file `cptain` of two lines on your `PATH` first (`chmod +x` it), and then do the same:

```
#!/bin/sh
exec apptainer exec /path/to/cptain.sif cptain "$@"
```
"""

_TAIL = """\
## The summary of a stage

`preprocess`, `convert`, `train`, `export`, `verify` and `merge` print one JSON object on stdout with `--json`, as the
last thing they do, and all else on stderr. It comes however the stage ends, unless the process is killed (SIGKILL) or
the command line itself is wrong.

```
cptain train run.toml --json | jq .loss
```

| stage | keys besides `command`, `exit_status`, `error` (null: none) and `seconds` |
| --- | --- |
| all that write a model | `folder`; `written`, false where it was done already; `bytes` of weights, where it was not |
| preprocess | `files`, `documents`, `tokens`, `text_bytes`, `skipped` (bad lines), `folder` |
| | `were_done`, `pairs_were_checked`: files that an earlier command did |
| | with `--shard`: `part`, `of_parts`, `files_of_part`, `not_done` (files of other parts) |
| | `validation`: the same keys of each set, by its name, and `left_out` |
| train | `start`, `step` (this start's last), `steps`, `saved` (the last step saved), `first_loss`, `loss`, `log` |
| train --dry-run | `argv` |
| export | `iterations`: by number, each with the keys of a model, or with `error` |
| verify A B | `a`, `b`, `tensors`, `equal`, `different` (names), `max_abs_difference`, `sample`, `logits` |
| | `files`: differences beside the weights |
| verify A | `folder`, `files` (how many), `wrong` (what is not as it was written), `made_of` (how each source is) |
| merge | `models` (how many) |
"""


def reference() -> str:
    """The help of the program and of every command, in the program's order."""
    program = click.Context(main, info_name="cptain", terminal_width=100, **main.context_settings)
    parts = [_HEAD, _section(program)]
    for name in main.list_commands(program):
        command = main.get_command(program, name)
        assert command is not None
        parts.append(_section(click.Context(command, info_name=name, parent=program)))
    return "\n".join([*parts, _TAIL])


def _section(context: click.Context) -> str:
    return f"## {context.command_path}\n\n```\n{context.get_help()}\n```\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(reference(), encoding="utf-8")
