"""The commands. Thin: options in, one function called, errors printed once.

Nothing heavy is imported before a command needs it: `cptain --help` answers at once.
"""

import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from cptain import __version__
from cptain.errors import FAILED, RESUMABLE, CptainError, Interrupted, one_line


def _interrupt(number: int, frame: object) -> NoReturn:
    raise Interrupted(signal.Signals(number).name)


def _status_and_message(error: BaseException) -> tuple[int, str]:
    """The exit status of an error, and the lines for people."""
    if isinstance(error, Interrupted):
        return RESUMABLE, f"stopped by {error.signal_name}; the same command continues"
    if isinstance(error, CptainError):
        return error.exit_status, str(error)
    if isinstance(error, OSError):
        return FAILED, (f"{error.filename}: " if error.filename else "") + (error.strerror or one_line(error))
    if isinstance(error, MemoryError):
        return FAILED, "out of memory"
    return FAILED, f"{type(error).__name__}: {one_line(error)} (a defect of cptain: --debug shows where)"


class _Commands(click.Group):
    """Runs a command with the house's exit statuses: one line on stderr, a traceback only with --debug."""

    def invoke(self, context: click.Context) -> Any:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            return super().invoke(context)
        except (click.exceptions.ClickException, click.exceptions.Exit, click.exceptions.Abort):
            raise
        except BrokenPipeError:  # `cptain … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILED)
        except (Exception, Interrupted) as error:
            for number in (signal.SIGINT, signal.SIGTERM):  # what is said below is the end
                signal.signal(number, signal.SIG_IGN)
            if context.params.get("debug"):
                traceback.print_exc()
            status, message = _status_and_message(error)
        for line in message.splitlines():
            click.echo(f"cptain: {line}", err=True)
        sys.exit(status)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="cptain")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Continual pre-training of LLMs on HPC clusters: one run file from text and a Hugging Face model to a Hugging Face
    model.

    \b
    Exit status: 0 done, 1 failed, 2 bad usage or run file, 75 stopped early and resumable.
    """


_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the run file, such as train.lr=2.5e-5. Repeatable.",
)


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """RUN and --set, which every stage takes."""
    return click.argument("run", type=click.Path(path_type=Path))(_set_option(command))


def _force_option(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--force", is_flag=True, help=f"{what} again what is done.")


def _load(file: Path, overrides: tuple[str, ...]) -> Any:
    """Load the run file of a stage."""
    from cptain.image import keep_caches_out_of_home, warn_of_another_commit
    from cptain.run_file import load_run, refuse_sweep

    warn_of_another_commit()
    run = load_run(file, overrides)
    keep_caches_out_of_home(run.folder)
    refuse_sweep(run, file)
    return run


def _begin(stage: str, run: Any) -> Any:
    """Write the resolved run file and its provenance into the run's folder: the stage begins."""
    from cptain.atomic import remove_stale_partials
    from cptain.provenance import write_provenance
    from cptain.run_file import write_resolved

    remove_stale_partials(run.folder)
    changes = write_resolved(run)
    for change in changes if stage == "train" else ():
        click.echo(f"train: run file changed since the last stage: {change}", err=True)
    write_provenance(run, stage)
    return run


_workers_option = click.option(
    "--workers", type=click.IntRange(min=1), help="Cores to use.  [default: those there are, 16 at most]"
)


def _threads(workers: int | None) -> int:
    """What --workers asks for; a disk has no more to give beyond 16."""
    return workers or min(16, len(os.sched_getaffinity(0)))


class _Shard(click.ParamType):  # type: ignore[type-arg]
    """I/N, counted from 1."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        number, slash, count = value.partition("/")
        digits = slash and all(part.isascii() and part.isdigit() for part in (number, count))
        if digits and 1 <= int(number) <= int(count):
            return int(number), int(count)
        self.fail(f"{value!r}: allowed: I/N with I from 1 to N, such as 1/4", param, context)


@main.command()
@_run_options
@click.option("--workers", type=click.IntRange(min=1), help="Cores to use.  [default: those there are]")
@click.option(
    "--shard",
    type=_Shard(),
    help="Do the I-th of N parts of the files, alike in bytes: for job arrays. The last to end writes the manifest.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "hf"]),
    default="auto",
    show_default=True,
    help="hf: encode with Hugging Face's own library even where a faster one gives the same ids.",
)
@click.option("--verify-inputs", is_flag=True, help="Read files that are done whole, to see that they are unchanged.")
@click.option("--count-only", is_flag=True, help="Count documents and tokens, and write nothing.")
@_force_option("Tokenize")
def preprocess(
    run: Path,
    overrides: tuple[str, ...],
    workers: int | None,
    shard: tuple[int, int] | None,
    backend: str,
    verify_inputs: bool,
    count_only: bool,
    force: bool,
) -> None:
    """Tokenize the text into Megatron's indexed datasets."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy begins a thread a core for it, and here is none to do
    from cptain.data.preprocess import preprocess as tokenize

    loaded = _load(run, overrides)
    if not count_only and (shard is None or shard[0] == 1):
        _begin("preprocess", loaded)
    cores = workers or len(os.sched_getaffinity(0))
    tokenize(loaded, cores, force, shard or (1, 1), backend, verify_inputs, count_only)


@main.command()
@_run_options
@_workers_option
@click.option(
    "--shard",
    type=_Shard(),
    help="Write the I-th of N parts of the checkpoint: for job arrays. The last to end completes it.",
)
@_force_option("Convert")
def convert(
    run: Path, overrides: tuple[str, ...], workers: int | None, shard: tuple[int, int] | None, force: bool
) -> None:
    """Convert the Hugging Face model to Megatron's torch_dist format, on the CPU."""
    if shard and force:
        raise click.UsageError("--force goes without --shard: remove the checkpoint, and convert its parts again.")
    loaded = _load(run, overrides)
    if shard is None or shard[0] == 1:
        _begin("convert", loaded)
    from cptain.checkpoint.convert import convert as convert_model

    convert_model(loaded, _threads(workers), force, shard or (1, 1))


@main.command()
@_run_options
@click.option("--dry-run", is_flag=True, help="Print the Megatron command, one flag a line, and stop.")
@click.option("--cpu", is_flag=True, help="Train on the CPU, over gloo: real, and slow.")
@click.option(
    "--nproc-per-node",
    type=click.IntRange(min=1),
    help="Processes.  [default: the GPUs there are; with --cpu, as many as hold one copy of the model]",
)
def train(run: Path, overrides: tuple[str, ...], dry_run: bool, cpu: bool, nproc_per_node: int | None) -> None:
    """Train with Megatron-LM on this machine: from the converted checkpoint at first, then from the last one saved."""
    loaded = _load(run, overrides)
    from cptain.training.launch import train as start
    from cptain.training.prepare import prepare

    command = prepare(loaded, cpu, nproc_per_node, dry_run)
    if dry_run:
        click.echo(command.shown())
    else:
        if command.is_first_node:
            _begin("train", loaded)
        start(loaded, command)


class _Iteration(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.4
    """A number, or one of the words."""

    name = "N|latest|final|all"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int | str:
        if value in ("latest", "final", "all"):
            return str(value)
        if isinstance(value, int) or (value.isascii() and value.isdigit() and int(value) > 0):
            return int(value)
        self.fail(f'{value!r}: allowed: a number, "latest", "final" or "all"', param, context)


class _Bytes(click.ParamType):  # type: ignore[type-arg]
    """A size such as 5GB, in decimal units."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])B", str(value))
        if match and (size := round(float(match[1]) * {"M": 10**6, "G": 10**9, "T": 10**12}[match[2]])):
            return size
        self.fail(f"{value!r}: allowed: a number with MB, GB or TB, such as 5GB", param, context)


@main.command()
@_run_options
@click.option(
    "--iteration",
    type=_Iteration(),
    default="latest",
    show_default=True,
    help="Which checkpoint to export; final: the run's last step, and nothing before training has come so far; "
    "all: every complete one.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of the weights.  [default: as they were trained]",
)
@click.option(
    "--shard-size",
    type=_Bytes(),
    default="5GB",
    show_default=True,
    help="No file of weights grows over this, unless by a single tensor.",
)
@_workers_option
@_force_option("Export")
def export(
    run: Path,
    overrides: tuple[str, ...],
    iteration: int | str,
    dtype: str | None,
    shard_size: int,
    workers: int | None,
    force: bool,
) -> None:
    """Export a checkpoint that training saved to a Hugging Face model, on the CPU."""
    loaded = _begin("export", _load(run, overrides))
    import torch

    from cptain.checkpoint.export import export as export_model
    from cptain.checkpoint.export import export_all, iterations

    weights = getattr(torch, dtype) if dtype else None
    export_all(
        iterations(loaded, iteration),
        lambda one: export_model(loaded, one, _threads(workers), force, weights, shard_size),
    )


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--logits", is_flag=True, help="Compare forward passes on fixed prompts too, in fp32, on a GPU that has room."
)
@click.option("--sample", is_flag=True, help="Compare 1 MB of each tensor: a quick look.")
@_workers_option
def verify(a: Path, b: Path, logits: bool, sample: bool, workers: int | None) -> None:
    """Compare two checkpoints tensor by tensor; exit status 1 on a mismatch.

    A and B are each the folder of a Hugging Face model, or of a Megatron checkpoint: torch_dist, or the legacy torch
    (its root means the latest iteration).
    """
    from cptain.checkpoint.verify import verify as compare

    compare(a, b, logits, _threads(workers), sample)


@main.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@_set_option
@click.option(
    "--site", metavar="NAME|FILE", help="A site under jobs/sites, or a file of your own.  [default: jobs.site]"
)
@click.option("--out", type=click.Path(path_type=Path), help="Where the scripts go.  [default: the run's jobs folder]")
@click.option("--check-site", type=click.Path(path_type=Path), metavar="FILE", help="Check a site file, and stop.")
@click.option(
    "--state",
    "submitted",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Say how the submitted jobs are, from the scheduler's words on stdin, and stop: for submit.sh --state.",
)
def jobs(
    run: Path | None,
    overrides: tuple[str, ...],
    site: str | None,
    out: Path | None,
    check_site: Path | None,
    submitted: Path | None,
) -> None:
    """Render the run's job scripts, and submit.sh, which submits them; print its path.

    The scripts use a copy of the run file as it is now. A [sweep] gives every combination its own.
    """
    from cptain.run_file import load_run
    from cptain.scheduling import render, state

    if submitted is not None:
        click.echo("\n".join(state.table(submitted, sys.stdin.read())))
        return
    if check_site is not None:
        click.echo(render.check_site(check_site))
        return
    if run is None:
        raise click.UsageError("Missing argument 'RUN'.")
    typed = [str(run), *(word for override in overrides for word in ("--set", override))]
    typed += [*(["--site", site] if site else []), *(["--out", str(out)] if out else [])]
    rendering = render.render(load_run(run, overrides), run, site, out, shlex.join(typed))
    for name, folder, chain, changes in rendering.runs:
        click.echo(f"jobs: {name}: {folder}, {chain} train job{'s' if chain > 1 else ''}", err=True)
        for change in changes:
            click.echo(f"jobs: {name}: changed since the last time: {change}", err=True)
    click.echo(rendering.submit)
