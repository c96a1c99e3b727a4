"""A real scheduler with two pretend hosts, and a run whose jobs it has."""

import re
import subprocess
import time
from pathlib import Path
from typing import Any

from cptain.megatron.log import read_steps, train_logs
from cptain.run_file import load_run

QUEUE = {"gridengine": ("qstat", "-u", "*"), "slurm": ("squeue", "--noheader", "--format=%F")}
UNDER_WAY = ("waiting", "queued", "running", "ending", "unknown")  # unknown: not yet in Grid Engine's accounts


class Cluster:
    """A scheduler, and a folder that its hosts share."""

    def __init__(self, name: str, as_user: Path, folder: Path, apptainer: str) -> None:
        self.name, self.as_user, self.folder, self.apptainer = name, as_user, folder, apptainer

    def run(self, *command: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command as the job user on the first host."""
        words = [self.as_user, *map(str, command)]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=self.folder, **options)


class Submitted:
    """A run whose jobs were rendered, in the image, and submitted."""

    def __init__(self, cluster: Cluster, file: Path, *changes: str) -> None:
        self.cluster, self.file, self.run = cluster, file, load_run(file)
        image, overrides = cluster.folder / "image", [word for change in changes for word in ("--set", change)]
        rendered = cluster.run(cluster.apptainer, "--silent", "exec", image, "cptain", "jobs", file, *overrides)
        assert rendered.returncode == 0, rendered.stderr
        self.script = Path(rendered.stdout.strip())

    def submit(self, *stages: str) -> dict[str, str]:
        """Submit all or some stages; the jobs' ids by name."""
        done = self.cluster.run("bash", self.script, *stages)
        assert done.returncode == 0, done.stderr
        self.jobs = dict(line.split() for line in done.stdout.splitlines())
        return self.jobs

    def states(self) -> dict[str, str]:
        """How each job is, as submit.sh --state says."""
        done = self.cluster.run("bash", self.script, "--state")
        assert done.returncode == 0, done.stderr
        rows = [re.split(r" {2,}", line, maxsplit=3) for line in done.stdout.splitlines()]
        return {row[0]: row[2] for row in rows}

    def queue(self) -> set[str]:
        """The ids of the jobs that the scheduler has, by its own program."""
        done = self.cluster.run(*QUEUE[self.cluster.name])
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"^ *(\d+)", done.stdout, re.MULTILINE))

    def wait(self, seconds: float, name: str | None = None) -> dict[str, str]:
        """Wait until a job, or all, have ended.

        submit.sh --state is asked once they have left the queue: it starts a container and Python, which takes 0.6 s
        of the cores that the jobs train on.
        """
        deadline = time.monotonic() + seconds
        ids = {self.jobs[name]} if name else set(self.jobs.values())
        while time.monotonic() < deadline and ids & self.queue():
            time.sleep(0.5)
        states: dict[str, str] = {}
        while time.monotonic() < deadline:
            states = self.states()
            watched = [states[name]] if name else list(states.values())
            if not any(word in state for state in watched for word in UNDER_WAY):
                return states
            time.sleep(1)
        raise AssertionError(f"after {seconds} s: {states or self.states()}\n{self.said()}")

    def said(self, stage: str = "") -> str:
        """What the jobs of a stage printed."""
        logs = sorted(self.run.logs_folder.glob(f"{stage}*"), key=lambda path: path.stat().st_mtime)
        return "\n".join(path.read_text() for path in logs if path.suffix != ".log" and path.suffix != ".json")

    def wait_for_step(self, number: int, seconds: float = 120) -> None:
        """Wait until training has done a step."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if any(step.number >= number for step in read_steps(train_logs(self.run.logs_folder))):
                return
            time.sleep(0.2)
        raise AssertionError(f"step {number} was not reached in {seconds} s: {self.states()}\n{self.said()}")
