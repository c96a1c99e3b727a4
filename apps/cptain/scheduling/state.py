"""How the submitted jobs are, from what the scheduler's own commands print.

submit.sh --state runs those commands on the host, where cptain is not, and pipes their output to `cptain status`:
`qstat -x -f -F json -t` of PBS, once a job, because its master branch prints the first of several alone;
`scontrol show job -o` of Slurm, or `sacct` of what that has forgotten; or `qstat -xml` and `qacct -j` of Grid Engine,
one after the other. Of a job that PBS has forgotten, submit.sh says {"purged": "ID"}.
"""

import json
import re
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cptain import atomic
from cptain.errors import RESUMABLE, CptainError

_PBS_WALLTIME = -29  # JOB_EXEC_KILL_WALLTIME of pbs_error.h
_PBS_DELETED = 91  # JOB_SUBSTATE_TERMINATED of pbs_internal.h; 92, FINISHED, of one that PBS deleted with another
_GRIDENGINE_WALLTIME = "37"  # what is `failed` where the qmaster ended a job for its h_rt
_IN_QUEUE = ("waiting", "queued", "running", "ending")
_ARRAY_TASK = re.compile(r"\[\d*\]")


@dataclass(frozen=True)
class State:
    """How a job, or a task of an array, is.

    Attributes:
        job: the scheduler's id.
        word: waiting (for other jobs), blocked (waits for what will never end), queued, running, ending (was deleted),
            done, stopped (with work left), failed, timeout, deleted, never ran, or purged (the scheduler has forgotten
            it).
        detail: hosts, exit status or the scheduler's reason.
        task: the number in its array, or empty.
    """

    job: str
    word: str
    detail: str = ""
    task: str = ""


def _ended(job: str, status: int, signal: int = 0, detail: str = "") -> State:
    """A job that ran, by its exit status."""
    if signal:
        return State(job, "deleted" if signal in (9, 15) else "failed", detail or f"ended by signal {signal}")
    if status == 0:
        return State(job, "done")
    if status == RESUMABLE:
        return State(job, "stopped", "work is left")
    return State(job, "failed", detail or f"exit status {status}")


def _timeout(job: str) -> State:
    """A job that its walltime ended before it ended itself: it had no time to save."""
    return State(job, "timeout", "killed at its walltime: jobs.margin is too short")


def _documents(text: str) -> Iterator[dict[str, Any]]:
    """JSON documents, one after the other."""
    decoder, text = json.JSONDecoder(), text.strip()
    while text:
        document, end = decoder.raw_decode(text)
        yield document
        text = text[end:].lstrip()


def _pbs(text: str) -> Iterator[State]:
    jobs: dict[str, dict[str, Any]] = {}
    gone: set[str] = set()  # jobs that will not end any more, because they are forgotten, or were deleted in the queue
    for document in _documents(text):
        jobs |= document.get("Jobs", {})
        if "purged" in document:
            gone.add(document["purged"])
            yield State(document["purged"], "purged", "PBS has forgotten it")
    gone |= {name for name, job in jobs.items() if job.get("job_state") == "F" and "Exit_status" not in job}
    held = {name for name, job in jobs.items() if job.get("array") == "True" and job.get("job_state") in ("H", "W")}
    for name, job in jobs.items():
        array = _ARRAY_TASK.sub("[]", name)
        if array != name and array in held:
            continue  # qstat says of its tasks that they are queued
        tasks = (other for other in jobs if _ARRAY_TASK.sub("[]", other) == name != other)
        if job.get("array") == "True" and name not in held and any(tasks):
            continue  # its tasks say more
        state = _pbs_job(array, job, gone)
        if state.word == "blocked":
            gone.add(name)  # and so is what waits for it: jobs come in the order of their submission
        yield replace(state, task="".join(re.findall(r"\[(\d+)\]", name)))


def _pbs_job(identity: str, job: dict[str, Any], gone: set[str]) -> State:
    """How one job is, or one task; `gone` are those that no job waits for in vain."""
    comment, state, status = job.get("comment", ""), job.get("job_state"), job.get("Exit_status")
    hosts = ", ".join(dict.fromkeys(part.partition("/")[0] for part in job.get("exec_host", "").split("+")))
    waits = _waits_for(job)
    if state in ("F", "X"):
        if status is None:
            return State(identity, "never ran", _why_it_never_ran(job, waits))
        if status == _PBS_WALLTIME or "exceeded resource walltime" in comment:
            return _timeout(identity)
        if "terminated by" in comment:  # an array's task then has exit status 1
            return State(identity, "deleted", comment.partition("terminated ")[2])
        if status > 256:  # PBS adds 256 to the number of a signal
            return _ended(identity, 0, status - 256)
        return _ended(identity, status)
    if state in ("R", "E", "B"):
        return State(identity, "ending" if "terminated" in comment else "running", hosts)
    if state not in ("H", "W"):
        return State(identity, "queued", comment)
    if vain := [one for one in re.split("[:,]", waits) if one in gone]:
        return State(identity, "blocked", f"{vain[0]} never began: qdel {identity}, and submit again")
    held = f"held by qhold: qrls {identity}" if "u" in job.get("Hold_Types", "") else ""
    return State(identity, "waiting", ", ".join(filter(None, (waits, held))) or comment)


def _waits_for(job: dict[str, Any]) -> str:
    """Such as "afterany:1[].pbs0:2.pbs0", of what it still waits for; PBS names in "before..." what waits for it."""
    kinds = [kind for kind in job.get("depend", "").split(",") if kind and not kind.startswith("before")]
    return re.sub(r"@[^:,]+", "", ",".join(kinds))


def _why_it_never_ran(job: dict[str, Any], waits: str) -> str:
    """A job that was deleted itself, or with one that it waited for."""
    if job.get("substate") == _PBS_DELETED:
        return "deleted before it began"
    return f"depends on {waits}" if waits else job.get("comment", "")


def _slurm(text: str) -> Iterator[State]:
    names: list[str] = []
    for line in text.splitlines():
        if line.startswith("JobID|"):
            names = line.split("|")
            continue
        if names and "JobId=" not in line:
            told = dict(zip(names, line.split("|"), strict=False))
            state = (told.get("State") or " ").split()[0]  # "CANCELLED by 1000"
            fields = dict(zip(("JobId", "ArrayTaskId"), told["JobID"].split("_"), strict=False)) | {"JobState": state}
            fields |= {"ExitCode": told.get("ExitCode", ""), "NodeList": told.get("NodeList", "")}
        else:
            fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
        if "JobState" not in fields:
            continue
        yield replace(_slurm_job(fields), task=fields.get("ArrayTaskId", ""))


def _slurm_job(fields: dict[str, str]) -> State:
    job = fields.get("ArrayJobId", fields.get("JobId", ""))
    state, reason = fields["JobState"], fields.get("Reason", "")
    status, _, signal = fields.get("ExitCode", "0:0").partition(":")
    if state == "PENDING":
        return State(job, "waiting" if reason == "Dependency" else "queued", reason)
    if state in ("RUNNING", "COMPLETING", "CONFIGURING"):
        return State(job, "running", fields.get("NodeList", ""))
    if state.startswith("CANCELLED"):
        began = fields.get("NodeList", "(null)") not in ("(null)", "None assigned")
        return State(job, "deleted" if began else "never ran", reason)
    if state in ("COMPLETED", "FAILED"):
        return _ended(job, int(status), int(signal or 0))
    if state == "TIMEOUT":
        return _timeout(job)
    return State(job, "failed", state)  # NODE_FAIL, OUT_OF_MEMORY, ...


def _gridengine(text: str) -> Iterator[State]:
    """What qstat, and then qacct, said. A job that ended between the two is in both: its accounts hold."""
    listing, _, accounting = text.rpartition("</job_info>")
    accounts = list(_gridengine_accounts(accounting))
    ended = {key for key, _ in accounts}
    if "<job_info" in listing:
        for job in ElementTree.fromstring(listing + "</job_info>").iter("job_list"):
            name, state = job.findtext("JB_job_number", ""), job.findtext("state", "")
            host = (job.findtext("queue_name") or "").partition("@")[2]
            if (name, job.findtext("tasks", "undefined")) in ended:
                continue
            if "E" in state:
                yield State(name, "failed", f"in state {state}: qstat -j {name} says why")
            elif "d" in state:
                yield State(name, "ending", host)
            elif "h" in state:
                yield State(name, "waiting")
            else:
                yield State(name, "running" if set(state) & set("rt") else "queued", host)
    yield from (state for _, state in accounts)


def _gridengine_accounts(accounting: str) -> Iterator[tuple[tuple[str, str], State]]:
    """Of qacct, by job and number of the array's task, which is "undefined" for others."""
    for block in re.split(r"^=+$", accounting, flags=re.MULTILINE):
        fields = dict(line.split(None, 1) for line in block.strip().splitlines() if len(line.split(None, 1)) == 2)
        if "jobnumber" not in fields:
            continue
        name, status, failed = fields["jobnumber"].strip(), int(fields["exit_status"].split()[0]), fields["failed"]
        limit = re.search(r"\bh_rt=(\d+)", fields.get("category", ""))
        seconds = float(fields.get("ru_wallclock", "0").split()[0].rstrip("s"))
        if failed.split()[0] == _GRIDENGINE_WALLTIME or (status == 137 and limit and seconds >= int(limit[1])):
            state = _timeout(name)
        elif status > 128:
            state = _ended(name, 0, status - 128)
        elif failed.split()[0] not in ("0", "100"):
            state = State(name, "failed", failed.strip())
        else:
            state = _ended(name, status)
        task = fields.get("taskid", "undefined").strip()
        yield (name, task), replace(state, task="" if task == "undefined" else task)


def read_states(text: str) -> list[State]:
    """The states in a scheduler's output; those of an array have one entry a task.

    Raises:
        CptainError: output of no scheduler known here.
    """
    try:
        if text.lstrip().startswith("{"):
            return list(_pbs(text))
        if "JobId=" in text or "JobID|" in text:
            return list(_slurm(text))
        return list(_gridengine(text))
    except (ValueError, KeyError, ElementTree.ParseError) as error:
        raise CptainError(f"status: what the scheduler says of the jobs cannot be read: {error}") from error


@dataclass(frozen=True)
class Submitted:
    """A job that submit.sh submitted.

    Attributes:
        name: such as "train.1".
        job: the scheduler's id.
        scripts: the folder of its script.
    """

    name: str
    job: str
    scripts: Path


def read_submitted(file: Path) -> list[Submitted]:
    """The jobs that submit.sh submitted, in their order.

    Raises:
        CptainError: none was.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CptainError(f"{file}: nothing was submitted: {error.strerror}") from error
    parts = [line.split(" ", 2) for line in lines]
    return [Submitted(part[0], part[1], Path(part[2]) if part[2:] else file.parent) for part in parts]


def _tasks_not_told(job: Submitted, found: list[State]) -> int:
    """How many tasks of a Grid Engine array have left its queue and are not in its accounts yet: qacct has each on its
    own, seconds later, and qstat has all that wait in one entry."""
    if not found or any(state.word in _IN_QUEUE for state in found):
        return 0
    try:
        script = (job.scripts / f"{job.name}.sh").read_text(encoding="utf-8")
    except OSError:
        return 0
    array = re.search(r"^#\$ -t 1-(\d+)$", script, flags=re.MULTILINE)
    return max(0, int(array[1]) - len(found)) if array else 0


def told_file(submitted: Path) -> Path:
    """Where the last words of the scheduler are kept, for `cptain status DIR`: a word a job, and when."""
    return submitted.with_name("states.json")


def _detail(found: list[State]) -> str:
    """What is known beyond the word of a job; of an array, which tasks went wrong, or else all the hosts."""
    wrong: dict[str, list[str]] = {}
    for state in found:
        if state.task and state.detail and state.word not in _IN_QUEUE:
            wrong.setdefault(state.detail, []).append(state.task)
    if wrong:
        return "; ".join(f"task{'s' * (len(tasks) > 1)} {', '.join(tasks)}: {why}" for why, tasks in wrong.items())
    running = [state.detail for state in found if state.word == "running"]
    if running:
        return ", ".join(dict.fromkeys(host for hosts in running for host in hosts.split(", ") if host))
    return next((state.detail for state in found if state.detail), "")


def table(submitted: Path, text: str) -> list[str]:
    """One line a submitted job: its name, its id, and how it is; kept in `told_file` too.

    Args:
        submitted: what submit.sh wrote.
        text: the scheduler's output.

    Raises:
        CptainError: nothing was submitted, or the output cannot be read.
    """
    states = read_states(text)
    rows = []
    for one in read_submitted(submitted):
        found = [state for state in states if state.job == one.job]
        words = Counter(state.word for state in found)
        if missing := _tasks_not_told(one, found):
            words["unknown"] += missing
        word = ", ".join(f"{count} {word}" for word, count in words.items()) if words.total() > 1 else "".join(words)
        rows.append((one.name, one.job, word or "unknown", _detail(found)))
    with suppress(OSError, CptainError):  # another user's
        atomic.write_json(told_file(submitted), {"time": time.time(), "words": {row[1]: row[2] for row in rows}})
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
