"""Which nodes a job runs on, and how torchrun on each of them finds the others.

A job script starts cptain once on every node. Here each reads the scheduler's own list of hosts (PBS_NODEFILE,
PE_HOSTFILE or SLURM_JOB_NODELIST), finds its own place in it, and derives from it alone what all must agree on: the
first host and a port. Nothing is exchanged before torchrun's rendezvous.
"""

import ipaddress
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cptain.errors import CptainError

_FIRST_PORT, _PORTS = 10000, 20000  # below the ports that Linux hands out by itself
_NAME = re.compile(r"([^,\[\]]+)(?:\[(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\]([^,\[\]]*))?")
_JOIN_SECONDS = 600  # for the slowest node's container to start


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job.

    Attributes:
        job: the scheduler's id of the job.
        hosts: names or addresses, each once, in the scheduler's order; the first is the rendezvous.
        slots: what the scheduler gave of each, in its own unit; empty where it does not say.
        rank: the place of this node in `hosts`.
        first_address: the first host's, where the scheduler says it; for names that do not resolve in the image.
    """

    job: str
    hosts: list[str]
    slots: list[int] = field(default_factory=list)
    rank: int = 0
    first_address: str = ""

    @property
    def first(self) -> str:
        """The first host, as it is reached from here: its name, or its address where the name does not resolve."""
        return self.first_address if self.first_address and not _addresses(self.hosts[0]) else self.hosts[0]

    @property
    def port(self) -> int:
        """The rendezvous port: the same on all nodes, and another for each job that may share one."""
        digits = re.search(r"\d+", self.job)
        return _FIRST_PORT + int(digits.group() if digits else 0) % _PORTS

    @property
    def endpoint(self) -> str:
        """The rendezvous as torchrun takes it, host:port; an IPv6 address in brackets."""
        return f"[{self.first}]:{self.port}" if ":" in self.first else f"{self.first}:{self.port}"

    def torchrun(self, address: str) -> list[str]:
        """torchrun's arguments on this node.

        Args:
            address: this node's, as the other nodes reach it.
        """
        patience = f"join_timeout={_JOIN_SECONDS},read_timeout={_JOIN_SECONDS}"
        return [
            *("--nnodes", str(len(self.hosts))),
            *("--rdzv-backend", "c10d", "--rdzv-id", self.job, "--rdzv-endpoint", self.endpoint),
            # Said, because torchrun would guess it from names, which a container may resolve in another way.
            # read_timeout: to reach the first node, which may still wait for a lock; torchrun's own is 60 s.
            *("--rdzv-conf", f"is_host={int(self.rank == 0)},{patience}"),
            *("--local-addr", address),
        ]


def expand_nodelist(nodelist: str) -> list[str]:
    """The hosts of Slurm's compressed list: "n[1-3,07],gpu-a" is n1, n2, n3, n07, gpu-a.

    Raises:
        CptainError: a list of another form.
    """
    hosts: list[str] = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        if not (match := _NAME.fullmatch(name)):
            raise CptainError(f"SLURM_JOB_NODELIST={nodelist}: cannot be read")
        prefix, ranges, suffix = match.groups()
        for part in ranges.split(",") if ranges else ():
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            hosts += [f"{prefix}{number:0{len(first)}d}{suffix}" for number in numbers]
        if not ranges:
            hosts.append(name)
    if not hosts or "".join(re.findall(r"[\[\]]", nodelist)).replace("[]", ""):
        raise CptainError(f"SLURM_JOB_NODELIST={nodelist}: cannot be read")
    return hosts


def _read_lines(variable: str, file: str) -> list[list[str]] | None:
    """The words of each line of a scheduler's file; None, and a word about it, where it cannot be read here."""
    try:
        return [line.split() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        print(f"train: {variable}={file}: {error.strerror}: training on this node alone", file=sys.stderr)
        return None


def _hosts_and_slots(environment: Mapping[str, str]) -> tuple[str, list[tuple[str, int]]] | None:
    """The job's id and its (host, slots) as the scheduler lists them, perhaps with a host more than once."""
    if file := environment.get("PBS_NODEFILE"):
        lines = _read_lines("PBS_NODEFILE", file)
        return (environment.get("PBS_JOBID", "0"), [(line[0], 1) for line in lines]) if lines else None
    if file := environment.get("PE_HOSTFILE"):
        lines = _read_lines("PE_HOSTFILE", file)
        try:
            return (environment.get("JOB_ID", "0"), [(line[0], int(line[1])) for line in lines]) if lines else None
        except (IndexError, ValueError):
            raise CptainError(f"PE_HOSTFILE={file}: a line is not: host slots queue processors") from None
    # Of a step, where there is one: the hosts that srun started this on.
    if nodelist := environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST")):
        return environment.get("SLURM_JOB_ID", "0"), [(host, 0) for host in expand_nodelist(nodelist)]
    return None


def _own_names() -> set[str]:
    return {socket.gethostname().lower(), socket.getfqdn().lower()}


def _addresses(host: str) -> set[str]:
    """What a host's name resolves to here; empty where it does not."""
    try:
        return {str(found[4][0]).partition("%")[0] for found in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def _own_interfaces() -> dict[str, str]:
    """The names of this machine's interfaces by their addresses."""
    import psutil

    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _rank(hosts: list[str], environment: Mapping[str, str]) -> int:
    """This node's place in `hosts`: as the job script or srun says, else by name, else by address."""
    for variable in ("CPTAIN_NODE", "SLURM_NODEID"):
        if (said := environment.get(variable, "")).isdigit() and int(said) < len(hosts):
            return int(said)
    names = _own_names()
    short = {name.partition(".")[0] for name in names}
    own = {address for address in _own_interfaces() if not _is_loopback(address)}
    matching = (
        [host for host in hosts if host.lower() in names],
        [host for host in hosts if not _is_address(host) and host.lower().partition(".")[0] in short],
        [host for host in hosts if _addresses(host) & own],
    )
    for matches in matching:
        if len(matches) == 1:
            return hosts.index(matches[0])
    raise CptainError(f"train: this node ({', '.join(sorted(names))}) is none of the job's: {' '.join(hosts)}")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def read_nodes(environment: Mapping[str, str] = os.environ) -> Nodes | None:
    """The job's nodes; None outside a job, and in one of a single node.

    Raises:
        CptainError: a list that cannot be understood, or that this node is not in.
    """
    found = _hosts_and_slots(environment)
    if not found:
        return None
    job, listed = found
    slots: dict[str, int] = {}
    for host, count in listed:
        slots[host] = slots.get(host, 0) + count
    hosts = list(slots)
    if len(hosts) == 1:
        return None
    return Nodes(
        job,
        hosts,
        list(slots.values()) if any(slots.values()) else [],
        _rank(hosts, environment),
        environment.get("SLURM_LAUNCH_NODE_IPADDR", ""),
    )


def check_as_asked(nodes: Nodes | None, gpus: int | None, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to train on other nodes than the job script asked for (CPTAIN_NODES, CPTAIN_GPUS).

    Args:
        nodes: the job's, where there are several.
        gpus: of this node; None on the CPU.

    Raises:
        CptainError: names the hosts.
    """
    hosts = nodes.hosts if nodes else [socket.gethostname()]
    asked = environment.get("CPTAIN_NODES", "")
    if asked.isdigit() and int(asked) != len(hosts):
        raise CptainError(
            f"train: the job asked for {asked} nodes, and the scheduler's list has {len(hosts)} ({' '.join(hosts)}): "
            "ask in the site file for nodes of their own (PBS: -l place=scatter)"
        )
    asked = environment.get("CPTAIN_GPUS", "")
    if gpus and asked.isdigit() and int(asked) != gpus:
        raise CptainError(
            f"train: {socket.gethostname()}: the job has {gpus} GPUs of this node, "
            f"and the site file says gpus = {asked}"
        )


def check_slots(nodes: Nodes, cores_per_gpu: int, processes: int) -> None:
    """Refuse nodes of which the job was given another number of GPUs than torchrun will use on this one.

    Args:
        nodes: the job's.
        cores_per_gpu: slots that come with a GPU (TSUBAME 4.0 gives 48).
        processes: of this node.

    Raises:
        CptainError: names the host.
    """
    for host, slots in zip(nodes.hosts, nodes.slots, strict=False):
        if slots != processes * cores_per_gpu:
            raise CptainError(
                f"train: {host} has {slots} slots, and {processes} GPUs on this node need "
                f"{processes} × {cores_per_gpu}: torchrun wants the same number on every node"
            )


def own_address(nodes: Nodes) -> tuple[str, str]:
    """This node's address on the way to the other nodes, and the name of that interface.

    Raises:
        CptainError: the other host's name does not resolve here, or there is no way to it.
    """
    if nodes.first == nodes.first_address and nodes.rank == 0:
        return nodes.first_address, _own_interfaces().get(nodes.first_address, "")
    other = nodes.hosts[1] if nodes.rank == 0 else nodes.first
    reason = "its name does not resolve here"
    for address in sorted(_addresses(other), key=lambda found: ":" in found):
        if _is_loopback(address) and other != nodes.first_address:
            reason = f"its name resolves to {address} here"
            continue
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, nodes.port))  # sends nothing: the kernel chooses the interface
                own = str(probe.getsockname()[0]).partition("%")[0]
        except OSError as error:
            reason = f"{address}: {error.strerror}"
            continue
        return own, _own_interfaces().get(own, "")
    raise CptainError(f"train: {other}, of the same job, cannot be reached: {reason}")
