"""A stand-in for OpenPBS: qsub, qstat, qdel and pbs_tmrsh, with the rules that were seen on a real one.

    openpbs.py FOLDER qsub|qstat|qdel|pbs_tmrsh ARGUMENT...

Every job has a process of its own, which waits for those that it depends on, runs the script on pretend hosts (node0,
node1, ...) and ends; there is no server. FOLDER has a JSON file a job, with the keys of `qstat -f -F json`, and:

    kill_delay    seconds between the two SIGTERMs of a deletion, and from the second to SIGKILL; default 5
    first_only    if it is there, qstat prints the first of several jobs alone, as OpenPBS's master branch does
    no_history    if it is there, qstat knows no job that has ended, and with -x none at all: PBS keeps no history
    full          if it is there, no job starts: one that waits for nothing is queued

The rules: a job gets no variable of the shell but those of -v, and -v takes the place of the script's own `#PBS -v`; a
value's comma needs quotes, which qsub drops: once of an argument, twice of a directive; OMP_NUM_THREADS is the cores of
the node; a job starts in $HOME; its output is in a spool until it ends, and then for its owner alone but for -W umask;
chunks are packed on one host unless place=scatter; a deleted or late job gets SIGTERM twice, and SIGKILL, but for its
processes in sessions of their own. Of a job that is deleted before it began: if it waits for others, what waits for it
is deleted too; if it is queued, what waits for it is held for ever, but an array lets it go. `depend` of qstat names
what a job waits for until that has ended, and what waits for it.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

SERVER = "pbs0"
ENDED, UNKNOWN = 35, 153  # exit statuses of qstat
CORES = "16"
DELETED, WITH_ANOTHER = 91, 92  # substates of jobs that never ran


class Folder:
    """Where the jobs are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, job: str, ending: str = "json") -> Path:
        return self.path / f"{job}.{ending}"

    def read(self, job: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.file(job).read_text())
        return content

    def write(self, job: str, **changes: Any) -> None:
        """Set keys of a job; whoever reads sees the old or the new."""
        content = {**(self.read(job) if self.file(job).exists() else {}), **changes}
        partial = self.file(job, f"{os.getpid()}.partial")
        partial.write_text(json.dumps(content))
        partial.replace(self.file(job))

    def kill_delay(self) -> float:
        file = self.path / "kill_delay"
        return float(file.read_text()) if file.exists() else 5.0


def options(script: Path, arguments: list[str]) -> dict[str, Any]:
    """What the script's directives and qsub's arguments say; of one option the last counts, -l and -W add up."""
    lines = script.read_text().splitlines()[1:]
    first = next((number for number, line in enumerate(lines) if line and not line.startswith("#")), len(lines))
    words = [word for line in lines[:first] if line.startswith("#PBS ") for word in _directive(line)]
    said: dict[str, Any] = {"-l": {}, "-W": {}}
    words += arguments
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option in said and isinstance(said[option], dict):
            said[option] |= dict([value.split("=", 1)])
        else:
            said[option] = value
    return said


class Refused(Exception):
    """What qsub says, with exit status 1."""


def _directive(line: str) -> list[str]:
    """An option and its value, without the quotes; "-vA=1" is one too."""
    words = shlex.split(line)[1:]
    words = [words[0][:2], words[0][2:]] if len(words) == 1 else words
    if len(words) != 2:
        raise Refused(f"directive error: {' '.join(words)} ")
    return words


def variables(given: str) -> dict[str, str]:
    """Those of -v: a comma in quotes is none between them, and one without a value is this shell's."""
    found = {}
    for word in re.findall(r"""((?:'[^']*'|"[^"]*"|[^,'"])+)(?:,|$)""", given):
        name, equals, value = re.sub(r"['\"]", "", word).partition("=")
        if not equals and name not in os.environ:
            raise Refused("cannot send environment with the job")
        found[name] = value if equals else os.environ[name]
    return found


def qsub(folder: Folder, arguments: list[str]) -> int:
    script, said = Path(arguments[-1]), options(Path(arguments[-1]), arguments[:-1])
    with open(folder.path / "qsub", "a") as log:
        log.write(shlex.join(arguments) + "\n")
    tasks = said.get("-J")
    if tasks and not re.fullmatch(r"1-([2-9]|\d{2,})", tasks):
        print("qsub: illegal -J value", file=sys.stderr)
        return 2
    given = variables(said.get("-v", ""))
    number = len(list(folder.path.glob("*.sh"))) + 1
    job = f"{number}{'[]' if tasks else ''}.{SERVER}"
    folder.file(job, "sh").write_text(script.read_text())
    parts = re.fullmatch(r"(\d+)(?::mpiprocs=(\d+))?.*", said["-l"].get("select", "1"))
    assert parts
    chunks, processes = int(parts[1]), int(parts[2] or 1)
    scattered = "scatter" in said["-l"].get("place", "")
    hosts = [f"node{chunk if scattered else 0}" for chunk in range(chunks) for _ in range(processes)]
    folder.write(
        job,
        Job_Name=said.get("-N", script.name),
        job_state="H" if "depend" in said["-W"] else "Q",
        Hold_Types="s" if "depend" in said["-W"] else "n",
        Variable_List=given | {"PBS_O_WORKDIR": os.getcwd()},
        Resource_List=said["-l"],
        Submit_arguments=shlex.join(arguments),
        umask=said["-W"].get("umask", "077"),
        hosts=hosts,
        **({"depend": said["-W"]["depend"]} if "depend" in said["-W"] else {}),
        **({"array": "True", "array_indices_submitted": tasks} if tasks else {}),
    )
    command = [sys.executable, "-SE", __file__, str(folder.path), "run", job]
    nowhere = subprocess.DEVNULL  # whoever reads qsub's output does not wait for the job
    subprocess.Popen(command, start_new_session=True, stdin=nowhere, stdout=nowhere, stderr=nowhere)
    print(job)
    return 0


def waits_for(folder: Folder, content: dict[str, Any]) -> list[str]:
    """The jobs that one depends on and that have not let it go."""
    named = [one for one in content.get("depend", "").split(":")[1:] if folder.file(one).exists()]
    read = {one: folder.read(one) for one in named}
    return [one for one in named if read[one]["job_state"] != "F" or not {"run_count", "array"} & set(read[one])]


def lost(folder: Folder, content: dict[str, Any]) -> bool:
    """One of them was deleted while it waited itself."""
    ended = [one for one in map(folder.read, waits_for(folder, content)) if one["job_state"] == "F"]
    return any(one["Hold_Types"] == "s" for one in ended)


def run(folder: Folder, job: str) -> int:
    """The process of a job."""
    content, deleted = folder.read(job), folder.file(job, "deleted")
    while not deleted.exists():
        if lost(folder, content):
            folder.write(job, job_state="F", substate=WITH_ANOTHER, Hold_Types="s")
            return 0
        if not waits_for(folder, content):
            folder.write(job, job_state="Q", Hold_Types="n")
            if not (folder.path / "full").exists():
                break
        time.sleep(0.02)
    else:
        folder.write(job, job_state="F", substate=DELETED, Hold_Types="s" if waits_for(folder, content) else "n")
        return 0
    folder.write(job, job_state="B" if "array" in content else "R", run_count=1)
    tasks = int(content["array_indices_submitted"].partition("-")[2]) if "array" in content else 0
    status = 0
    for task in range(1, tasks + 1):
        name = job.replace("[]", f"[{task}]")
        copied = {key: content[key] for key in content if not key.startswith("array")}
        folder.write(name, **copied, array_id=job)
        status = max(status, execute(folder, name, job, str(task)) != 0)
    if tasks:
        folder.write(job, job_state="F", Exit_status=status)
    else:
        execute(folder, job, job, "")
    return 0


def execute(folder: Folder, job: str, submitted: str, task: str) -> int:
    """Run the script of a job, or of an array's task; its Exit_status."""
    content = folder.read(job)
    hosts, began = content["hosts"], time.monotonic()
    comment = f"Job run at Wed Nov 25 at 17:58 on ({hosts[0]}:ncpus={CORES})"
    nodes = folder.file(job, "nodes")
    nodes.write_text("".join(f"{host}\n" for host in hosts))
    home = folder.path / "home"
    home.mkdir(exist_ok=True)
    exec_host = "+".join(f"{host}/0*{CORES}" for host in dict.fromkeys(hosts))
    folder.write(job, job_state="R", exec_host=exec_host, comment=comment)
    environment = content["Variable_List"] | {"HOME": str(home), "PBS_JOBID": job, "PBS_NODEFILE": str(nodes)}
    environment["PBS_JOBCOOKIE"] = str(folder.file(job))  # which no job of another folder has
    environment |= {"PATH": os.environ["PATH"], "HOSTNAME": hosts[0], "OMP_NUM_THREADS": CORES}
    environment |= {"PBS_ARRAY_INDEX": task} if task else {}
    spool = folder.file(job, "spool")
    with open(spool, "wb") as output:
        command = ["bash", str(folder.file(submitted, "sh"))]
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=output, stderr=output)
    walltime = [int(part) for part in content["Resource_List"]["walltime"].split(":")]
    limit = walltime[0] * 3600 + walltime[1] * 60 + walltime[2]
    why = ""
    while process.poll() is None and not why:
        if folder.file(submitted, "deleted").exists():
            why = "terminated by me@" + SERVER
        elif time.monotonic() - began > limit:
            why = "exceeded resource walltime"
        time.sleep(0.02)
    if why:
        end(folder, job)
    status = process.wait()
    status = -29 if why.startswith("exceeded") else 1 if why and task else 256 - status if status < 0 else status
    number = re.split(r"\D", job)[0]
    name = f"{content['Job_Name']}.o{number}" + (f".{task}" if task else "")
    final = Path(content["Variable_List"]["PBS_O_WORKDIR"]) / name
    final.write_bytes(spool.read_bytes())
    final.chmod(0o666 & ~int(content["umask"], 8))
    folder.write(job, job_state="F", Exit_status=status, comment=f"{comment} and {why or 'finished'}")
    return status


def living(folder: Folder, job: str) -> list[int]:
    """The processes of a job that PBS knows, on all its hosts: those of its sessions, which here is one."""
    mark, found = f"PBS_JOBCOOKIE={folder.file(job)}".encode(), []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            if os.getsid(int(pid)) == os.getsid(0) and mark in Path("/proc", pid, "environ").read_bytes().split(b"\0"):
                found.append(int(pid))
    return found


def end(folder: Folder, job: str) -> None:
    """SIGTERM to all processes of a job, once more to those that are left, and SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        for pid in living(folder, job):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + folder.kill_delay()
        while living(folder, job) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not living(folder, job):
            return


def qstat(folder: Folder, arguments: list[str]) -> int:
    jobs = [word for word in arguments if re.fullmatch(r"\d+(\[\])?\.\w+", word)]
    history = not (folder.path / "no_history").exists()
    if "-x" in arguments and not history:
        print("qstat: PBS is not configured to maintain job history", file=sys.stderr)
        print(json.dumps({"timestamp": int(time.time()), "pbs_server": SERVER}))
        return 0
    known = [job for job in jobs if folder.file(job).exists() and (history or folder.read(job)["job_state"] != "F")]
    if len(known) < len(jobs):
        print(f"qstat: Unknown Job Id {jobs[0]}", file=sys.stderr)
        return UNKNOWN
    if "-x" not in arguments:
        over = [job for job in jobs if folder.read(job)["job_state"] == "F"]
        print("\n".join(f"qstat: {job} Job has finished, use -x or -H" for job in over), file=sys.stderr)
        if over or "-f" not in arguments:
            return ENDED if over else 0
    if (folder.path / "first_only").exists():
        jobs = jobs[:1]
    files = [file for job in jobs for file in (folder.file(job), *_tasks(folder, job))]
    found = {file.name.removesuffix(".json"): json.loads(file.read_text()) for file in files}
    for job in jobs:
        found[job].pop("depend", None)
        if depend := _depend(folder, job):
            found[job]["depend"] = depend
    print(json.dumps({"timestamp": int(time.time()), "pbs_server": SERVER, "Jobs": found}, indent="\t"))
    return 0


def _depend(folder: Folder, job: str) -> str:
    every = {file.name.removesuffix(".json"): json.loads(file.read_text()) for file in folder.path.glob("*.json")}
    after, kind = waits_for(folder, every[job]), every[job].get("depend", "").partition(":")[0]
    before = [other for other in every if job in every[other].get("depend", "").split(":")[1:]]
    kinds = {kind: after, kind.replace("after", "before") or "beforeany": before}
    listed = {kind: "".join(f":{one}@{SERVER}" for one in names) for kind, names in kinds.items()}
    return ",".join(kind + names for kind, names in listed.items() if names)


def _tasks(folder: Folder, job: str) -> list[Path]:
    number = job.partition("[")[0]
    return sorted(folder.path.glob(f"{number}[[][0-9]*].{SERVER}.json")) if "[]" in job else []


def qdel(folder: Folder, arguments: list[str]) -> int:
    for job in arguments:
        folder.file(job, "deleted").touch()
    return 0


def pbs_tmrsh(folder: Folder, arguments: list[str]) -> int:
    """Start a command on a host of this job, with its arguments as they are and none of this shell's variables."""
    host, *command = arguments
    job = os.environ["PBS_JOBID"]
    with open(folder.path / "commands", "a") as log:
        log.write(shlex.join(arguments) + "\n")
    if host not in folder.file(job, "nodes").read_text().split():
        return 255
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "PBS_JOBID", "PBS_JOBCOOKIE")}
    environment["HOSTNAME"] = host
    os.execvpe(command[0], command, environment)


def main() -> int:
    folder, name, *arguments = sys.argv[1:]
    commands = {"qsub": qsub, "qstat": qstat, "qdel": qdel, "pbs_tmrsh": pbs_tmrsh}
    if name == "run":
        return run(Folder(Path(folder)), arguments[0])
    try:
        return commands[name](Folder(Path(folder)), arguments)
    except Refused as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
