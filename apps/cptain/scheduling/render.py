"""jobs: from a run file and a site to the job scripts, and to the script that submits them.

The texts are Jinja2 templates in jobs/templates. Whatever a run file says reaches them quoted for the shell, or is of a
form that needs no quoting; nothing in a run file can run a command in a script.
"""

import math
import os
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tomli_w

from cptain import __version__, atomic
from cptain.data.steps import known_steps
from cptain.errors import bad_usage
from cptain.image import commit, image_here, was_unpacked
from cptain.megatron.log import read_steps, train_logs
from cptain.run_file import RunFile, changed_keys
from cptain.scheduling.before_queue import check_before_queue, check_disks
from cptain.scheduling.on_site import estimated_step
from cptain.scheduling.sites import JOBS_FOLDER, Site, load_site
from cptain.scheduling.sweep import expand
from cptain.toml_file import seconds

STAGES = ("preprocess", "convert", "train", "export")
_SCRIPTS = (*STAGES, "doctor")  # doctor's looks at the nodes that train's would get
_DOCTOR_WALLTIME = "00:10:00"
_CHAIN_UNKNOWN = 2  # train jobs, where nothing tells how long a step takes
_LONGEST_CHAIN = 100
_ARRAY_INDEX = {"pbs": "$PBS_ARRAY_INDEX", "gridengine": "$SGE_TASK_ID", "slurm": "$SLURM_ARRAY_TASK_ID"}
_DELETE = {"pbs": "qdel", "gridengine": "qdel", "slurm": "scancel", "local": ""}
_ANOTHER_RUN = {
    "pbs": "qsub -v RUN=FILE,IMAGE=FILE",
    "gridengine": "qsub -v RUN=FILE,IMAGE=FILE",
    "slurm": "sbatch --export=ALL,RUN=FILE,IMAGE=FILE",
    "local": "RUN=FILE IMAGE=FILE bash",
}


@dataclass(frozen=True)
class _Rendered:
    """The scripts of one run.

    Attributes:
        run: the run.
        folder: where its scripts are.
        logs: where its jobs are submitted from, and leave their output; None: wherever submit.sh is called.
        chain: how many train jobs follow one another.
    """

    run: RunFile
    folder: Path
    logs: Path | None
    chain: int


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(JOBS_FOLDER / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # "{#" is bash's, in ${#array[@]}
        comment_end_string="##}",
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment


def _in_double_quotes(value: str) -> str:
    """A site's value for the shell: $NAME and ${NAME} are the job's, everything else is as written."""
    escaped = re.sub(r'(["`\\]|\$(?!\{?[A-Za-z_]))', r"\\\1", value)
    return f'"{escaped}"'


def job_name(stage: str, run_name: str) -> str:
    """What the scheduler shows: letters, digits and ._- alone, which all of them take."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{stage}-{run_name}")[:60].rstrip("-.")


def _another_run(site: Site, directives: list[str], script: str) -> str:
    """How a script is submitted for another run file; qsub's -v takes the place of that of the script."""
    more = _variables(directives) if site.scheduler in ("pbs", "gridengine") else ""
    return f"{_ANOTHER_RUN[site.scheduler]}{',' if more else ''}{more} {script}"


def _environment(site: Site) -> list[str]:
    """The site's variables as NAME="value" for the shell."""
    settings = dict(site.environment)
    if site.scratch is not None:
        settings.setdefault("TMPDIR", site.scratch)
    if site.cache is not None:
        settings.setdefault("HF_HOME", f"{site.cache}/huggingface")
        settings.setdefault("XDG_CACHE_HOME", site.cache)
    if here := commit():  # rendered inside an image: its jobs expect the same
        settings.setdefault("CPTAIN_EXPECT_COMMIT", here)
    lines = [f"{name}={_in_double_quotes(value)}" for name, value in settings.items()]
    if site.offline:
        lines += ['"HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}"', '"WANDB_MODE=${WANDB_MODE:-offline}"']
    return lines


def _needed(site: Site, name: str) -> list[str]:
    """Lines of a script that refuse variables in the site's values which the job has not: a folder would be empty, or
    at the root. ${NAME:-default} needs none.
    """
    folders = {"scratch": site.scratch, "cache": site.cache}
    lines = []
    for key, value in [*folders.items(), *site.environment.items()]:
        for braced, plain in re.findall(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))", value or ""):
            variable = braced or plain
            said = re.sub(r'(["`\\$])', r"\\\1", f'{key} = "{value}" of site {name}')
            asked = f"{variable}-" if key in folders else f"{variable}+set"
            how = f"{variable} is ${{{variable}-not set}}${{{variable}+empty}} in this job"
            lines.append(f'[ -n "${{{asked}}}" ] || fail "{said}: {how}"')
    return lines


def _one_variable_list(directives: list[str]) -> list[str]:
    """Directives with their "-v A=1" (or "-vA=1") joined into one: of several, PBS takes the last."""
    variables = _variables(directives)
    others = [line for line in directives if not line.startswith("-v")]
    return [*others, *([f"-v {variables}"] if variables else [])]


def _variables(directives: list[str]) -> str:
    """Those of all their -v, as a script or a shell has them."""
    return ",".join(line.removeprefix("-v").strip() for line in directives if line.startswith("-v"))


def _earlier_seconds_per_step(run: RunFile) -> float | None:
    """The median step of the run's logs, or None."""
    times = sorted(step.seconds for step in read_steps(train_logs(run.logs_folder)))
    return times[len(times) // 2] if times else None


def chain_length(run: RunFile, estimate: float | None = None) -> int:
    """How many train jobs the run needs: as jobs.chain says, or from the steps, the time of each and the walltime.

    One more than the steps need, for what goes wrong; a job that finds nothing left to do ends at once.

    Args:
        run: the run.
        estimate: seconds of a step, where neither the run file nor earlier logs say.
    """
    if run.jobs.chain != "auto":
        return run.jobs.chain
    if run.jobs.walltime is None:
        return 1
    a_step, steps = run.jobs.seconds_per_step or _earlier_seconds_per_step(run) or estimate, known_steps(run)
    if a_step is None or steps is None:
        return _CHAIN_UNKNOWN
    a_job = seconds(run.jobs.walltime) - seconds(run.jobs.margin)
    needed = math.ceil(run.train.whole_steps(steps) * a_step / a_job) + 1
    if needed > _LONGEST_CHAIN:
        bad_usage(
            f"jobs.chain: {steps} steps of {a_step:g} s are {needed} jobs of {run.jobs.walltime}: "
            f"more than {_LONGEST_CHAIN} are submitted only where jobs.chain says so"
        )
    return needed


def check_on_site(run: RunFile, site: Site, name: str) -> None:
    """Refuse a run that the site or the scheduler would."""
    jobs = run.jobs
    site.check(name, jobs)
    if jobs.walltime and seconds(jobs.margin) >= seconds(jobs.walltime):
        bad_usage(f"jobs.walltime = {jobs.walltime}: nothing is left of it after jobs.margin = {jobs.margin}")
    for key, value in (("name", run.name), ("work_dir", run.work_dir), ("jobs.image", jobs.image)):
        if any(ord(character) < 32 for character in str(value)):
            bad_usage(f"{key} = {str(value)!r}: a control character cannot stand in a job script")
    paths = {"work_dir": run.work_dir, "model.hf": run.model.hf, "model.tokenizer": run.model.tokenizer}
    paths |= {"model.megatron": run.model.megatron, "data.output": run.data.output, "train.script": run.train.script}
    if run.model.vocabulary:
        paths |= {f"model.vocabulary.{key}": getattr(run.model.vocabulary, key) for key in ("add", "tokenizer")}
    paths |= {"jobs.image": jobs.image, **{f"data.input[{n}]": glob for n, glob in enumerate(run.data.input)}}
    paths |= {f"data.tokenized[{n}]": glob for n, glob in enumerate(run.data.tokenized)}
    for key, path in paths.items():
        if re.search(r"\$[\w{]", str(path)):  # the jobs' copy of the run file is read once more
            bad_usage(f'{key} = "{path}": the jobs would take the $ in it for a variable: rename the folder')


def image_of(run: RunFile) -> str:
    """The image's path on the host."""
    image = run.jobs.image or image_here()
    if not image:
        why = " (the one in use here was unpacked into a folder that is removed)" if was_unpacked() else ""
        bad_usage(f'jobs.image: is missing{why}: allowed: the path of the image, such as "/shared/cptain.sif"')
    return str(image)


def _warnings(runs: list[RunFile], site: Site, name: str) -> list[str]:
    """What no job says before it is too late; what one would refuse is refused."""
    lines = list(dict.fromkeys(line for one in runs for line in check_before_queue(one, site, Path(image_of(one)))))
    check_disks(runs)
    if site.offline:
        where = "the hub and Weights & Biases are offline in its jobs (wandb sync sends what they keep)"
        lines.append(f"site {name} has no way out: {where}")
    return lines


def _shortest(*durations: str | None) -> str:
    return min((duration for duration in durations if duration), key=seconds)


def _scripts(
    run: RunFile, site: Site, site_name: str, run_file: str, rendered_by: str, templates: jinja2.Environment
) -> dict[str, str]:
    """The text of the run's stage scripts, by file name."""
    jobs = run.jobs
    array = jobs.shards > 1 and site.scheduler != "local"
    scripts = {}
    for stage in _SCRIPTS:
        train, on_its_nodes = stage == "train", stage in ("train", "doctor")
        options = {
            "preprocess": f' --shard "{_ARRAY_INDEX.get(site.scheduler)}/{jobs.shards}"' if array else "",
            "export": " --iteration final",
        }
        longest = _DOCTOR_WALLTIME if stage == "doctor" else site.cpu_walltime
        walltime = jobs.walltime if train else _shortest(longest, site.max_walltime)
        directives = site.train_directives(jobs.nodes, jobs.reservation) if on_its_nodes else site.cpu
        scripts[f"{stage}.sh"] = templates.get_template("stage.sh.j2").render(
            stage=stage,
            name=run.name,
            job_name=job_name(stage, run.name),
            rendered_by=rendered_by,
            another_run=_another_run(site, directives, f"{stage}.sh"),
            scheduler=site.scheduler,
            launcher=site.launcher,
            group=jobs.group,
            mail=jobs.mail,
            directives=_one_variable_list(directives),
            walltime=walltime,
            tasks=jobs.shards if array and stage == "preprocess" else None,
            deadline=seconds(walltime) - seconds(jobs.margin) if train and walltime else None,
            margin=jobs.margin,
            run_file=run_file,
            image=image_of(run),
            modules=site.modules,
            apptainer=site.apptainer,
            binds=site.binds,
            environment=_environment(site),
            needed=_needed(site, site_name),
            nodes=jobs.nodes,
            gpus=site.gpus,
            cores_per_gpu=site.cores_per_gpu,
            group_readable_logs=site.group_readable_logs,
            options=options.get(stage, ""),
        )
    return scripts


def _submissions(rendered: list[_Rendered], submit_folder: Path) -> list[str]:
    """submit.sh's last lines: what runs share once, and each run's chain of train jobs and its export."""

    def here(path: Path | None) -> str:
        relative = "." if path is None else os.path.relpath(path, submit_folder)
        return "." if path is None else '"$here"' + ("" if relative == "." else f"/{shlex.quote(relative)}")

    lines: list[str] = []
    made: dict[tuple[str, Path], str] = {}
    names = [job_name("", one.run.name) for one in rendered]
    for number, one in enumerate(rendered, 1):
        unique = names[number - 1] if names.count(names[number - 1]) == 1 else f"-{number}"
        suffix = unique if len(rendered) > 1 else ""
        inputs = []
        for stage, folder in (("preprocess", one.run.data_folder), ("convert", one.run.megatron_folder)):
            if (stage, folder) not in made:
                made[stage, folder] = f"{stage}{suffix}"
                lines.append(f"submit {stage}{suffix} 1 {here(one.logs)} {here(one.folder / f'{stage}.sh')}")
            inputs.append(made[stage, folder])
        lines.append(f"submit doctor{suffix} 1 {here(one.logs)} {here(one.folder / 'doctor.sh')}")
        suffix = suffix or "''"
        lines.append(f"finish {suffix} {one.chain} {here(one.logs)} {here(one.folder)} {' '.join(inputs)}")
    return lines


def _write_script(file: Path, text: str) -> None:
    with atomic.atomic_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
        partial.chmod(0o755)


def _make_logs(logs: Path, group_readable: bool) -> None:
    """Make a run's folder of logs, which the group may read where it is asked for, through the run's own."""
    logs.mkdir(parents=True, exist_ok=True)
    if group_readable:
        logs.parent.chmod(logs.parent.stat().st_mode | 0o010)
        logs.chmod(logs.stat().st_mode | 0o050)


def _frozen(run: RunFile) -> dict[str, Any]:
    return run.model_dump(mode="json", exclude_none=True, exclude={"sweep"})


def _freeze(run: RunFile, file: Path) -> list[str]:
    """Write the run file that the scripts use, so that later edits of the original change no job; what changed."""
    content, changes = _frozen(run), []
    if file.exists():
        changes = changed_keys(tomllib.loads(file.read_text(encoding="utf-8")), content)
    atomic.write_text(file, tomli_w.dumps(content))
    return changes


@dataclass(frozen=True)
class Rendering:
    """What `render` wrote.

    Attributes:
        submit: the script that submits all jobs.
        lines: what the user should know before submitting.
        runs: for each its name, its folder of scripts, how many train jobs it has, and what changed in its run file.
    """

    submit: Path
    lines: list[str]
    runs: list[tuple[str, Path, int, list[str]]]


def render(run: RunFile, file: Path, site_name: str | None, out: Path | None, typed: str) -> Rendering:
    """Write the job scripts of a run file, or of each run of its [sweep].

    Args:
        run: the run file, as loaded.
        file: where it was read.
        site_name: a name under jobs/sites or a file's path; default: jobs.site.
        out: where the scripts go, and their copy of the run file; default: the run's jobs folder.
        typed: the arguments of `cptain jobs`, for the scripts' first lines.

    Raises:
        CptainError: exit status 2; what the site would refuse, or what no script can hold.
    """
    name = site_name or run.jobs.site
    if name is None:
        bad_usage(f"{file}: jobs.site: is missing; --site names one too")
    site, site_file = load_site(name)
    rendered_by = f"cptain jobs {typed} (cptain {__version__}, site {site_file.stem})"
    if any(ord(character) < 32 for character in rendered_by):
        bad_usage(f"{file}: a path with a control character cannot stand in a job script")
    templates = _templates()
    runs = expand(run, file)
    for one in runs:
        check_on_site(one, site, site_file.stem)
    warnings = _warnings(runs, site, site_file.stem)
    texts = []
    for one in runs:
        folder = (out / one.name if run.sweep else out) if out else one.folder / "jobs"
        frozen = folder / "run.toml"
        if frozen.resolve() == file.resolve():
            bad_usage(f"{file}: the jobs' copy of the run file would take its place: name another folder with --out")
        rendered = _Rendered(
            one, folder, None if out else one.logs_folder, chain_length(one, estimated_step(one, site))
        )
        texts.append((rendered, frozen, _scripts(one, site, site_file.stem, str(frozen), rendered_by, templates)))
    submit_folder = out or run.folder / "jobs"
    written = []
    for rendered, frozen, scripts in texts:
        changes = _freeze(rendered.run, frozen)
        for script, text in scripts.items():
            _write_script(rendered.folder / script, text)
        if rendered.logs:
            _make_logs(rendered.logs, site.group_readable_logs)
        written.append((rendered.run.name, rendered.folder, rendered.chain, changes))
    submit = templates.get_template("submit.sh.j2").render(
        name=run.name,
        rendered_by=rendered_by,
        scheduler=site.scheduler,
        group=run.jobs.group,
        image=image_of(run),
        delete=_DELETE[site.scheduler],
        apptainer=site.apptainer,
        user_environment=list(
            dict.fromkeys([*site.user_environment, *(name for one in runs for name in one.jobs.environment)])
        ),
        submissions=_submissions([rendered for rendered, _, _ in texts], submit_folder),
    )
    _write_script(submit_folder / "submit.sh", submit)
    return Rendering(submit_folder / "submit.sh", warnings, written)
