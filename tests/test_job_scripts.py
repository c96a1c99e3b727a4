"""The job scripts and submit.sh: what they say, and what no script can hold."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
from conftest import PROJECT, RunFileMaker, cptain, refused
from cptain.run_file import load_run
from stand_ins import APPTAINER, apptainer_of, dry_run, programs, shellcheck, write_site

SITES = sorted(file.stem for file in (PROJECT / "jobs" / "sites").glob("*.toml"))


SCRIPTS = ["convert.sh", "doctor.sh", "export.sh", "preprocess.sh", "submit.sh", "train.sh"]


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
        assert len(lines) < {"submit.sh": 100, "doctor.sh": 80}.get(script.name, 60), script
        assert os.access(script, os.X_OK)
        assert any(f"Rendered by cptain jobs {file}" in line for line in lines)
        subprocess.run(["bash", "-n", script], check=True)
    shellcheck(*scripts)


def test_the_scripts_in_jobs_are_what_the_templates_make_of_the_lab_s_run_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cptain", "jobs", "runs/swallow-8b.toml", "--site", "pbs", "--out", "jobs"]
    shutil.copytree(PROJECT / "runs", tmp_path / "runs")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=os.environ | {"WANDB_MODE": "offline"})
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


def test_scripts_use_a_copy_of_the_run_file_and_say_what_changed_in_it(make_jobs_run: RunFileMaker) -> None:
    file = make_jobs_run()
    assert cptain("jobs", file).exit_code == 0
    copy = load_run(file).folder / "jobs" / "run.toml"
    assert load_run(copy) == load_run(file)
    again = cptain("jobs", file, "--set", "train.lr=5e-4")
    assert "jobs: run: changed since the last time: train.lr: 0.001 → 0.0005" in again.output


def test_scripts_of_another_folder_train_what_set_says(make_ready_run: RunFileMaker, tmp_path: Path) -> None:
    image = tmp_path / "cptain.sif"
    image.touch()
    site = write_site(tmp_path / "here.toml", scheduler="local", gpus=0)
    file = make_ready_run(jobs__image=str(image))
    out = tmp_path / "scripts"
    result = cptain("jobs", file, "--site", site, "--out", out, "--set", "train.steps=2", "--set", "name=other")
    assert result.exit_code == 0, result.output
    environment = programs(tmp_path / "bin", apptainer=APPTAINER)
    done = subprocess.run(["bash", out / "train.sh"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 2 of 2" in done.stderr
    assert (tmp_path / "runs" / "other" / "checkpoints" / "iter_0000002").is_dir()


def test_a_copy_never_takes_the_place_of_the_run_file(make_run: RunFileMaker) -> None:
    file = make_run(jobs__image="/shared/cptain.sif")
    before = file.read_text()
    result = cptain("jobs", file, "--site", "local", "--out", file.parent)
    assert result.exit_code == 2
    assert result.output == (
        f"cptain: {file}: the jobs' copy of the run file would take its place: name another folder with --out\n"
    )
    assert file.read_text() == before
