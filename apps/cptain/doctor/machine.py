"""What a machine has to be: its container, its disks, its clock, its keys. Nothing here needs a GPU."""

import locale
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from cptain.doctor.checks import Found, Subject, fail, ok, warn
from cptain.image import image_here, was_unpacked
from cptain.progress import human
from cptain.scheduling.before_queue import check_disks
from cptain.training.disk import is_here
from cptain.training.metrics import check_wandb_is_installed, has_wandb_key

_PROC = Path("/proc")
_INFINIBAND = Path("/sys/class/infiniband")
_SHARED = re.compile(r"lustre|nfs\d?|gpfs|beegfs|ceph|wekafs|panfs|pvfs2|orangefs|afs|cifs|9p|virtiofs|fuse\..+")
_LITTLE = 2 << 30  # bytes: a home of 25 GB has no more when caches have filled it
_APART = 5.0  # seconds between two clocks: make, rsync and the schedulers' own checks begin to err


def said_by(*command: str, seconds: float = 6.0) -> str | None:
    """What a program prints; None where there is none, it fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def apptainer(subject: Subject) -> Found:
    """Which program starts images, and which version of it."""
    if here := image_here():
        return ok(f"this runs in {here}")
    names = dict.fromkeys((subject.site.apptainer if subject.site else "apptainer", "apptainer", "singularity"))
    for name in names:
        if shutil.which(name) and (version := said_by(name, "--version")):
            return ok(version.strip())
    modules = [one for one in (subject.site.modules if subject.site else ()) if re.search("apptainer|singularity", one)]
    remedy = f"module load {modules[0]}" if modules else "module avail apptainer singularity, and module load it"
    judged = fail if subject.site else warn  # cptain itself runs without one; every job needs it
    return judged(f"no {' or '.join(names)} that answers", f"{remedy}; apptainer in the site file may name its path")


def user_namespaces(subject: Subject) -> Found:
    """Without them and without setuid, Apptainer starts nothing for a plain user."""
    if image_here():
        return ok("this runs in an image: what is needed is there")

    def number(file: str) -> int | None:
        try:
            return int((_PROC / "sys" / file).read_text())
        except (OSError, ValueError):
            return None

    for file, wrong in (
        ("user/max_user_namespaces", 0),
        ("kernel/unprivileged_userns_clone", 0),
        ("kernel/apparmor_restrict_unprivileged_userns", 1),
    ):
        if number(file) == wrong:
            means = f"/proc/sys/{file} is {wrong}: a plain user starts images only where Apptainer is setuid"
            return warn(means, "apptainer exec IMAGE true; where that fails, ask the site's support")
    return ok("a plain user may make them")


def fuse(subject: Subject) -> Found:
    """Without it every start unpacks the image."""
    if was_unpacked() or not (image_here() or os.access("/dev/fuse", os.R_OK | os.W_OK)):
        return warn(
            "no FUSE here: an image of one file is unpacked at every start, for minutes",
            "make sandbox, and jobs.image = the folder that it makes",
        )
    return ok("images are mounted, not unpacked")


def infiniband(subject: Subject) -> Found:
    """Ports that are down cost a training its network in silence: NCCL takes what is left, or TCP."""
    states = {}
    for file in sorted(_INFINIBAND.glob("*/ports/*/state")):
        states[f"{file.parts[-4]}:{file.parts[-2]}"] = file.read_text().partition(":")[2].strip()
    up = [port for port, state in states.items() if state == "ACTIVE"]
    down = [f"{port} is {state}" for port, state in states.items() if state != "ACTIVE"]
    if not states:
        if not subject.in_job or subject.nodes == 1:
            return ok("none here; submit.sh doctor looks at the nodes of a job")
        means = f"none seen, and the run takes {subject.nodes} nodes: NCCL would use TCP"
        return warn(means, "ls /sys/class/infiniband; where nodes alike have ports, leave this one out")
    if not up:
        return fail(f"no port is up: {', '.join(down)}", "ibstat; leave this node out, and tell the site's support")
    if down:
        return warn(
            f"{len(up)} ports are up; {', '.join(down)}", "ibstat; where nodes alike have it up, leave this out"
        )
    return ok(f"{len(up)} ports, all up")


def _unwritable(folder: Path) -> str:
    """Why nothing can be written into a folder; empty where it can. A full quota shows in a write alone."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # which has no name, where the disk can do without
            file.write(b"\0" * (1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""


def _little(folder: Path) -> str:
    """Where little is left: of the disk, or of what Lustre says of the user's quota."""
    if (free := shutil.disk_usage(folder).free) < _LITTLE:
        return f"{folder}: {human(free)}B are free"
    said = said_by("lfs", "quota", "-q", "-u", str(os.getuid()), str(folder)) if shutil.which("lfs") else None
    numbers = [int(word) for word in re.findall(r"(?<=\s)\d+(?=\*?\s)", said or "")]
    if len(numbers) < 3 or not (limit := max(numbers[1:3])) or limit - numbers[0] > _LITTLE >> 10:
        return ""
    return f"{folder}: {human(numbers[0] << 10)}B of a quota of {human(limit << 10)}B are used"


def space(subject: Subject) -> Found:
    """Room in the home, in the caches and where the run is written."""
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache"))
    folders = [Path.home(), next(one for one in (cache, *cache.parents) if one.exists()), subject.work_dir()]
    there = list(dict.fromkeys(filter(None, folders)))
    remedy = "du -xsh ~/.[!.]* ~/* | sort -h; remove what is large, or set HF_HOME to a folder elsewhere"
    if wrong := [one for folder in there if (one := _unwritable(folder))]:
        return fail("; ".join(wrong), remedy)
    if subject.run:
        check_disks([subject.run])
    if wrong := [one for folder in there if (one := _little(folder))]:
        return warn("; ".join(wrong), remedy)
    return ok(f"in {', '.join(map(str, there))}")


def _file_system(folder: Path) -> str:
    """The kind of the file system that a folder is on."""
    mounts = [line.split()[1:3] for line in (_PROC / "self" / "mounts").read_text().splitlines()]
    path = str(folder.resolve())
    places = [(len(at), kind) for at, kind in mounts if path == at or path.startswith(at.rstrip("/") + "/")]
    return max(places)[1] if places else "unknown"


def work_dir(subject: Subject) -> Found:
    """Every node writes its part of a checkpoint there."""
    folder = subject.work_dir()
    if folder is None:
        return ok("no run was given")
    if not os.access(folder, os.W_OK | os.X_OK):
        return fail(f"{folder}: not writable for you", f"ls -ld {folder}; set work_dir to a folder of your own")
    kind = _file_system(folder)
    if subject.nodes > 1 and not _SHARED.fullmatch(kind):
        means = f"{folder} is on {kind}, which other nodes do not see as a rule, and the run takes {subject.nodes}"
        return warn(means, "set work_dir to a folder on the cluster's shared disk")
    return ok(f"{folder}: writable, on {kind}")


def binds(subject: Subject) -> Found:
    """What a run names has to be seen in the image."""
    run = subject.run
    if run is None:
        return ok("no run was given")
    paths = [run.work_dir, Path(run.model.hf), Path(run.base_tokenizer), *map(Path, run.data.sources)]
    paths += [path for path in (run.data.output, run.model.megatron) if path]
    unseen = dict.fromkeys(str(path) for path in paths if path.is_absolute() and not is_here(path))
    if not unseen:
        return ok("every path of the run file is on a disk that is seen")
    folders = ",".join(dict.fromkeys("/" + Path(path).parts[1] for path in unseen))
    return fail(f"not seen here: {', '.join(unseen)}", f"apptainer exec --bind {folders} …; binds in the site file")


def keys(subject: Subject) -> Found:
    """The user's keys of the hub and of Weights & Biases, where a run needs them."""
    run = subject.run
    if subject.in_job or run is None:
        return ok("looked at where jobs are submitted, with the run")
    if run.wandb:
        check_wandb_is_installed(run)
        online = os.environ.get("WANDB_MODE", "online") == "online" and not (subject.site and subject.site.offline)
        if online and not has_wandb_key():
            return fail("[wandb] is asked for, and there is no key", "export WANDB_API_KEY=…, or WANDB_MODE=offline")
    if not Path(run.model.hf).is_absolute() and not os.environ.get("HF_TOKEN"):
        from huggingface_hub import get_token

        if not get_token():
            means = f"model.hf = {run.model.hf} is of the hub, and there is no token: a gated model is refused"
            return warn(means, "export HF_TOKEN=…")
    return ok("there, or not needed")


def clock(subject: Subject) -> Found:
    """This machine's against that of the file server."""
    with tempfile.TemporaryFile(dir=subject.work_dir()) as file:
        file.write(b"\0")
        file.flush()
        os.fsync(file.fileno())
        apart = time.time() - os.fstat(file.fileno()).st_mtime
    if abs(apart) > _APART:
        means = f"this machine's clock is {apart:+.0f} s off that of the disk: deadlines, logs and locks go by it"
        return warn(means, "date; leave this node out, and tell the site's support")
    return ok("that of the disk")


def utf_8(subject: Subject) -> Found:
    """Text is read and written in the locale's encoding by every library that does not say which."""
    encoding = locale.getpreferredencoding(False)
    if encoding.upper().replace("-", "") != "UTF8":
        return fail(f"the locale's encoding is {encoding}: Japanese text and names break", "export LC_ALL=C.UTF-8")
    return ok("UTF-8")
