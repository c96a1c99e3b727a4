"""jobs: sites, sweeps, scripts and what a job finds out about its nodes. tests/test_cluster.py runs them for real."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from conftest import PROJECT, RunFileMaker, cptain
from cptain.errors import CptainError
from cptain.run_file import load_run
from cptain.scheduling.render import chain_length
from cptain.scheduling.sites import load_site
from cptain.scheduling.state import read_states
from cptain.scheduling.sweep import expand
from cptain.training.nodes import Nodes, check_slots, expand_nodelist, own_address, read_nodes

SITES = sorted(file.stem for file in (PROJECT / "jobs" / "sites").glob("*.toml"))
SCRIPTS = ["convert.sh", "export.sh", "preprocess.sh", "submit.sh", "train.sh"]
RECORDINGS = Path(__file__).parent / "recordings"


@pytest.fixture
def make_jobs_run(make_run: RunFileMaker) -> RunFileMaker:
    """Writes run files with all that a site can ask for."""

    def make(**changes: Any) -> Path:
        jobs = {"site": "pbs", "group": "group1", "nodes": 2, "walltime": "10:00:00", "image": "/shared/cptain.sif"}
        more = {"train__global_batch_size": 64} | changes  # the sites have up to 8 GPUs
        return make_run(**{f"jobs__{key}": value for key, value in jobs.items()} | more)

    return make


def refused(*arguments: object) -> str:
    """The one line that a wrong use is answered with."""
    result = cptain("jobs", *arguments)
    assert result.exit_code == 2, result.output
    return result.output.splitlines()[-1]


def shellcheck(*scripts: Path, severity: str = "style") -> None:
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([program, f"--severity={severity}", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# The scripts


@pytest.mark.parametrize("site", SITES)
def test_every_site_renders_scripts_that_are_short_and_pass_shellcheck(site: str, make_jobs_run: RunFileMaker) -> None:
    file = make_jobs_run()
    result = cptain("jobs", file, "--site", site, *(["--set", "jobs.nodes=1"] if site == "local" else []))
    assert result.exit_code == 0, result.output
    folder = load_run(file).folder / "jobs"
    assert result.stdout.strip() == str(folder / "submit.sh")
    scripts = sorted(folder.glob("*.sh"))
    assert [script.name for script in scripts] == SCRIPTS
    for script in scripts:
        lines = script.read_text().splitlines()
        assert len(lines) < (100 if script.name == "submit.sh" else 60), script
        assert os.access(script, os.X_OK)
        assert any(f"Rendered by cptain jobs {file}" in line for line in lines)
        subprocess.run(["bash", "-n", script], check=True)
    shellcheck(*scripts)


def test_the_scripts_in_jobs_are_what_the_templates_make_of_the_lab_s_run_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cptain", "jobs", "runs/swallow-8b.toml", "--site", "pbs", "--out", "jobs"]
    shutil.copytree(PROJECT / "runs", tmp_path / "runs")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for name in [*SCRIPTS, "run.toml"]:
        assert (tmp_path / "jobs" / name).read_text() == (PROJECT / "jobs" / name).read_text(), (
            f"{name} is not what the templates give: cptain jobs runs/swallow-8b.toml --site pbs --out jobs"
        )


def directives(script: Path, mark: str) -> list[str]:
    """The lines that the scheduler reads; Grid Engine reads them anywhere in a script."""
    return [line.removeprefix(mark).strip() for line in script.read_text().splitlines() if line.startswith(mark)]


def test_each_scheduler_gets_its_own_directives(make_jobs_run: RunFileMaker) -> None:
    file = make_jobs_run()
    folder = load_run(file).folder / "jobs"
    wanted = {
        "abci3": ("#PBS", ["-P group1", "-q rt_HF", "-l select=2:mpiprocs=8", "-l walltime=10:00:00", "-j oe"]),
        "tsubame4": ("#$", ["-S /bin/bash", "-cwd", "-l node_f=2", "-l h_rt=10:00:00", "-j y"]),
        "slurm": ("#SBATCH", ["--account=group1", "--nodes=2", "--gpus-per-node=8", "--time=10:00:00"]),
    }
    arrays = {"abci3": "-J 1-4", "tsubame4": "-t 1-4", "slurm": "--array=1-4"}
    for site, (mark, lines) in wanted.items():
        assert cptain("jobs", file, "--site", site).exit_code == 0
        found = directives(folder / "train.sh", mark)
        assert set(lines) <= set(found), found
        assert arrays[site] in directives(folder / "preprocess.sh", mark)
        assert any("group1" in line for line in found) != (site == "tsubame4")  # there it is for the command line
        others = {"#PBS", "#$", "#SBATCH"} - {mark}
        assert not any(directives(folder / name, other) for name in SCRIPTS[:-1] for other in others)


def dry_run(script: Path) -> list[str]:
    done = subprocess.run(["bash", script, "--dry-run"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_submit_chains_the_jobs_by_dependency(make_jobs_run: RunFileMaker) -> None:
    file = make_jobs_run(jobs__chain=3)
    folder = load_run(file).folder / "jobs"
    last: dict[str, list[str]] = {}
    for site in ("pbs", "tsubame4", "slurm"):
        assert cptain("jobs", file, "--site", site).exit_code == 0
        last[site] = dry_run(folder / "submit.sh")
        assert [Path(line.split()[-1].replace("\\", "")).name for line in last[site]] == [
            *("preprocess.sh", "convert.sh", "train.sh", "train.sh", "train.sh", "export.sh")
        ]
    assert "-W depend=afterany:ID-of-preprocess:ID-of-convert" in last["pbs"][2]
    assert "-v LINK=3 -W depend=afterany:ID-of-train.2" in last["pbs"][4]
    assert "qsub -terse -g group1 -v LINK=1 -hold_jid ID-of-preprocess\\,ID-of-convert" in last["tsubame4"][2]
    assert "--dependency=afterany:ID-of-train.3" in last["slurm"][5]
    only = subprocess.run(["bash", folder / "submit.sh", "--dry-run", "export"], capture_output=True, text=True)
    assert only.stdout.count("\n") == 1
    assert "depend" not in only.stdout
    wrong = subprocess.run(["bash", folder / "submit.sh", "trian"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("usage: submit.sh")


def apptainer_of(folder: Path, script: str) -> dict[str, str]:
    """An environment in which a shell script plays apptainer; tests/test_cluster.py has the real one."""
    program = folder / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(f"#!/bin/bash\n{script}")
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "KEPT": str(folder)}


NASTY = [
    "two  words",
    'o\'clock "now"',
    "$(touch pwned)",
    "`id`",
    "a;b&c|d>e",
    "back\\slash",
    "日本語 走る",
    "#$ -l x",
]


@pytest.mark.parametrize("nasty", NASTY)
def test_odd_paths_reach_the_image_as_they_are(nasty: str, tmp_path: Path, make_jobs_run: RunFileMaker) -> None:
    environment = apptainer_of(  # it keeps its arguments
        tmp_path,
        'while [ "$1" != --app ]; do shift; done\nprintf "%s\\n" "$@" > "$KEPT/$2"\n[ "$2" != export ] || exit 99\n',
    )
    work = tmp_path / nasty
    work.mkdir()
    image = work / "an image.sif"
    image.touch()
    file = make_jobs_run()
    content = tomllib.loads(file.read_text()) | {"work_dir": str(work)}
    content["jobs"] |= {"image": str(image), "nodes": 1}
    file.write_text(tomli_w.dumps(content), encoding="utf-8")
    result = cptain("jobs", file, "--site", "local")
    assert result.exit_code == 0, result.output
    submit = Path(result.stdout.strip())
    shellcheck(*submit.parent.glob("*.sh"), severity="warning")  # below it: a remark on $ and ` in single quotes
    done = subprocess.run(["bash", submit], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "submit.sh: export: exit status 1" in done.stderr  # 99 is a word of Grid Engine's own
    for stage in ("preprocess", "convert", "train", "export"):
        kept = (tmp_path / stage).read_text().splitlines()
        assert kept[:4] == ["--app", stage, str(image), str(submit.parent / "run.toml")]
    assert not list(tmp_path.rglob("pwned"))
    assert load_run(submit.parent / "run.toml").work_dir == work


def local_run(make_jobs_run: RunFileMaker, tmp_path: Path) -> Path:
    """submit.sh of a run of the local site, three train jobs long."""
    (tmp_path / "cptain.sif").touch()
    file = make_jobs_run(jobs__site="local", jobs__nodes=1, jobs__chain=3, jobs__image=str(tmp_path / "cptain.sif"))
    result = cptain("jobs", file)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip())


# Keeps the stage and its link, and ends with the status that the file of that name holds.
STATUSES = """while [ "$1" != --app ]; do shift; done
echo "$2$CPTAIN_LINK" >> "$KEPT/stages"
exit "$(cat "$KEPT/$2$CPTAIN_LINK" 2> /dev/null || echo 0)"
"""


@pytest.mark.parametrize(
    ("statuses", "stages", "status", "says"),
    [
        ({"train1": 75, "train2": 75}, "preprocess convert train1 train2 train3 export", 0, ""),
        (
            {"train1": 75, "train2": 75, "train3": 75},
            "preprocess convert train1 train2 train3",
            75,
            "submit.sh: train.3: stopped with work left; the same command continues\n",
        ),
        ({"train1": 75, "train2": 1}, "preprocess convert train1 train2", 1, "submit.sh: train.2: exit status 1\n"),
        (
            {"convert": 75},
            "preprocess convert",
            75,
            "submit.sh: convert: stopped with work left; the same command continues\n",
        ),
    ],
)
def test_without_a_scheduler_a_train_job_that_stops_with_work_left_is_followed_by_the_next(
    statuses: dict[str, int], stages: str, status: int, says: str, make_jobs_run: RunFileMaker, tmp_path: Path
) -> None:
    submit = local_run(make_jobs_run, tmp_path)
    for stage, code in statuses.items():
        (tmp_path / stage).write_text(str(code))
    environment = apptainer_of(tmp_path, STATUSES)
    done = subprocess.run(["bash", submit], env=environment, capture_output=True, text=True)
    assert (tmp_path / "stages").read_text().split() == stages.split()
    assert (done.returncode, done.stderr) == (status, says)


def test_without_a_scheduler_ctrl_c_ends_the_stage_in_hand_and_starts_no_other(
    make_jobs_run: RunFileMaker, tmp_path: Path
) -> None:
    submit = local_run(make_jobs_run, tmp_path)
    environment = apptainer_of(
        tmp_path,
        'while [ "$1" != --app ]; do shift; done\necho "$2" >> "$KEPT/stages"\n[ "$2" = train ] || exit 0\n'
        'trap "exit 75" INT\ntouch "$KEPT/training"\nwhile :; do sleep 0.05; done\n',
    )
    process = subprocess.Popen(
        ["bash", submit], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "training").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (tmp_path / "stages").read_text().split() == ["preprocess", "convert", "train"]
    assert (process.returncode, said) == (
        75,
        "submit.sh: train.1: stopped with work left; the same command continues\n",
    )


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("name", "x\ny", "name"),
        ("name", "$(id)", "name"),
        ("jobs.group", "g; rm -rf", "jobs.group"),
        ("jobs.group", "g\n#PBS -q other", "jobs.group"),
        ("jobs.walltime", "12 hours", 'jobs.walltime = "12 hours": allowed: HH:MM:SS, such as "12:00:00"'),
        ("jobs.walltime", "1:00:00\n", "jobs.walltime"),
        ("jobs.image", "/a\nb", "a path cannot hold a line break"),
        ("work_dir", "/a\rb", "a control character cannot stand in a job script"),
        ("jobs.nodes", 129, "jobs.nodes = 129: site abci3 allows at most 128"),
        ("jobs.walltime", "169:00:00", "jobs.walltime = 169:00:00: site abci3 allows at most 168:00:00"),
        ("jobs.walltime", None, "jobs.walltime: is missing, and site abci3 needs it"),
        ("jobs.walltime", "00:09:00", "nothing is left of it after jobs.margin = 00:10:00"),
        ("jobs.group", None, "jobs.group: is missing, and site abci3 needs it"),
        ("jobs.image", None, "jobs.image: is missing"),
        ("jobs.site", None, "jobs.site: is missing; --site names one too"),
        ("jobs.site", "abc3", 'site "abc3": allowed: abci3, gridengine, local, pbs, slurm, tsubame4, or the path of'),
        ("jobs.site", "no-such.toml", "no-such.toml: cannot read the site file: No such file or directory"),
    ],
)
def test_what_no_script_can_hold_or_the_site_would_refuse_is_one_line(
    key: str, value: object, says: str, make_jobs_run: RunFileMaker, tmp_path: Path
) -> None:
    changes = {"jobs.site": "abci3", key: value}
    file = make_jobs_run(**{name.replace(".", "__"): to for name, to in changes.items()})
    assert says in refused(file)
    assert not (tmp_path / "runs").exists()


def test_a_folder_whose_name_the_jobs_would_expand_is_refused(make_jobs_run: RunFileMaker, tmp_path: Path) -> None:
    file = tmp_path / "$HOME" / "run.toml"
    file.parent.mkdir()
    content = tomllib.loads(make_jobs_run().read_text()) | {"work_dir": "runs"}
    file.write_text(tomli_w.dumps(content))
    said = refused(file)
    assert said == (
        f'cptain: work_dir = "{file.parent}/runs": the jobs would take the $ in it for a variable: rename the folder'
    )
    assert not (file.parent / "runs").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scheduler": "lsf"}, 'scheduler = "lsf": input should be'),
        ({"launcher": "qrsh"}, 'launcher = "qrsh" with scheduler = "slurm": allowed: srun, mpirun'),
        ({"gpus": None}, "gpus: is missing"),
        ({"qeue": "x"}, 'qeue = "x": no such key (allowed: apptainer, '),
        ({"train": ["nodes=2"]}, "allowed: what follows #PBS"),
        ({"train": ["--x={gpus}"]}, "allowed in braces: {nodes}"),
        ({"train": ["--x\nrm"]}, "allowed: one line"),
        ({"max_walltime": "a day"}, 'max_walltime = "a day": allowed: HH:MM:SS'),
        ({"binds": ["/a b"]}, "binds[0]"),
        ({"environment": {"A B": "x"}}, "environment"),
        ({"modules": ["x; id"]}, "modules[0]"),
    ],
)
def test_a_wrong_site_file_is_told_key_by_key(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    site = {"scheduler": "slurm", "launcher": "srun", "gpus": 8} | change
    file = tmp_path / "my site.toml"
    file.write_text(tomli_w.dumps({key: value for key, value in site.items() if value is not None}))
    result = cptain("doctor", "--site", file)
    assert result.exit_code == 2, result.output
    assert result.output.startswith(f"cptain: {file}: ")
    assert says in result.output.splitlines()[-1]


def test_a_site_file_of_one_s_own_works_by_path(tmp_path: Path, make_jobs_run: RunFileMaker) -> None:
    site = tmp_path / "ours.toml"
    content = 'scheduler = "pbs"\ngpus = 2\nscratch = "$PBS_LOCALDIR/x"\ncache = "/c c"\n[environment]\n'
    content += 'A = "$(id) `id` \\"$HOME"'
    site.write_text(content + "\n")
    assert cptain("doctor", "--site", site).output == f"{site}: pbs, no launcher: one node a job, 2 GPUs a node\n"
    file = make_jobs_run()
    assert "jobs.nodes = 2: site ours has no launcher, and so one node a job" in refused(file, "--site", site)
    assert cptain("jobs", file, "--site", site, "--set", "jobs.nodes=1").exit_code == 0
    script = load_run(file).folder / "jobs" / "convert.sh"
    shellcheck(script)
    (line,) = [line for line in script.read_text().splitlines() if line.startswith("settings=")]
    shown = subprocess.run(
        ["bash", "-c", f'{line}\nprintf "%s\\n" "${{settings[@]}}"'],
        env={"HOME": "/home/me", "PBS_LOCALDIR": "/local"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines() == [
        'A=$(id) `id` "/home/me',
        "TMPDIR=/local/x",
        "HF_HOME=/c c/huggingface",
        "XDG_CACHE_HOME=/c c",
    ]


def test_scripts_use_a_copy_of_the_run_file_and_say_what_changed_in_it(make_jobs_run: RunFileMaker) -> None:
    file = make_jobs_run()
    assert cptain("jobs", file).exit_code == 0
    copy = load_run(file).folder / "jobs" / "run.toml"
    assert load_run(copy) == load_run(file)
    again = cptain("jobs", file, "--set", "train.lr=5e-4")
    assert "jobs: run: changed since the last time: train.lr: 0.001 → 0.0005" in again.output


# Chains


def test_a_chain_is_as_long_as_the_steps_need_and_one_more(make_jobs_run: RunFileMaker) -> None:
    def length(**changes: Any) -> int:
        return chain_length(load_run(make_jobs_run(**changes)))

    long = {"train__steps": 3600, "jobs__walltime": "10:10:00"}  # ten hours and the margin
    assert length(jobs__chain=7) == 7
    assert length(**long) == 2  # nothing tells how long a step takes
    assert length(**long, jobs__seconds_per_step=1.0) == 2
    assert length(**long, jobs__seconds_per_step=10.0) == 2
    assert length(**long, jobs__seconds_per_step=10.1) == 3
    assert length(**long, jobs__seconds_per_step=40.0) == 5
    with pytest.raises(CptainError, match=r"jobs\.chain: 3600 steps of 2000 s are 201 jobs"):
        length(**long, jobs__seconds_per_step=2000.0)


def test_a_chain_learns_from_earlier_logs(trained_run: Path) -> None:
    run = load_run(trained_run, ("jobs.walltime=00:10:01", "train.steps=1000000"))
    with pytest.raises(CptainError, match="1000000 steps of"):
        chain_length(run)


# Sweeps


def test_a_sweep_is_one_run_a_combination_that_share_what_they_can(
    make_jobs_run: RunFileMaker, text_folder: Path
) -> None:
    file = make_jobs_run(
        name="base",
        sweep={
            "train.lr, train.min_lr": [[1e-3, 1e-4], [2.5e-5, 2e-6]],
            "data.input": [[f"{text_folder}/*.jsonl"], [f"{text_folder}/sub/*"]],
            "jobs.nodes": [1],
        },
    )
    runs = expand(load_run(file), file)
    assert [run.name for run in runs] == [
        "base-lr0.001-input1-nodes1",
        "base-lr0.001-input2-nodes1",
        "base-lr2.5e-05-input1-nodes1",
        "base-lr2.5e-05-input2-nodes1",
    ]
    assert [run.train.min_lr for run in runs] == [1e-4, 1e-4, 2e-6, 2e-6]
    shared = load_run(file).folder
    assert {run.megatron_folder for run in runs} == {shared / "megatron"}
    assert [run.data_folder for run in runs] == [shared / "data-1", shared / "data-2"] * 2
    assert not any(run.sweep for run in runs)
    result = cptain("jobs", file)
    assert result.exit_code == 0, result.output
    lines = dry_run(shared / "jobs" / "submit.sh")
    assert sum("preprocess.sh" in line for line in lines) == 2
    assert sum("convert.sh" in line for line in lines) == 1
    assert sum("export.sh" in line for line in lines) == 4
    shellcheck(shared / "jobs" / "submit.sh")


def test_the_lab_s_six_experiments_differ_only_where_they_should(tmp_path: Path) -> None:
    assert cptain("jobs", PROJECT / "runs" / "swallow-8b-sweep.toml", "--out", tmp_path).exit_code == 0
    names = [f"exp{number}" for number in range(1, 7)]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == names
    runs = [load_run(tmp_path / name / "run.toml") for name in names]
    assert len({(run.train.lr, tuple(run.data.input)) for run in runs}) == 6
    assert [run.jobs.nodes for run in runs] == [4, 4, 4, 4, 4, 16]
    plain = {}
    for name in names:
        text = (tmp_path / name / "train.sh").read_text()
        plain[name] = text.replace(name, "NAME")
    assert len({plain[name] for name in names[:5]}) == 1
    changed = set(plain["exp6"].splitlines()) - set(plain["exp1"].splitlines())
    assert sorted(line.split("  #")[0] for line in changed) == [
        "#$ -l h_rt=01:40:00",
        "#$ -l node_f=16",
        "deadline=$(($(date +%s) + 5400))",
        'settings+=("CPTAIN_LINK=${LINK:-1}" CPTAIN_NODES=16 CPTAIN_GPUS=4 "CPTAIN_DEADLINE=$deadline" '
        "CPTAIN_CORES_PER_GPU=48)",
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sweep": {"train.learning_rate": [1]}}, 'no key "train.learning_rate" in a run file'),
        ({"sweep": {"sweep": [1]}}, 'no key "sweep" in a run file'),
        ({"sweep": {"train.lr, train.min_lr": [[1e-3]]}}, "allowed: lists of 2 values; not [0.001]"),
        ({"sweep": {"train.lr": [1e-3, -1]}}, "train.lr = -1: input should be greater than 0"),
        ({"sweep": {"train.lr": [1e-3, 1e-3]}}, 'sweep: two of its runs would be "run-lr0.001"'),
        (
            {"sweep": {"data.input": [["/a/*"], ["/b/*"]]}, "data__output": "/shared"},
            "data.output is one folder, and the sweep would put different things into it",
        ),
    ],
)
def test_a_sweep_that_is_none_is_refused(changes: dict[str, Any], says: str, make_jobs_run: RunFileMaker) -> None:
    assert says in refused(make_jobs_run(**changes))


@pytest.mark.parametrize(
    "sweep",
    [
        {"train.lr": [2.5e-4, 1e-3], "data.key": ["text", "body"]},
        {"name, train.lr, train.min_lr": [["true", 1e-3, 1e-4], ["an exp 2", 1e-3, 2e-6]], "jobs.nodes": [1]},
        {"train.tokens": ["8K"], "train.megatron_args": [["--seed", "1"]], "data.mix": ["uniform"]},
    ],
)
def test_a_stage_refuses_a_sweep_with_a_command_that_does_one_of_its_runs(
    sweep: dict[str, Any], make_jobs_run: RunFileMaker, tmp_path: Path
) -> None:
    file = make_jobs_run(name="base", jobs__nodes=1, sweep=sweep)
    assert cptain("jobs", file, "--set", "train.seq_length=32").exit_code == 0
    first = expand(load_run(file), file)[0]
    (rendered,) = (first.folder / "jobs").glob("run.toml")
    result = cptain("convert", file, "--workers", "1", "--set", "train.seq_length=32")
    assert result.exit_code == 2
    count = len(expand(load_run(file), file))
    said, _, command = result.output.rstrip("\n").partition("; the first of them: ")
    assert said == f"cptain: {file}: sweep: describes {count} runs and a stage works on one"
    assert "\n" not in command
    program = tmp_path / "bin" / "cptain"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\nexec "{sys.executable}" -m cptain "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert load_run(first.folder / "run.toml") == load_run(rendered)
    assert (load_run(file).folder / "megatron" / "release").is_dir()


# Arrays


def test_an_array_s_tasks_share_the_files_and_leave_one_manifest(make_run: RunFileMaker) -> None:
    whole, parts = make_run(name="whole"), 2
    assert cptain("preprocess", whole).exit_code == 0
    file = make_run()
    data = load_run(file).data_folder
    first = cptain("preprocess", file, "--shard", f"1/{parts}")
    assert first.exit_code == 0
    assert "preprocess: part 1 of 2: 1 files done; 2 files of other parts are not done yet" in first.output
    assert not (data / "manifest.json").exists()
    assert cptain("preprocess", file, "--shard", f"2/{parts}").exit_code == 0
    expected = json.loads((load_run(whole).data_folder / "manifest.json").read_text())
    assert json.loads((data / "manifest.json").read_text()) == expected
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.bin")}
    (data / "a_text_document.bin").unlink()
    for part in (1, 2):
        assert cptain("preprocess", file, "--shard", f"{part}/{parts}").exit_code == 0
    after = {path: path.stat().st_mtime_ns for path in data.rglob("*.bin")}
    assert [path.name for path in before if before[path] != after[path]] == ["a_text_document.bin"]
    assert cptain("preprocess", file, "--shard", "9/9").exit_code == 0  # more tasks than files


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "-1/2", "1/2/3", ""])
def test_a_shard_that_is_none_is_refused(shard: str, make_run: RunFileMaker) -> None:
    result = cptain("preprocess", make_run(), "--shard", shard)
    assert result.exit_code == 2
    assert "allowed: I/N with I from 1 to N, such as 1/4" in result.output


def test_parts_are_even_in_bytes(tmp_path: Path, make_run: RunFileMaker) -> None:
    from cptain.data.inputs import input_files
    from cptain.data.preprocess import _tasks, shard
    from cptain.data.recipe import Recipe

    sizes = [100, 90, 50, 40, 30, 20, 10, 10, 10]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.jsonl").write_bytes(b" " * size)
    run = load_run(make_run(data__input=[f"{tmp_path}/*.jsonl"]))
    made = Recipe("text", False, "fail", 1, "hash", 1, False)
    tasks = _tasks(run, made, False, input_files(run.data.input))
    parts = [shard(tasks, number, 3) for number in (1, 2, 3)]
    assert sorted(task.record.prefix for part in parts for task in part) == sorted(task.record.prefix for task in tasks)
    assert [sum(task.record.bytes for task in part) for part in parts] == [120, 120, 120]


# Nodes


def own_name() -> str:
    return socket.gethostname()


def pe_hostfile(tmp_path: Path, lines: list[str]) -> dict[str, str]:
    file = tmp_path / "pe_hostfile"
    file.write_text("".join(f"{line}\n" for line in lines))
    return {"PE_HOSTFILE": str(file), "JOB_ID": "4711"}


def pbs_nodefile(tmp_path: Path, hosts: list[str]) -> dict[str, str]:
    file = tmp_path / "nodefile"
    file.write_text("".join(f"{host}\n" for host in hosts))
    return {"PBS_NODEFILE": str(file), "PBS_JOBID": "12.pbs0"}


def test_outside_a_job_and_on_one_node_there_is_nothing_to_join(tmp_path: Path) -> None:
    assert read_nodes({}) is None
    assert read_nodes(pbs_nodefile(tmp_path, ["only"] * 8)) is None
    assert read_nodes({"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "1"}) is None
    assert read_nodes({"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": "1"}) is None


def test_a_list_of_hosts_that_the_image_cannot_see_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_nodes({"PBS_NODEFILE": "/nowhere/1.pbs0"}) is None
    assert (
        "train: PBS_NODEFILE=/nowhere/1.pbs0: No such file or directory: training on this node"
        in capsys.readouterr().err
    )


def test_hosts_come_once_in_the_scheduler_s_order(tmp_path: Path) -> None:
    hosts = ["b"] * 8 + ["a"] * 8 + [own_name()] * 8 + ["b"]
    nodes = read_nodes(pbs_nodefile(tmp_path, hosts))
    assert nodes is not None
    assert (nodes.job, nodes.hosts, nodes.rank) == ("12.pbs0", ["b", "a", own_name()], 2)
    assert nodes.endpoint == "b:10012"


def test_sixty_four_nodes_agree_on_one_rendezvous() -> None:
    environment = {"SLURM_JOB_NODELIST": "gpu[001-060,101-104]", "SLURM_JOB_ID": "123456"}
    every = [read_nodes({**environment, "SLURM_NODEID": str(rank)}) for rank in range(64)]
    assert [nodes.rank for nodes in every if nodes] == list(range(64))
    assert {nodes.endpoint for nodes in every if nodes} == {"gpu001:13456"}
    assert every[63] is not None
    assert every[63].hosts[59:61] == ["gpu060", "gpu101"]
    command = every[63].torchrun("10.0.0.64")
    assert command[:2] == ["--nnodes", "64"]
    assert "is_host=0,join_timeout=600,read_timeout=600" in command
    assert every[0] is not None
    assert "is_host=1,join_timeout=600,read_timeout=600" in every[0].torchrun("10.0.0.1")


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[09-11,07],gpu-a", ["n09", "n10", "n11", "n07", "gpu-a"]),
        ("rack1-n[1-2]-ib,x", ["rack1-n1-ib", "rack1-n2-ib", "x"]),
    ],
)
def test_slurm_s_short_lists_are_read(nodelist: str, hosts: list[str]) -> None:
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["n[1-", "n[a-b]", "", "n[]"])
def test_a_list_that_is_none_is_refused(nodelist: str) -> None:
    with pytest.raises(CptainError, match="cannot be read"):
        expand_nodelist(nodelist)


def own_real_address() -> str:
    return next(
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    )


def test_a_node_finds_itself_by_name_short_name_or_address_and_the_script_s_word_wins(tmp_path: Path) -> None:
    for mine in (own_name(), f"{own_name()}.cluster.example", own_name().upper(), own_real_address()):
        nodes = read_nodes(pbs_nodefile(tmp_path, ["elsewhere.invalid", mine]))
        assert nodes is not None
        assert nodes.rank == 1, mine
    said = read_nodes({**pbs_nodefile(tmp_path, ["x.invalid", "y.invalid"]), "CPTAIN_NODE": "1"})
    assert said is not None
    assert said.rank == 1
    with pytest.raises(CptainError, match=r"this node \(.*\) is none of the job's: x.invalid y.invalid"):
        read_nodes(pbs_nodefile(tmp_path, ["x.invalid", "y.invalid"]))


def test_ipv6_addresses_are_put_in_brackets() -> None:
    assert Nodes("7", ["fd00::1", "fd00::2"]).endpoint == "[fd00::1]:10007"


def test_torchrun_really_meets_over_ipv6(tmp_path: Path) -> None:
    """Two nodes on one machine: the endpoint, and all that is said of it, is what torchrun takes."""
    with socket.socket(socket.AF_INET6) as probe:
        job = next(job for job in range(5000, 9000) if probe.connect_ex(("::1", 10000 + job)))
    nodes = [Nodes(str(job), ["::1", "::1"], [], rank) for rank in (0, 1)]
    script = tmp_path / "hello.py"
    script.write_text(
        "import torch.distributed as d\nd.init_process_group('gloo')\nx = [None, None]\n"
        "d.all_gather_object(x, d.get_rank())\nprint('met', x)\nd.barrier()\nd.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run"]
    processes = [
        subprocess.Popen(
            [*command, *node.torchrun("::1"), "--nproc-per-node", "1", str(script)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for node in nodes
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            assert "met [0, 1]" in output
    finally:
        for process in processes:
            process.kill()


def test_slots_say_how_many_gpus_a_host_gives(tmp_path: Path) -> None:
    lines = ["a 192 all.q@a UNDEFINED", f"{own_name()} 96 all.q@b UNDEFINED"]
    nodes = read_nodes(pe_hostfile(tmp_path, lines))
    assert nodes is not None
    assert nodes.slots == [192, 96]
    with pytest.raises(CptainError, match="has 96 slots, and 4 GPUs on this node need 4 × 48"):
        check_slots(nodes, 48, 4)
    check_slots(Nodes("1", ["a", "b"], [192, 192]), 48, 4)
    with pytest.raises(CptainError, match="a line is not: host slots queue processors"):
        read_nodes(pe_hostfile(tmp_path, ["a"]))


def test_a_peer_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(
        CptainError, match=r"nowhere\.invalid, of the same job, cannot be reached: its name does not res"
    ):
        own_address(Nodes("1", ["nowhere.invalid", "me"], [], 1))
    with pytest.raises(CptainError, match="localhost, of the same job, cannot be reached: its name resolves to "):
        own_address(Nodes("1", ["localhost", "me"], [], 1))


# States


def state_words(text: str) -> list[tuple[str, str, str]]:
    return [(state.job, state.word, state.detail) for state in read_states(text)]


@pytest.mark.parametrize(
    ("recording", "states"),
    [
        ("qstat-done", [("0.pbs0", "done", "")]),
        ("qstat-running", [("5.pbs0", "running", "pbs0")]),
        ("qstat-deleted", [("5.pbs0", "ending", "pbs0")]),
        ("qstat-exit7", [("1.pbs0", "failed", "exit status 7")]),
        ("qstat-queued-too-big", [("6.pbs0", "queued", "Can Never Run: Not enough total nodes available")]),
        ("qstat-afterok-of-a-failed-job", [("2.pbs0", "never ran", "depends on afterok:1.pbs0@pbs0")]),
        (
            "qstat-array-task3-exit7",
            [("3[].pbs0", "done", ""), ("3[].pbs0", "done", ""), ("3[].pbs0", "failed", "exit status 7")],
        ),
    ],
)
def test_what_a_real_openpbs_said_is_understood(recording: str, states: list[tuple[str, str, str]]) -> None:
    assert state_words((RECORDINGS / "openpbs" / f"{recording}.json").read_text()) == states


def test_jobs_that_stopped_with_work_left_are_told_from_failures() -> None:
    text = "\n".join(
        f"JobId={number} JobName=x JobState={state} Reason={reason} ExitCode={code} NodeList=n[1-2]"
        for number, state, reason, code in [
            (1, "FAILED", "NonZeroExitCode", "75:0"),
            (2, "FAILED", "NonZeroExitCode", "1:0"),
            (3, "PENDING", "Dependency", "0:0"),
            (4, "TIMEOUT", "TimeLimit", "0:15"),
        ]
    )
    assert state_words(text) == [
        ("1", "stopped", "work is left"),
        ("2", "failed", "exit status 1"),
        ("3", "waiting", "Dependency"),
        ("4", "timeout", "killed at its walltime: jobs.margin is too short"),
    ]
    with pytest.raises(CptainError, match="cannot be read"):
        read_states("{")


@pytest.mark.parametrize("site", ["pbs", "tsubame4", "slurm"])
def test_the_state_of_a_run_that_was_never_submitted_is_one_line(site: str, make_jobs_run: RunFileMaker) -> None:
    submit = Path(cptain("jobs", make_jobs_run(), "--site", site).stdout.strip())
    done = subprocess.run(["bash", submit, "--state"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"submit.sh: {submit.parent}: nothing was submitted from here yet\n"


def test_the_state_of_submitted_jobs_is_what_cptain_makes_of_the_scheduler_s_output(
    make_jobs_run: RunFileMaker, tmp_path: Path
) -> None:
    """qstat is played by a script that prints what a real OpenPBS said."""
    submit = Path(cptain("jobs", make_jobs_run()).stdout.strip())
    (submit.parent / "submitted").write_text("preprocess 3[].pbs0\nconvert 1.pbs0\n")
    environment = apptainer_of(tmp_path, f'shift 3\nexec "{sys.executable}" -m cptain "$@"\n')
    qstat = tmp_path / "bin" / "qstat"
    qstat.write_text(f"#!/bin/bash\ncat '{RECORDINGS}/openpbs/qstat-array-task3-exit7.json'\n")
    qstat.chmod(0o755)
    done = subprocess.run(["bash", submit, "--state"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "preprocess  3[].pbs0  2 done, 1 failed  exit status 7",
        "convert     1.pbs0    unknown",
    ]


def test_every_site_of_the_project_is_right() -> None:
    for name in SITES:
        site, file = load_site(name)
        assert cptain("doctor", "--site", name).output.startswith(f"{file}: {site.scheduler}, ")
        assert site.scheduler == "local" or site.launcher
    assert cptain("doctor", "--site", "abc3").exit_code == 2
