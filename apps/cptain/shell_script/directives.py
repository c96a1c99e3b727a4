"""The scheduler's directives at the head of a job script: nodes, walltime, account, and which site they are of.

From them follows what the scheduler gives a job on the cluster: variables, the list of hosts, and how many GPUs
nvidia-smi lists. Directives on the command line of qsub or sbatch are not in the script, and not known.
"""

import re
from dataclasses import dataclass, field

_LINE = re.compile(r"^#(\$|PBS|SBATCH)\s+(.+?)\s*$")
_SITES = {"node_f": "tsubame4", "rt_HF": "abci3"}
_GPUS = {"tsubame4": 4, "abci3": 8}
_SLOTS = 48  # of a host in TSUBAME's list of hosts, for each of its GPUs
_MOST_NODES = 100_000


@dataclass
class Directives:
    """What they say; "" and None where they do not.

    Attributes:
        scheduler: "gridengine", "pbs" or "slurm".
        site: the site under jobs/sites whose directives these are.
        nodes: of the job.
        gpus: of a node.
        walltime: HH:MM:SS.
        group: whose account is charged.
        queue: PBS's queue.
        unread: directives that no key of a run file says, each with its line.
    """

    scheduler: str = ""
    site: str = ""
    nodes: int | None = None
    gpus: int | None = None
    walltime: str = ""
    group: str = ""
    queue: str = ""
    unread: dict[int, str] = field(default_factory=dict)

    @property
    def hosts(self) -> list[str]:
        """Names for the job's hosts."""
        return [f"node{number}" for number in range(1, min(self.nodes or 0, _MOST_NODES) + 1)]

    def variables(self) -> dict[str, str]:
        """Those that the scheduler sets in a job and that follow from the directives."""
        nodes = {} if self.nodes is None else {"NHOSTS": self.nodes} if self.scheduler == "gridengine" else {}
        if self.scheduler == "slurm" and self.nodes is not None:
            nodes = {"SLURM_NNODES": self.nodes, "SLURM_JOB_NUM_NODES": self.nodes}
        found = {name: str(count) for name, count in nodes.items()}
        if self.queue:
            found["PBS_QUEUE"] = self.queue
        if self.scheduler == "slurm" and self.gpus is not None:
            found["SLURM_GPUS_ON_NODE"] = str(self.gpus)
        return found

    def files(self) -> dict[str, str]:
        """The lists of hosts that the scheduler leaves for a job, by the script's name for them."""
        if not self.nodes:
            return {}
        lines = {
            "gridengine": [f"{host} {(self.gpus or 1) * _SLOTS} queue@{host} UNDEFINED\n" for host in self.hosts],
            "pbs": [f"{host}\n" for host in self.hosts for _ in range(self.gpus or 1)],
        }.get(self.scheduler)
        name = {"gridengine": "$PE_HOSTFILE", "pbs": "$PBS_NODEFILE"}.get(self.scheduler, "")
        return {name: "".join(lines)} if lines else {}

    def programs(self) -> dict[str, str]:
        """What programs print that list the node's GPUs."""
        if self.gpus is None:
            return {}
        return {"nvidia-smi -L": "".join(f"GPU {number}\n" for number in range(self.gpus))}


def duration(text: str) -> str:
    """A walltime as HH:MM:SS, from [[D:]H:]MM:SS, Slurm's D-HH:MM:SS and MM, or seconds; "" where it is none."""
    if match := re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?", text):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    elif re.fullmatch(r"\d+(:\d+){1,3}", text):
        days, hours, minutes, rest = ([0] * 4 + [int(part) for part in text.split(":")])[-4:]
    else:
        return ""
    whole = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _grid_engine(found: Directives, option: str) -> bool:
    if match := re.fullmatch(r"-l\s+(\w+)=([\w:]+)", option):
        name, value = match.groups()
        if name == "h_rt":
            found.walltime = duration(value if ":" in value else f"0:{value}")
            return bool(found.walltime)
        if value.isdigit() and re.fullmatch(r"node_\w+|rt_\w+|gpu_\w+", name):
            found.nodes, found.site = int(value), _SITES.get(name, "")
            return bool(found.site)
    if match := re.fullmatch(r"-g\s+(\S+)", option):
        found.group = match[1]
        return True
    return bool(re.fullmatch(r"-cwd|-V|-j\s+\w+|-[oeNS]\s+\S+|-o\s+\S+.*", option))


def _pbs(found: Directives, option: str) -> bool:
    done = False
    found.site = next((site for name, site in _SITES.items() if name in option), found.site)
    if match := re.search(r"-l\s+select=(\d+)(\S*)", option):
        found.nodes, done = int(match[1]), True
        if gpus := re.search(r"(?:mpiprocs|ngpus)=(\d+)", match[2]):
            found.gpus = int(gpus[1])
    if match := re.search(r"-?l?\s*walltime=([\d:]+)", option):
        found.walltime = duration(match[1])
        done = bool(found.walltime)
    for name, letter in (("group", "P"), ("group", "W group_list="), ("queue", "q")):
        if match := re.fullmatch(rf"-{letter}\s*(\S+)", option):
            setattr(found, name, match[1])
            return True
    return done or bool(re.fullmatch(r"-[koejNvmV]\s*.*", option))


def _slurm(found: Directives, option: str) -> bool:
    match = re.fullmatch(r"(--?[\w-]+?)(?:=|\s+)(\S+)", option)
    if not match:
        return option in ("--exclusive",)
    name, value = match.groups()
    if name in ("--nodes", "-N") and value.isdigit():
        found.nodes = int(value) or None
    elif name in ("--gpus-per-node", "--gres", "--ntasks-per-node") and (digits := re.search(r"(\d+)$", value)):
        found.gpus = found.gpus or int(digits[1])
    elif name in ("--time", "-t"):
        minutes = re.fullmatch(r"\d+", value)
        found.walltime = duration(f"{value}:00" if minutes else value)
        return bool(found.walltime)
    elif name in ("--account", "-A"):
        found.group = value
    else:
        return name in ("--job-name", "-J", "--output", "-o", "--error", "-e", "--export", "--open-mode")
    return True


def read_directives(text: str) -> Directives:
    """The directives of a job script."""
    found = Directives()
    readers = {"$": ("gridengine", _grid_engine), "PBS": ("pbs", _pbs), "SBATCH": ("slurm", _slurm)}
    for number, line in enumerate(text.splitlines(), 1):
        if not (match := _LINE.match(line)):
            continue
        scheduler, reader = readers[match[1]]
        found.scheduler = found.scheduler or scheduler
        if scheduler == found.scheduler and not reader(found, match[2].partition(" #")[0].strip()):
            found.unread[number] = line.strip()
    found.gpus = found.gpus or _GPUS.get(found.site)
    if found.scheduler == "slurm":
        found.site = found.site or "slurm"
    return found
