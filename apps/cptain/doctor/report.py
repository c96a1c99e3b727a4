"""The list of all checks, and what they found, for people and for programs."""

import json
import socket

from cptain.doctor import gpus, machine, of_run
from cptain.doctor.checks import Check, Result, Subject, look
from cptain.errors import FAILED, CptainError

# Those of a round are made at once. GPUs do their sums when all that looks at their memory is done.
MACHINE = (
    Check("apptainer", machine.apptainer),
    Check("user namespaces", machine.user_namespaces),
    Check("FUSE", machine.fuse),
    Check("GPUs", gpus.gpus),
    Check("driver", gpus.driver),
    Check("GPU memory", gpus.memory),
    Check("InfiniBand", machine.infiniband),
    Check("NCCL", gpus.nccl, 25.0),
    Check("space", machine.space),
    Check("work_dir", machine.work_dir),
    Check("binds", machine.binds),
    Check("keys", machine.keys),
    Check("clock", machine.clock),
    Check("locale", machine.utf_8),
)
LAST = (Check("GPU arithmetic", gpus.arithmetic, 25.0),)
RUN = (
    Check("site", of_run.site, 25.0),
    Check("train", of_run.train, 25.0),
    Check("random model", of_run.begins_at_random),
    Check("padded rows", of_run.padded_rows),
    Check("optimizer state", of_run.optimizer, 25.0),
    Check("masks", of_run.masks),
    Check("learning rate", of_run.learning_rate),
)


def examine(subject: Subject) -> list[Result]:
    """Make all checks that there are of a subject."""
    return look(MACHINE, subject) + look(LAST + (RUN if subject.run else ()), subject)


def as_json(results: list[Result]) -> str:
    """For programs."""
    document = {"host": socket.gethostname(), "checks": [vars(one) for one in results]}
    return json.dumps(document, indent=2, ensure_ascii=False)


def table(results: list[Result]) -> str:
    """For people: a line a check, and what to do below those that need it."""
    width = max(len(one.name) for one in results)
    lines = []
    for one in results:
        lines.append(f"{one.state:<4}  {one.name:<{width}}  {one.means}")
        lines += [f"      {'':<{width}}  do: {one.remedy}"] if one.remedy else []
    return "\n".join(lines)


def line_of_node(results: list[Result]) -> str:
    """One line, which doctor.sh counts."""
    host = socket.gethostname()
    for state in ("fail", "warn"):
        if wrong := [f"{one.name}: {one.means} (do: {one.remedy})" for one in results if one.state == state]:
            return f"doctor: {host}: {state}: {'; '.join(wrong)}"
    return f"doctor: {host}: ok: {len(results)} checks"


def check_none_failed(results: list[Result]) -> None:
    """End a command with exit status 1 where a check failed.

    Raises:
        CptainError: names the checks.
    """
    if failed := [one.name for one in results if one.state == "fail"]:
        raise CptainError(f"doctor: failed: {', '.join(failed)}", FAILED)
