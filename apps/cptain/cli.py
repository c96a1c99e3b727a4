"""The commands. Thin: options in, one function called, errors printed once.

Nothing heavy is imported before a command needs it: `cptain --help` answers at once.
"""

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from cptain import __version__
from cptain.cli_about_runs import doctor, eval_command, import_command, plan_command, report, status
from cptain.errors import FAILED, Interrupted, bad_usage, status_and_message
from cptain.option_types import Bytes, Iteration, Shard, load, run_options, site_option, stage
from cptain.processes import end


def _interrupt(number: int, frame: object) -> NoReturn:
    raise Interrupted(signal.Signals(number).name)


class _Commands(click.Group):
    """Runs a command with the house's exit statuses: one line on stderr, a traceback only with --debug."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.obj = list(args)  # as typed, for a message that repeats the command
        return super().parse_args(context, args)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a program of its own."""
        try:
            return super().__call__(*args, **kwargs)
        except SystemExit as stop:
            if stop.code is None or isinstance(stop.code, int):
                end(stop.code or 0)
            raise

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a run, not of the alphabet

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
            status, message = status_and_message(error)
        for line in message.splitlines():
            click.echo(f"cptain: {line}", err=True)
        sys.exit(status)


_ENVIRONMENT = """\b
Environment:
  HF_TOKEN, WANDB_API_KEY  keys of the Hugging Face hub and of Weights & Biases
  HF_HOME                  where downloads go; in the image, unless set, the run's cache folder
  TMPDIR                   a fast folder of this machine; in the image, what is compiled goes there
  CPTAIN_EXPECT_COMMIT     warn where the image holds another commit of cptain

\b
Set by the job scripts:
  CPTAIN_DEADLINE          when training stops and saves, in seconds since 1970
  CPTAIN_LINK              which train job of the chain this is, from 1
  CPTAIN_NODE              which of the job's nodes this is, from 0
  CPTAIN_NODES             how many nodes the job asked for
  CPTAIN_GPUS              GPUs of a node, as the site says
  CPTAIN_CORES_PER_GPU     scheduler slots that come with a GPU
  CPTAIN_IMAGE             the image, where Apptainer unpacks it and names a temporary folder
"""


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_ENVIRONMENT,
)
@click.version_option(__version__, prog_name="cptain")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Continual pre-training of LLMs on HPC clusters: one run file from text and a Hugging Face model to a Hugging Face
    model.

    RUN is the run file, which describes the run: docs/run-file.md has its keys.

    \b
    Exit status: 0 done, 1 failed, 2 bad usage or run file, 75 stopped early and resumable.
    """


def _force_option(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--force", is_flag=True, help=f"{what} again what is done.")


def _record(stage: str, run: Any) -> None:
    """Write the resolved run file and the versions into the run's folder: the stage has done something."""
    from cptain.history import read_history
    from cptain.provenance import write_provenance
    from cptain.run_file import write_resolved

    if stage != "export" and not read_history(run.folder):  # what trained stays: see cptain.training.record
        write_resolved(run)
    write_provenance(run, stage)


_workers_option = click.option(
    "--workers", type=click.IntRange(min=1), help="Cores to use.  [default: those there are, 16 at most]"
)


def _threads(workers: int | None) -> int:
    """What --workers asks for; a disk has no more to give beyond 16."""
    return workers or min(16, len(os.sched_getaffinity(0)))


@main.command()
@run_options
@click.option("--workers", type=click.IntRange(min=1), help="Cores to use.  [default: those there are]")
@click.option(
    "--shard",
    type=Shard(),
    help="Do the I-th of N parts of the files, alike in size: for job arrays. The last one to end writes the manifest.",
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
@stage
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
    from cptain.data.validation import preprocess_all as tokenize

    loaded = load(run, overrides)
    cores = workers or len(os.sched_getaffinity(0))
    if tokenize(loaded, cores, force, shard or (1, 1), backend, verify_inputs, count_only):
        _record("preprocess", loaded)


@main.command()
@run_options
@_workers_option
@_force_option("Convert")
@stage
def convert(run: Path, overrides: tuple[str, ...], workers: int | None, force: bool) -> None:
    """Convert the Hugging Face model to Megatron's torch_dist format, on the CPU."""
    loaded = load(run, overrides)
    from cptain.checkpoint.convert import convert as convert_model

    if convert_model(loaded, _threads(workers), force):
        _record("convert", loaded)


@main.command()
@run_options
@click.option("--dry-run", is_flag=True, help="Print the Megatron command, one flag a line, and stop.")
@click.option("--cpu", is_flag=True, help="Train on the CPU, over gloo: real, and slow.")
@click.option(
    "--nproc-per-node",
    type=click.IntRange(min=1),
    help="Processes.  [default: the GPUs there are; with --cpu, as many as hold one copy of the model]",
)
@click.option(
    "--accept",
    multiple=True,
    type=click.Choice(["data"]),
    envvar="CPTAIN_ACCEPT",
    help="Go on though the data of the run is not what it was trained on so far; the history says so. "
    "CPTAIN_ACCEPT=data does the same in a job.",
)
@stage
def train(
    run: Path,
    overrides: tuple[str, ...],
    dry_run: bool,
    cpu: bool,
    nproc_per_node: int | None,
    accept: tuple[str, ...],
) -> None:
    """Train with Megatron-LM on this machine: from the converted checkpoint at first, then from the last one saved."""
    loaded = load(run, overrides)
    if dry_run:
        from cptain.summary import tell
        from cptain.training.prepare import prepare

        command = prepare(loaded, cpu, nproc_per_node, True, accept)
        for line in command.lines:
            click.echo(f"train: {line}", err=True)
        click.echo(command.shown())
        tell(argv=command.argv)
        return
    from cptain.training.launch import train as start

    start(loaded, cpu, nproc_per_node, accept)


@main.command()
@run_options
@click.option(
    "--iteration",
    type=Iteration(),
    default="latest",
    show_default=True,
    help="Which checkpoint to export. final: the last step; an error until training reaches it. "
    "all: every complete one.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Type of the weights.  [default: as they were trained]",
)
@click.option(
    "--shard-size",
    type=Bytes(),
    default="5GB",
    show_default=True,
    help="No file of weights grows over this, unless by a single tensor.",
)
@_workers_option
@_force_option("Export")
@stage
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
    loaded = load(run, overrides)
    import torch

    from cptain.checkpoint.export import export as export_model
    from cptain.checkpoint.export import export_all, iterations

    weights = getattr(torch, dtype) if dtype else None
    if export_all(
        iterations(loaded, iteration),
        lambda one: export_model(loaded, one, _threads(workers), force, weights, shard_size),
    ):
        _record("export", loaded)


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path), required=False)
@click.option(
    "--logits", is_flag=True, help="Compare forward passes on fixed prompts too, in fp32, on a GPU that has room."
)
@click.option("--sample", is_flag=True, help="Compare 1 MB of each tensor: a quick look.")
@_workers_option
@stage
def verify(a: Path, b: Path | None, logits: bool, sample: bool, workers: int | None) -> None:
    """Compare two checkpoints tensor by tensor, or a model with its certificate; exit status 1 on a mismatch.

    A and B are each the folder of a Hugging Face model, or of a Megatron checkpoint: torch_dist, or the legacy torch
    (its root means the latest iteration).

    Without B, A is a model that export or merge wrote: each of its files is compared with the hash in its verify.json,
    and what it was made of too, where that is still there.
    """
    if b is None:
        if logits or sample:
            bad_usage("verify: --logits and --sample compare two checkpoints: give B")
        from cptain.checkpoint.certificate import verify_certificate

        verify_certificate(a, _threads(workers))
        return
    from cptain.checkpoint.verify import verify as compare

    compare(a, b, logits, _threads(workers), sample)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("models", nargs=-1, required=True, metavar="MODEL[=WEIGHT]...")
@click.option(
    "--shard-size",
    type=Bytes(),
    default="5GB",
    show_default=True,
    help="No file of weights grows over this, unless by a single tensor.",
)
@_workers_option
@click.option("--force", is_flag=True, help="Replace a model that is there.")
@stage
def merge(out: Path, models: tuple[str, ...], shard_size: int, workers: int | None, force: bool) -> None:
    """Average models of one shape into a Hugging Face model, on the CPU.

    Each MODEL is the folder of a Hugging Face model, or of a checkpoint of a run (RUN/checkpoints/iter_NNNNNNN). Its
    weight is 1 unless given; weights are divided by their sum.
    """
    from cptain.checkpoint.merge import merge as merge_models
    from cptain.checkpoint.merge import read_weight

    merge_models(out, [read_weight(model) for model in models], _threads(workers), force, shard_size)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("text")
@click.option("--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="At most so many are added.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest each time."
)
@click.option("--seed", type=int, default=1234, show_default=True, help="Of sampling.")
def generate(model: Path, text: str, tokens: int, temperature: float, seed: int) -> None:
    """Continue TEXT with a Hugging Face model, such as an export: a look at whether it still speaks.

    cptain generate <run>/hf/iter_0003600 "The capital of Japan is"
    """
    from cptain.checkpoint.generate import generate

    click.echo(generate(model, text, tokens, temperature, seed))


main.add_command(eval_command)
main.add_command(import_command)
main.add_command(plan_command)


@main.command()
@run_options
@site_option
@click.option("--out", type=click.Path(path_type=Path), help="Where the scripts go.  [default: the run's jobs folder]")
def jobs(run: Path, overrides: tuple[str, ...], site: str | None, out: Path | None) -> None:
    """Render the run's job scripts, and submit.sh, which submits them; print its path.

    The scripts use a copy of the run file as it is now. A [sweep] gives every combination its own.
    """
    from cptain.run_file import load_run
    from cptain.scheduling.render import render

    typed = [str(run), *(word for override in overrides for word in ("--set", override))]
    typed += [*(["--site", site] if site else []), *(["--out", str(out)] if out else [])]
    rendering = render(load_run(run, overrides), run, site, out, shlex.join(typed))
    for line in rendering.lines:
        click.echo(f"jobs: {line}", err=True)
    for name, folder, chain, changes in rendering.runs:
        click.echo(f"jobs: {name}: {folder}, {chain} train job{'s' if chain > 1 else ''}", err=True)
        for change in changes:
            click.echo(f"jobs: {name}: changed since the last time: {change}", err=True)
    click.echo(rendering.submit)


for command in (status, report, doctor):
    main.add_command(command)
