"""Sites: what cptain knows of a cluster, one TOML file each (jobs/sites; docs/sites.md says what the keys mean).

A site file is trusted like a script: its lines go into job scripts. What a run file says is not, and is quoted.
"""

import re
import sysconfig
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from cptain.errors import bad_usage
from cptain.run_file import Jobs
from cptain.run_values import VariableName
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


def _directive(value: str, *braces: str) -> str:
    if not value.startswith("-"):
        raise ValueError('allowed: what follows #PBS, #$ or #SBATCH, such as "-q rt_HF"')
    if unknown := set(re.findall(r"\{(\w*)\}", value)) - {"nodes", *braces}:
        raise ValueError(
            f"{{{unknown.pop()}}}: allowed in braces: {', '.join(f'{{{name}}}' for name in ('nodes', *braces))}"
        )
    return _one_line(value)


Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, Field(pattern=r"^[\w@%+=:,./-]+$")]
Directives = list[Annotated[str, AfterValidator(_directive)]]

# Of the user's own shell: what changes how a job talks to the network, and what says how it goes on.
_OF_THE_USER = [
    "WANDB_*",
    "HF_HUB_*",
    "HF_ENDPOINT",
    "NCCL_*",
    "CPTAIN_ACCEPT",
    "http_proxy",
    "https_proxy",
    "no_proxy",
]
_OF_THE_USER += ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"]


class Reservation(Section):
    """What a train job on reserved nodes (jobs.reservation) is told and allowed instead.

    directives: in the place of those of `train` with the same option; {reservation} becomes jobs.reservation.
    max_nodes, max_walltime: as the site's.
    """

    directives: list[Annotated[str, AfterValidator(lambda value: _directive(value, "reservation"))]]
    max_nodes: PositiveInt | None = None
    max_walltime: Duration | None = None


class Site(Section):
    """A cluster, or a kind of it.

    scheduler: whose directives and commands the scripts use.
    launcher: how a train job starts one container a node; needed for more than one node.
    gpus: of a node; 0 trains on the CPU.
    gpu_memory: of each, GiB, as the driver reports it; what cannot fit is refused.
    cores_per_gpu: scheduler slots that come with a GPU, where the scheduler gives GPUs in that way.
    train, cpu: directives of the train job ({nodes}: how many), and of the others; submit.sh joins their "-v A=1" with
        its own variables, because qsub -v takes the place of a script's.
    reservation: how reserved nodes are asked for.
    cpu_walltime: of the jobs that do not train, HH:MM:SS.
    max_nodes, max_walltime: what the scheduler would refuse is refused before.
    needs_group: whether jobs.group must be given.
    modules: environment modules that the host needs.
    apptainer: the program, where it is not on PATH.
    binds: folders that the image sees, with shell wildcards; the system's own are left out.
    scratch: a node's own fast folder, for what is compiled there; may hold $VARIABLES of the job.
    cache: a folder for downloads that all runs share; default: the run's own.
    environment: more variables; values may hold $VARIABLES of the job.
    user_environment: variables of the shell that submits which the jobs get, as submit.sh finds them; * is any ending.
    group_readable_logs: the group may read the logs, whatever the user's umask.
    offline: the nodes of the jobs reach nothing outside: the hub and Weights & Biases are offline unless the user says.
    """

    scheduler: Literal["pbs", "gridengine", "slurm", "local"]
    launcher: Literal["pbs_tmrsh", "qrsh", "srun", "mpirun"] | None = None
    gpus: Annotated[int, Field(ge=0)]
    gpu_memory: PositiveFloat | None = None
    cores_per_gpu: PositiveInt | None = None
    train: Directives = Field(default_factory=list)
    cpu: Directives = Field(default_factory=list)
    reservation: Reservation | None = None
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
    user_environment: list[VariableName] = Field(default_factory=lambda: list(_OF_THE_USER))
    group_readable_logs: bool = False
    offline: bool = False

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

    def train_directives(self, nodes: int, reservation: str | None) -> list[str]:
        """The train job's directives; a reservation's are in the place of the site's with the same option."""
        reserved = self.reservation.directives if self.reservation and reservation else []
        options = {line.split()[0] for line in reserved} - {"-l", "-v"}  # of these there may be several
        lines = [line for line in self.train if line.split()[0] not in options] + reserved
        return [line.replace("{nodes}", str(nodes)).replace("{reservation}", reservation or "") for line in lines]

    def check(self, name: str, jobs: Jobs) -> None:
        """Refuse a job that the site would.

        Args:
            name: the site's, for errors.
            jobs: the run file's.

        Raises:
            CptainError: exit status 2, names the key of the run file.
        """
        nodes, walltime = jobs.nodes, jobs.walltime
        if nodes > 1 and self.launcher is None:
            bad_usage(f"jobs.nodes = {nodes}: site {name} has no launcher, and so one node a job")
        if jobs.reservation and self.reservation is None:
            bad_usage(
                f"jobs.reservation = {jobs.reservation}: site {name} does not say how one is used ([reservation])"
            )
        limits = self.reservation if self.reservation and jobs.reservation else self
        without = " without jobs.reservation" if self.reservation and not jobs.reservation else ""
        if limits.max_nodes is not None and nodes > limits.max_nodes:
            bad_usage(f"jobs.nodes = {nodes}: site {name} allows at most {limits.max_nodes}{without}")
        if walltime is None and self.scheduler != "local":
            bad_usage(f'jobs.walltime: is missing, and site {name} needs it: allowed: HH:MM:SS, such as "12:00:00"')
        if walltime and limits.max_walltime and seconds(walltime) > seconds(limits.max_walltime):
            bad_usage(f"jobs.walltime = {walltime}: site {name} allows at most {limits.max_walltime}{without}")
        if self.needs_group and jobs.group is None:
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
