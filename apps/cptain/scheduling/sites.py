"""Sites: what cptain knows of a cluster, one TOML file each (jobs/sites; docs/sites.md says what the keys mean).

A site file is trusted like a script: its lines go into job scripts. What a run file says is not, and is quoted.
"""

import re
import sysconfig
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from cptain.errors import bad_usage
from cptain.toml_file import Duration, Section, read_toml, seconds, validate

# In a checkout the package lies beside jobs/; installed, jobs/ is among the installation's data files.
_CHECKOUT = Path(__file__).resolve().parents[3] / "jobs"
JOBS_FOLDER = _CHECKOUT if _CHECKOUT.is_dir() else Path(sysconfig.get_path("data")) / "share" / "cptain" / "jobs"

_LAUNCHERS = {
    "pbs": ("pbs_tmrsh", "mpirun"),
    "gridengine": ("qrsh", "mpirun"),
    "slurm": ("srun", "mpirun"),
    "local": (),
}


def _one_line(value: str) -> str:
    if "\n" in value:
        raise ValueError("allowed: one line")
    return value


def _directive(value: str) -> str:
    if not value.startswith("-"):
        raise ValueError('allowed: what follows #PBS, #$ or #SBATCH, such as "-q rt_HF"')
    if unknown := set(re.findall(r"\{(\w*)\}", value)) - {"nodes"}:
        raise ValueError(f"{{{unknown.pop()}}}: allowed in braces: {{nodes}}")
    return _one_line(value)


Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, Field(pattern=r"^[\w@%+=:,./-]+$")]
Directives = list[Annotated[str, AfterValidator(_directive)]]


class Site(Section):
    """A cluster, or a kind of it.

    scheduler: whose directives and commands the scripts use.
    launcher: how a train job starts one container a node; needed for more than one node.
    gpus: of a node; 0 trains on the CPU.
    cores_per_gpu: scheduler slots that come with a GPU, where the scheduler gives GPUs in that way.
    train, cpu: directives of the train job ({nodes}: how many), and of the others.
    cpu_walltime: of the jobs that do not train, HH:MM:SS.
    max_nodes, max_walltime: what the scheduler would refuse is refused before.
    needs_group: whether jobs.group must be given.
    modules: environment modules that the host needs.
    apptainer: the program, where it is not on PATH.
    binds: folders that the image sees, with shell wildcards; the system's own are left out.
    scratch: a node's own fast folder, for what is compiled there; may hold $VARIABLES of the job.
    cache: a folder for downloads that all runs share; default: the run's own.
    environment: more variables; values may hold $VARIABLES of the job.
    """

    scheduler: Literal["pbs", "gridengine", "slurm", "local"]
    launcher: Literal["pbs_tmrsh", "qrsh", "srun", "mpirun"] | None = None
    gpus: Annotated[int, Field(ge=0)]
    cores_per_gpu: PositiveInt | None = None
    train: Directives = Field(default_factory=list)
    cpu: Directives = Field(default_factory=list)
    cpu_walltime: Duration = "12:00:00"
    max_nodes: PositiveInt | None = None
    max_walltime: Duration | None = None
    needs_group: bool = False
    modules: list[Word] = Field(default_factory=list)
    apptainer: Line = "apptainer"
    binds: list[Annotated[str, Field(pattern=r"^/[\w./*?-]*$")]] = Field(default_factory=lambda: ["/*"])
    scratch: Line | None = None
    cache: Line | None = None
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Line] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _launcher_is_of_the_scheduler(self) -> Self:
        allowed = _LAUNCHERS[self.scheduler]
        if self.launcher is not None and self.launcher not in allowed:
            raise ValueError(
                f'launcher = "{self.launcher}" with scheduler = "{self.scheduler}": '
                f"allowed: {', '.join(allowed) or 'none: it has one node'}"
            )
        return self

    def __str__(self) -> str:
        """What it is, in a line."""
        gpus = f"{self.gpus} GPUs a node" if self.gpus else "no GPUs: trains on the CPU"
        launcher = f"launcher {self.launcher}" if self.launcher else "no launcher: one node a job"
        return f"{self.scheduler}, {launcher}, {gpus}"

    def check(self, name: str, nodes: int, walltime: str | None, group: str | None) -> None:
        """Refuse a job that the site would.

        Args:
            name: the site's, for errors.
            nodes: jobs.nodes.
            walltime: jobs.walltime, HH:MM:SS.
            group: jobs.group.

        Raises:
            CptainError: exit status 2, names the key of the run file.
        """
        if nodes > 1 and self.launcher is None:
            bad_usage(f"jobs.nodes = {nodes}: site {name} has no launcher, and so one node a job")
        if self.max_nodes is not None and nodes > self.max_nodes:
            bad_usage(f"jobs.nodes = {nodes}: site {name} allows at most {self.max_nodes}")
        if walltime is None and self.scheduler != "local":
            bad_usage(f'jobs.walltime: is missing, and site {name} needs it: allowed: HH:MM:SS, such as "12:00:00"')
        if walltime and self.max_walltime and seconds(walltime) > seconds(self.max_walltime):
            bad_usage(f"jobs.walltime = {walltime}: site {name} allows at most {self.max_walltime}")
        if self.needs_group and group is None:
            bad_usage(f"jobs.group: is missing, and site {name} needs it")


def load_site(name_or_path: str) -> tuple[Site, Path]:
    """A site and its file.

    Args:
        name_or_path: a name under jobs/sites, or the path of a .toml file.

    Raises:
        CptainError: exit status 2; an unknown name, or a file that is wrong.
    """
    if name_or_path.endswith(".toml"):
        file = Path(name_or_path)
    else:
        file = JOBS_FOLDER / "sites" / f"{name_or_path}.toml"
        names = sorted(found.stem for found in (JOBS_FOLDER / "sites").glob("*.toml"))
        if name_or_path not in names:
            bad_usage(f'site "{name_or_path}": allowed: {", ".join(names)}, or the path of a .toml file of your own')
    return validate(Site, read_toml(file, "site file"), file), file
