"""What several commands take: the run file and its options, and values that click has no type for.

click's ParamType is generic since 8.4, and not before: hence the ignored type arguments.
"""

import functools
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click


class Shard(click.ParamType):  # type: ignore[type-arg]
    """I/N, counted from 1."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        number, slash, count = value.partition("/")
        digits = slash and all(part.isascii() and part.isdigit() for part in (number, count))
        if digits and 1 <= int(number) <= int(count):
            return int(number), int(count)
        self.fail(f"{value!r}: allowed: I/N with I from 1 to N, such as 1/4", param, context)


class Iteration(click.ParamType):  # type: ignore[type-arg]
    """The number of a checkpoint, or which one is meant."""

    name = "N|latest|final|all"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int | str:
        if value in ("latest", "final", "all"):
            return str(value)
        if isinstance(value, int) or (value.isascii() and value.isdigit() and int(value) > 0):
            return int(value)
        self.fail(f'{value!r}: allowed: a number, "latest", "final" or "all"', param, context)


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A size such as 5GB, in decimal units."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])B", str(value))
        if match and (size := round(float(match[1]) * {"M": 10**6, "G": 10**9, "T": 10**12}[match[2]])):
            return size
        self.fail(f"{value!r}: allowed: a number with MB, GB or TB, such as 5GB", param, context)


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the run file, such as train.lr=2.5e-5. Repeatable.",
)
site_option = click.option(
    "--site", metavar="NAME|FILE", help="A site under jobs/sites, or a file of your own.  [default: jobs.site]"
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """RUN and --set, which every stage takes."""
    return click.argument("run", type=click.Path(path_type=Path))(set_option(command))


def stage(command: Callable[..., None]) -> Callable[..., None]:
    """--json and --quiet, which every stage takes: how it tells what it does and did."""

    @click.option("--json", "as_json", is_flag=True, help="At the end, print what was done as one JSON object.")
    @click.option("-q", "--quiet", is_flag=True, help="Show no progress: no bar, and no line every 30 seconds.")
    @functools.wraps(command)
    def told(*arguments: Any, as_json: bool, quiet: bool, **options: Any) -> None:
        from cptain import progress, summary

        shown = progress.hidden() if quiet else nullcontext()
        with shown, summary.as_json(command.__name__) if as_json else nullcontext():
            command(*arguments, **options)

    return told


def load(file: Path, overrides: tuple[str, ...]) -> Any:
    """Load the run file of a stage."""
    from cptain.image import keep_caches_out_of_home, warn_of_another_commit
    from cptain.run_file import load_run
    from cptain.scheduling.sweep import refuse_sweep

    warn_of_another_commit()
    run = load_run(file, overrides)
    keep_caches_out_of_home(run.folder)
    refuse_sweep(run, file, click.get_current_context().find_root().obj)
    return run
