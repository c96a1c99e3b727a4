"""The rendered jobs on a real Grid Engine and a real Slurm, each with two pretend hosts (tests/cluster), in the image.

PBS is in no package registry, and OpenPBS takes minutes to build: its scripts differ in their headers and in pbs_tmrsh;
what it says is tested from recordings in tests/test_job_states.py, and its rules are in tests/openpbs.py.
"""

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster, Submitted
from conftest import PROJECT, TINY, make, write_run_file
from cptain.megatron.log import read_steps, train_logs
from cptain.processes import read_of_all
from cptain.run_file import RunFile, load_run

HOSTS = ("node0", "node1")
USER = "jobuser"
SITES = {
    "gridengine": 'scheduler = "gridengine"\nlauncher = "qrsh"\ntrain = ["-l node_f={nodes}"]\nneeds_group = true\n',
    "slurm": 'scheduler = "slurm"\nlauncher = "srun"\ntrain = ["--nodes={nodes}", "--ntasks-per-node=1"]\n',
}
SITES["pbs"] = 'scheduler = "pbs"\nlauncher = "pbs_tmrsh"\ntrain = ["-l select={nodes}:mpiprocs=2"]\n'
SITES["mpirun"] = SITES["gridengine"].replace('"qrsh"', '"mpirun"')

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or not Path("/etc/debian_version").exists(),
    reason="a scheduler of one's own needs root, and Debian's apt",
)


@pytest.fixture(scope="session", autouse=True)
def installing() -> "subprocess.Popen[str]":
    """Debian's packages of both schedulers and of mpirun, fetched and unpacked while the image is built."""
    scripts = Path(__file__).parent / "cluster"
    install = f"""set -e
{scripts}/gridengine.sh install .
{scripts}/slurm.sh install .
command -v mpirun || DEBIAN_FRONTEND=noninteractive \\
  apt-get -o DPkg::Lock::Timeout=300 install -qy --no-install-recommends openmpi-bin"""
    command = ["bash", "-c", install]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def installed(installing: "subprocess.Popen[str]") -> None:
    said, _ = installing.communicate(timeout=600)
    assert installing.returncode == 0, said


@pytest.fixture(scope="module")
def shared(public: Path, apptainer: str, image: Path, text_folder: Path) -> Path:
    """A folder that the hosts share, with the image, a model and text in it; its name has a space and 日本語."""
    folder = public / "shared 走る"
    folder.mkdir()
    shutil.copytree(text_folder, folder / "text")
    # A folder: without FUSE a SIF is unpacked at every start.
    command = [apptainer, "--silent", "build", "--sandbox", str(folder / "image"), str(image)]
    subprocess.run(command, check=True, capture_output=True)
    # Made in the image, whose transformers may be older than that of these tests.
    make = f"from pathlib import Path; from demo import *; make_model(Path('model'), list(python_help()), **{TINY})"
    command = [apptainer, "--silent", "exec", "--env", f"PYTHONPATH={PROJECT}/runs", "--bind", str(PROJECT)]
    subprocess.run([*command, folder / "image", "python3", "-c", make], check=True, cwd=folder)
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    return folder


def cluster(name: str, shared: Path, public: Path, apptainer: str) -> Iterator[Cluster]:
    state = public / name
    # A copy, because the hosts see no /tmp but their own, and this project may be in there.
    scripts = shutil.copytree(Path(__file__).parent / "cluster", public / f"{name}-scripts")
    up = [scripts / f"{name}.sh", "up", state, *HOSTS]
    try:
        began = subprocess.run(up, cwd=public, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
        assert began.returncode == 0, began.stdout
        folder = shared / name
        folder.mkdir()
        owner = pwd.getpwnam(USER)
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        (folder / "image").symlink_to(shared / "image")
        yield Cluster(name, state / "as-user", folder, apptainer)
    finally:
        subprocess.run([scripts / f"{name}.sh", "down", state], cwd=public, check=True, timeout=60)


@pytest.fixture(scope="module")
def gridengine(shared: Path, public: Path, apptainer: str, installed: None) -> Iterator[Cluster]:
    yield from cluster("gridengine", shared, public, apptainer)


@pytest.fixture(scope="module")
def slurm(shared: Path, public: Path, apptainer: str, installed: None) -> Iterator[Cluster]:
    yield from cluster("slurm", shared, public, apptainer)


@pytest.fixture(params=["gridengine", "slurm"])
def scheduler(request: pytest.FixtureRequest) -> Cluster:
    """Each of both."""
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


RunMaker = Callable[..., Submitted]


@pytest.fixture
def make_submitted(run_content: dict[str, Any], shared: Path, request: pytest.FixtureRequest) -> RunMaker:
    """Renders a run on a cluster; keyword arguments with __ for dots change keys."""

    def make(cluster: Cluster, site: str | None = None, **changes: Any) -> Submitted:
        name = request.node.originalname.split("_")[2]
        folder = cluster.folder / name
        content = SITES[site or cluster.name] + 'gpus = 0\ncpu_walltime = "00:10:00"\n'
        content += f'apptainer = "{cluster.apptainer}"\n'
        content += '[environment]\nOMP_NUM_THREADS = "1"\n'  # both hosts are on these cores
        site_file = folder / "our site.toml"
        folder.mkdir()
        site_file.write_text(content)
        settings = {
            "name": name,
            "model.hf": str(shared / "model"),
            "data.input": [f"{shared}/text/**/*.jsonl*"],
            "jobs.site": str(site_file),
            "jobs.group": "tga-group",
            "jobs.nodes": 2,
            "jobs.walltime": "00:10:00",
            "jobs.margin": "00:01:00",
            "jobs.image": str(cluster.folder / "image"),
            "jobs.shards": 2,
            "jobs.chain": 1,
            "train.save_interval": 1000,
            "train.eval_interval": 1000,
        }
        changed: Mapping[str, Any] = {key.replace("__", "."): value for key, value in changes.items()}
        if cluster.name == "slurm":  # its accounts are a matter of a database that this one has not
            settings["jobs.group"] = None
        file = write_run_file(folder, run_content, {**settings, **changed})
        subprocess.run(["chown", "-R", f"{USER}:", folder], check=True)
        return Submitted(cluster, file)

    return make


def saved_step(run: RunFile) -> int:
    return int((run.checkpoints_folder / "latest_checkpointed_iteration.txt").read_text())


def test_the_demo_s_four_stages_on_two_nodes_with_a_deadline_in_between(
    scheduler: Cluster, make_submitted: RunMaker
) -> None:
    """Both train jobs of the first submission stop at their deadline, 20 s after their start; the second has time."""
    submitted = make_submitted(
        scheduler,
        train__steps=400,
        train__global_batch_size=32,
        jobs__walltime="00:02:00",
        jobs__margin="00:01:40",
        jobs__chain=2,
    )
    run = submitted.run
    assert list(submitted.submit()) == ["preprocess", "convert", "train.1", "train.2", "export"]
    again = scheduler.run("bash", submitted.script)
    assert again.returncode == 1
    assert re.search(r"submit.sh: \w+(\.\d)? \(\d+\) has not ended: (qdel|scancel) \d+, or wait", again.stderr)

    states = submitted.wait(600)
    said = submitted.said("train")
    assert states["preprocess"] == "2 done", submitted.said()
    assert states["convert"] == "done", submitted.said()
    assert states["train.1"] == states["train.2"] == "stopped", said
    assert states["export"] == "failed"
    assert "train: stopped at the job's deadline; saved at step" in said
    assert "node 1 of 2, rendezvous node" in said
    assert "node 2 of 2, rendezvous node" in said
    assert 0 < saved_step(run) < 400
    preprocessed = {path: path.stat().st_mtime_ns for path in run.data_folder.rglob("*.bin")}

    submitted = Submitted(scheduler, submitted.file, "jobs.walltime='00:10:00'")
    submitted.submit()
    states = submitted.wait(600)
    said = submitted.said("train")
    assert states["preprocess"] == "2 done", submitted.said()
    assert preprocessed == {path: path.stat().st_mtime_ns for path in run.data_folder.rglob("*.bin")}
    assert states["convert"] == states["export"] == "done", submitted.said()
    assert states["train.1"] == states["train.2"] == "done", said
    assert "train: all 400 steps are done" in said  # what a job says that finds nothing left to do
    assert saved_step(run) == 400
    found = read_steps(train_logs(run.logs_folder))
    assert [step.number for step in found] == list(range(1, 401))
    assert found[-1].loss < found[0].loss - 0.05
    assert (run.hf_folder / "iter_0000400" / "model.safetensors").is_file()
    manifest = json.loads((run.data_folder / "manifest.json").read_text())
    assert manifest["files"] == 3
    assert not list(run.logs_folder.glob("hosts-*"))


def ranks(host: str) -> list[int]:
    """The training processes on a pretend host."""
    found = []
    for pid, line in read_of_all("cmdline"):
        if b"pretrain.py\0--cpu" in line and b"torch.distributed.run" not in line:
            name = subprocess.run(
                ["nsenter", "--target", str(pid), "--uts", "hostname"], capture_output=True, text=True
            )
            if name.stdout.strip() == host:
                found.append(pid)
    return sorted(found)


def test_a_killed_rank_ends_its_job_and_a_deleted_job_is_followed_by_the_next(
    scheduler: Cluster, make_submitted: RunMaker
) -> None:
    submitted = make_submitted(scheduler, train__steps=300, train__save_interval=40, jobs__chain=3)
    jobs = submitted.submit()
    submitted.wait_for_step(1)
    killed_at = time.monotonic()
    os.kill(ranks("node1")[-1], signal.SIGKILL)
    states = submitted.wait(70, "train.1")
    assert time.monotonic() - killed_at < 60
    assert states["train.1"] == "failed"
    said = submitted.said("train")
    assert "cptain: train: node1: SIGKILL (log: " in said
    assert "train: the last lines of " in said
    failure = json.loads((submitted.run.logs_folder / "train-failed.json").read_text())
    assert failure["reason"] == "node1: SIGKILL"

    submitted.wait_for_step(45)
    delete = "scancel" if scheduler.name == "slurm" else "qdel"
    assert scheduler.run(delete, jobs["train.2"]).returncode == 0
    states = submitted.wait(240)
    assert states["train.2"] == "deleted"
    assert states["train.3"] == states["export"] == "done", submitted.said()
    assert "train: from step " in submitted.said("train")
    assert saved_step(submitted.run) == 300
    assert not ranks("node0")
    assert not ranks("node1")


def test_a_stage_that_failed_stops_what_needs_it_and_submitting_again_goes_on(
    scheduler: Cluster, make_submitted: RunMaker
) -> None:
    submitted = make_submitted(scheduler, train__steps=4)
    weights = scheduler.folder.parent / "model" / "model.safetensors"
    weights.rename(weights.with_suffix(".away"))
    try:
        submitted.submit()
        states = submitted.wait(120)
    finally:
        weights.with_suffix(".away").rename(weights)
    assert states == {"preprocess": "2 done", "convert": "failed", "train.1": "failed", "export": "failed"}
    assert re.search(r"^cptain: .*megatron.*\(run convert first\)$", submitted.said("train"), re.MULTILINE)
    assert "checkpoints" in submitted.said("export")
    submitted.submit()
    states = submitted.wait(180)
    assert set(states.values()) == {"done", "2 done"}, submitted.said()


def test_mpirun_starts_the_nodes_too(gridengine: Cluster, make_submitted: RunMaker) -> None:
    submitted = make_submitted(gridengine, "mpirun", train__steps=4)
    submitted.submit()
    assert set(submitted.wait(180).values()) == {"done", "2 done"}, submitted.said()
    assert "node 2 of 2, rendezvous node" in submitted.said("train")


def test_a_folder_that_the_nodes_do_not_share_and_a_missing_image_are_one_line(
    gridengine: Cluster, make_submitted: RunMaker
) -> None:
    submitted = make_submitted(gridengine)
    script = submitted.script.with_name("convert.sh")
    elsewhere = gridengine.run("qsub", "-terse", "-sync", "y", "-v", "RUN=/tmp/only/here.toml", script)
    assert elsewhere.returncode == 1
    text = next(gridengine.folder.glob("convert*.o*")).read_text()
    assert re.fullmatch(r"convert.sh on node\d: /tmp/only/here.toml: no such run file here; it must be on a .*\n", text)
    next(gridengine.folder.glob("convert*.o*")).unlink()
    gridengine.run("qsub", "-terse", "-sync", "y", "-v", "IMAGE=/no.sif", script)
    text = next(gridengine.folder.glob("convert*.o*")).read_text()
    assert re.fullmatch(r"convert.sh on node\d: /no.sif: no such image here \(make image builds it\)\n", text)
    image = gridengine.folder / "image"
    assert gridengine.run("ln", "-s", image, "/tmp/image").returncode == 0  # which only the first host has
    train = ("-g", "tga-group", "-v", "IMAGE=/tmp/image", submitted.script.with_name("train.sh"))
    assert gridengine.run("qsub", "-terse", "-sync", "y", *train).returncode == 1
    text = next(gridengine.folder.glob("train*.o*")).read_text()
    assert re.search(
        r"^train.sh on node1: /tmp/image: (the first node of the job has it, and|no such image)", text, re.M
    )
    image.rename(gridengine.folder / "moved")
    gone = gridengine.run("bash", submitted.script)
    (gridengine.folder / "moved").rename(image)
    assert gone.returncode == 1
    assert gone.stderr == f"submit.sh: {image}: no such image (make image builds it)\n"
    assert not (submitted.script.parent / "submitted").exists()


def test_without_a_scheduler_submit_runs_the_stages_here(
    shared: Path, apptainer: str, run_content: dict[str, Any], tmp_path: Path
) -> None:
    site = tmp_path / "here.toml"
    site.write_text(f'scheduler = "local"\ngpus = 0\napptainer = "{apptainer}"\n')
    file = write_run_file(
        tmp_path,
        run_content,
        {
            "model.hf": str(shared / "model"),
            "jobs.site": str(site),
            "jobs.image": str(shared / "image"),
            "train.steps": 4,
        },
    )
    rendered = subprocess.run(
        [sys.executable, "-m", "cptain", "jobs", file], capture_output=True, text=True, check=True
    )
    done = subprocess.run(["bash", rendered.stdout.strip()], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (load_run(file).hf_folder / "iter_0000004" / "model.safetensors").is_file()


def test_make_jobs_works_through_the_image(shared: Path, apptainer: str, run_content: dict[str, Any]) -> None:
    folder = shared / "by make"
    changes = {"model.hf": str(shared / "model"), "jobs.walltime": "01:00:00", "train.global_batch_size": 16}
    file = write_run_file(folder, run_content, changes)
    made = make("jobs", f"RUN={file}", "SITE=slurm", f"IMAGE={shared}/image", f"APPTAINER={apptainer}")
    assert made.returncode == 0, made.stdout
    assert made.stdout.splitlines()[-1] == str(load_run(file).folder / "jobs" / "submit.sh")
    script = (load_run(file).folder / "jobs" / "train.sh").read_text()
    assert f"IMAGE=${{IMAGE:-'{shared}/image'}}" in script  # the one that it was made in
    nothing = make("jobs", "IMAGE=/no.sif")
    assert "/no.sif: no such image; make image builds it" in nothing.stdout


def test_the_pbs_scripts_start_their_nodes_with_pbs_tmrsh(gridengine: Cluster, make_submitted: RunMaker) -> None:
    """PBS is not to be had. Its scripts run here in a job of Grid Engine, with the variables of recorded jobs, and its
    pbs_tmrsh, which starts a command with its arguments as they are on a host of PBS_NODEFILE, is played by qrsh.
    """
    submitted = make_submitted(gridengine, "pbs", train__steps=4)
    folder = submitted.script.parent
    played = folder / "bin" / "pbs_tmrsh"
    played.parent.mkdir()
    played.write_text(
        '#!/bin/bash\ngrep -qx "$1" "$PBS_NODEFILE" || exit 255\nexec qrsh -inherit "$1" "$(printf "%q " "${@:2}")"\n'
    )
    played.chmod(0o755)
    job = folder / "as-pbs.sh"
    lines = [
        "#!/bin/bash",
        f"export PATH='{played.parent}':$PATH PBS_JOBID=12.pbs0 PBS_O_WORKDIR='{submitted.run.logs_folder}'",
        f"export PBS_NODEFILE='{folder}/12.pbs0'",
        """awk '{ print $1; print $1 }' "$PE_HOSTFILE" > "$PBS_NODEFILE"; unset PE_HOSTFILE; cd /""",
        *(f"PBS_ARRAY_INDEX={task} bash '{folder}/preprocess.sh' || exit" for task in (1, 2)),
        *(f"bash '{folder}/{stage}.sh' || exit" for stage in ("convert", "train", "export")),
    ]
    job.write_text("\n".join(lines) + "\n")
    options = ("-terse", "-sync", "y", "-cwd", "-j", "y", "-l", "node_f=2", "-l", "h_rt=00:05:00")
    done = gridengine.run("qsub", *options, job)
    said = next(gridengine.folder.glob("as-pbs.sh.o*")).read_text()
    assert done.returncode == 0, said
    assert re.search(r"node 2 of 2, rendezvous node\d:10012", said)
    assert saved_step(submitted.run) == 4
    assert not list(submitted.run.logs_folder.glob("hosts-*"))
