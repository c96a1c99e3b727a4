"""The commands that tell about runs and change none: what one needs, how its jobs are, what it did, where it would run,
and what an earlier script's was.

Apart from cli.py, which has the stages; the same options, loading and errors.
"""

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import click

from cptain.errors import Interrupted, bad_usage
from cptain.option_types import load, run_options, set_option, site_option


@click.command("plan")
@run_options
@site_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan_command(run: Path, overrides: tuple[str, ...], site: str | None, as_json: bool) -> None:
    """Show what a run needs: memory a GPU, what fits, the fastest layout, time, epochs and disk. No GPU is needed."""
    from cptain.plan import lines, plan
    from cptain.scheduling.sites import load_site

    loaded = load(run, overrides)
    name = site or loaded.jobs.site
    document = plan(loaded, load_site(name)[0] if name else None)
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(lines(document)))


@click.command()
@click.argument("path", type=click.Path(path_type=Path), default=".", metavar="[RUN|DIR]")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--watch", is_flag=True, help="Look again every 10 seconds, until Ctrl-C.")
@click.option(
    "--jobs",
    "submitted",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Instead: the jobs in this file of submit.sh's, a line each. The scheduler's own output comes on stdin: "
    "bash submit.sh --state asks the scheduler on the host, and calls this.",
)
def status(path: Path, as_json: bool, watch: bool, submitted: Path | None) -> None:
    """Show how runs are: a line each of those under a work_dir, or more of one, and where the time of its chain went.

    RUN is a run file or a run's folder, DIR a work_dir. Both read only what the stages left there. How a job is, is
    what submit.sh --state last heard of the scheduler.
    """
    if submitted:
        from cptain.scheduling.state import table

        click.echo("\n".join(table(submitted, sys.stdin.read())))
        return
    from cptain.scheduling.overview import shown

    try:
        click.echo(shown(path, as_json))
        while watch:
            time.sleep(10)
            text = shown(path, as_json)
            click.clear()
            click.echo(text)
    except Interrupted:
        if not watch:
            raise


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where it goes.  [default: report.html in the run's folder; of several, here]",
)
@click.option(
    "--png", type=click.Path(path_type=Path), metavar="DIR", help="Each figure as a PNG file too, for papers."
)
@click.option(
    "--watch",
    "every",
    type=click.IntRange(min=1),
    metavar="SECONDS",
    help="Write it again every so many seconds, until Ctrl-C; the page, once open, loads itself as often.",
)
def report(runs: tuple[Path, ...], out: Path | None, png: Path | None, every: int | None) -> None:
    """Write what runs did into one HTML file that opens anywhere; print its path.

    RUN is a run file, with all runs of its [sweep], or a run's folder. Of several the curves lie over one another, and
    their last values are in a table.
    """
    from cptain.report.page import watch_report, write_report

    if every and png:
        bad_usage("report: --png is written once: leave out --watch")
    if every:
        with suppress(Interrupted):  # and what is left then is a page that stays as it is
            watch_report(list(runs), out, every, lambda file: click.echo(f"report: {file}", err=True))
    click.echo(write_report(list(runs), out, png))


@click.command("eval")
@run_options
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    metavar="NAME",
    help="A task of the harness, or a group. Repeatable.",
)
@click.option(
    "--tasks-folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of more tasks, in the harness's YAML; their data may be files.",
)
@click.option("--few-shot", type=click.IntRange(min=0), help="Examples before each question.  [default: the task's]")
@click.option("--limit", type=click.IntRange(min=1), help="Questions of each task.  [default: all]")
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Questions at once.  [default: what fits on a GPU; 1 without]"
)
@click.option("--force", is_flag=True, help="Do again what is done: for a task that was changed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def eval_command(
    run: Path,
    overrides: tuple[str, ...],
    tasks: tuple[str, ...],
    tasks_folder: Path | None,
    few_shot: int | None,
    limit: int | None,
    batch_size: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Score the base model and the run's exports in tasks of lm-evaluation-harness: what was won, what forgotten.

    What is in <run>/eval.json already, of the same weights, task and options, is not done again.

    cptain eval run.toml --task jsquad --task gsm8k --few-shot 4
    """
    from cptain.checkpoint.evaluate import Settings, evaluate, table

    settings = Settings(few_shot, limit)
    scores = evaluate(load(run, overrides), list(dict.fromkeys(tasks)), settings, tasks_folder, batch_size, force)
    click.echo(json.dumps({"scores": [asdict(one) for one in scores]}, indent=2) if as_json else table(scores))


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@set_option
@site_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--nodes",
    is_flag=True,
    help="As a node of a job: one line, and exit status 0 whatever it says. submit.sh doctor does this everywhere.",
)
def doctor(run: Path | None, overrides: tuple[str, ...], site: str | None, as_json: bool, nodes: bool) -> None:
    """Look for what would make a training fail, or go wrong in silence; say what to do.

    Without RUN this machine is looked at; with it the run too, which is not changed. --site without RUN checks a site
    file, and prints what the site is. Every check has a time limit, and all take half a minute.

    Exit status 1 where a check fails, and 0 where some only warn; 2 where the run file or the site file is wrong.
    """
    from cptain.scheduling.sites import load_site

    if site and not run:
        checked, file = load_site(site)
        click.echo(f"{file}: {checked}")
        return
    from cptain.doctor.checks import Subject
    from cptain.doctor.report import as_json as document
    from cptain.doctor.report import check_none_failed, examine, line_of_node, table

    loaded = load(run, overrides) if run else None
    # A job's nodes are what they are, whatever site the jobs were rendered for.
    name = None if nodes else site or (loaded.jobs.site if loaded else None)
    subject = Subject(loaded, in_job=nodes)
    if name:
        checked, file = load_site(name)
        subject = Subject(loaded, checked, file.stem, nodes)
    results = examine(subject)
    if nodes:
        click.echo(line_of_node(results))
        return
    click.echo(document(results) if as_json else table(results))
    check_none_failed(results)


@click.command("import-script", context_settings={"ignore_unknown_options": True})
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, metavar="[ARGUMENT]...")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The run file.  [default: FILE's name with .toml, here]",
)
@click.option(
    "-v", "variables", multiple=True, metavar="NAME=VALUE", help="A variable that qsub -v gave it. Repeatable."
)
@click.option(
    "--megatron",
    "tree",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A checkout of Megatron-LM, whose parser compares both in the place of the installed one's.",
)
@click.option("--force", is_flag=True, help="Write over a file that is there.")
def import_command(
    file: Path,
    arguments: tuple[str, ...],
    out: Path | None,
    variables: tuple[str, ...],
    tree: Path | None,
    force: bool,
) -> None:
    """Make a run file of FILE, a shell script that starts Megatron's pretrain_gpt.py; print its path.

    FILE is read and not run: no program in it is started, no file is written or removed, and none is read but those
    that it sources. What of it has no key is said, each with its line and reason; so is what Megatron's own parser
    makes otherwise of the script's arguments and of cptain's. ARGUMENTs are the script's own.

    Exit status 1 where it starts no pretrain_gpt.py, 2 where it cannot be read.
    """
    from cptain.shell_script.import_script import import_script

    made, lines = import_script(file, arguments, variables, out, force, tree)
    for line in lines:
        click.echo(line, err=True)
    click.echo(made)
