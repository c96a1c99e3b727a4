"""What plays a scheduler, or Apptainer, where the real one is not at hand. tests/test_cluster.py has the real ones."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tomli_w

APPTAINER = f"""#!/bin/bash
while [ "$1" != --app ]; do shift; done
app=$2; shift 3
exec "{sys.executable}" -m cptain "$app" "$@"
"""


def programs(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which these shell scripts are on PATH."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def apptainer_of(folder: Path, script: str) -> dict[str, str]:
    """An environment in which a shell script plays apptainer; tests/test_cluster.py has the real one."""
    program = folder / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(f"#!/bin/bash\n{script}")
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "KEPT": str(folder)}


TWO_NODES = ["-q gpu", "-l select={nodes}:mpiprocs=2", "-l place=scatter"]
KEEPS_ENVIRONMENT = """#!/bin/bash
while [ "$1" != --app ]; do shift; done
env -0 > "$KEPT/$2${CPTAIN_LINK-}.${CPTAIN_NODE-}"
"""


class Submission:
    """submit.sh, called where tests/openpbs.py plays PBS and a script the image.

    Args:
        submit: the script.
        folder: the stand-ins', and what the image's script keeps, as $KEPT there.
        apptainer: that script.
    """

    def __init__(self, submit: Path, folder: Path, apptainer: str = KEEPS_ENVIRONMENT) -> None:
        self.submit, self.folder, self.pbs = submit, folder, folder / "pbs"
        self.pbs.mkdir(exist_ok=True)
        openpbs = Path(__file__).with_name("openpbs.py")
        call = f'#!/bin/bash\nexec "{sys.executable}" -SE "{openpbs}" "{self.pbs}" %s "$@"\n'
        commands = {name: call % name for name in ("qsub", "qstat", "qdel", "pbs_tmrsh")}
        commands["uname"] = '#!/bin/bash\n[ "$*" != -n ] || exec echo "$HOSTNAME"\nexec /usr/bin/uname "$@"\n'
        commands["apptainer"] = apptainer.replace("\n", f"\nKEPT='{folder}'\n", 1)
        self.programs = programs(folder / "bin", **commands)

    def run(self, *command: object, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a command where PBS is."""
        words = [str(word) for word in command]
        environment = self.programs | variables
        return subprocess.run(words, env=environment, capture_output=True, text=True, cwd=self.folder)

    def submit_only(self, *stages: str, **variables: str) -> dict[str, str]:
        """Submit; the jobs' ids by name."""
        done = self.run("bash", self.submit, *stages, **variables)
        assert done.returncode == 0, done.stderr
        return dict(line.split() for line in done.stdout.splitlines())

    def wait(self) -> None:
        """Until no job waits or runs."""
        deadline = time.monotonic() + 120
        while any(self.job(file.stem)["job_state"] != "F" for file in self.pbs.glob("*.json")):
            assert time.monotonic() < deadline, [self.job(file.stem) for file in self.pbs.glob("*.json")]
            time.sleep(0.05)

    def __call__(self, *stages: str, **variables: str) -> str:
        """Submit, and wait; what the jobs said."""
        self.submit_only(*stages, **variables)
        self.wait()
        return self.said()

    def said(self) -> str:
        """What the jobs printed."""
        logs = self.submit.parent.parent / "logs"
        return "".join(file.read_text() for file in sorted(logs.glob("*.o*"), key=lambda file: file.stat().st_mtime))

    def job(self, job: str) -> dict[str, Any]:
        """What PBS knows of a job."""
        content: dict[str, Any] = json.loads((self.pbs / f"{job}.json").read_text())
        return content

    def qsub(self) -> list[str]:
        """The arguments of each qsub."""
        return (self.pbs / "qsub").read_text().splitlines()

    def environment(self, job: str) -> dict[str, str]:
        """What a container of a job had in its environment: "train1.0" is the first train job's on its first node."""
        return dict(line.split("=", 1) for line in (self.folder / job).read_text().rstrip("\0").split("\0"))


def write_site(file: Path, **keys: Any) -> Path:
    """A site file; PBS, with two GPUs a node, but for what `keys` say."""
    file.write_text(tomli_w.dumps({"scheduler": "pbs", "gpus": 2, **keys}))
    return file


def dry_run(script: Path) -> list[str]:
    done = subprocess.run(["bash", script, "--dry-run"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def shellcheck(*scripts: Path, severity: str = "style") -> None:
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([program, f"--severity={severity}", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
