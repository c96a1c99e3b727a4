"""Singularity.def as data: read by spython, and section by section, since spython forgets which app a section is of."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from spython.main.parse.parsers import get_parser

PROJECT = Path(__file__).resolve().parent.parent
RECIPE = PROJECT / "Singularity.def"
CONSTRAINTS = PROJECT / "apptainer" / "constraints.txt"
STAGES = ("preprocess", "convert", "train", "export")


def spython_recipe():
    """What spython makes of the recipe."""
    return get_parser("singularity")(str(RECIPE)).recipe["spython-base"]


def sections() -> dict[str, str]:
    """The body of each section, by its heading without the percent sign: "post", "apprun train"."""
    parts = re.split(r"^%(\w+(?: \w+)?)\n", RECIPE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def commands() -> list[str]:
    """The lines of %post, continued lines joined, comments left out."""
    lines = sections()["post"].replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if not line.strip().startswith("#")]


def pins() -> dict[str, str]:
    """apptainer/pins.mk."""
    return dict(re.findall(r"^(\w+)\s*\?= (.+)$", (PROJECT / "apptainer" / "pins.mk").read_text(), flags=re.MULTILINE))


def test_spython_reads_the_recipe_and_everything_it_copies_exists() -> None:
    recipe = spython_recipe()
    assert recipe.fromHeader == "{{ base }}"  # spython's own lower case
    sources = {line.split()[0] for line in recipe.files}
    assert {"apps", "pyproject.toml", "apptainer/constraints.txt"} <= sources
    assert all((PROJECT / source).exists() for source in sources)
    assert "PYTHONNOUSERSITE=1" in recipe.environ
    assert any("cptain --version" in line for line in sections()["test"].splitlines())


def test_the_recipe_has_the_default_base_and_megatron_that_pins_mk_names() -> None:
    arguments = dict(re.findall(r"^ +(\w+)=(.*)$", sections()["arguments"], flags=re.MULTILINE))
    assert pins().keys() == {"BASE", "MEGATRON_REPO", "MEGATRON_REF"}
    assert {name: arguments[name] for name in pins()} == pins()
    assert re.fullmatch(r"[0-9a-f]{40}", arguments["MEGATRON_REF"])
    assert re.search(r":\d+\.\d+-py3$", arguments["BASE"]), "the base has a tag that does not move"
    assert arguments["BOOTSTRAP"] == "docker"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_an_app_that_runs_helps_and_tests(stage: str) -> None:
    found = sections()
    assert found[f"apprun {stage}"].strip() == f'exec cptain {stage} "$@"'
    assert (
        f"apptainer run {'--nv ' if stage == 'train' else ''}--app {stage} IMAGE run.toml" in found[f"apphelp {stage}"]
    )
    assert found[f"apptest {stage}"].split()[:2] == ["set", "-e"]
    assert found[f"applabels {stage}"].strip()


def test_there_are_no_other_apps() -> None:
    assert {heading.split()[1] for heading in sections() if heading.startswith("app")} == set(STAGES)


def test_nothing_is_installed_by_pip_without_exact_versions() -> None:
    installs = [line for line in commands() if "pip install" in line]
    assert len(installs) >= 3
    assert all("--constraint $constraints" in line for line in installs)
    pinned = [
        line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][\w.]*", line) for line in pinned), pinned
    names = {line.partition("==")[0].lower().replace("_", "-") for line in pinned}
    asked = {word for line in installs for word in re.findall(r" ([a-z0-9]+)(?= |$)", line.split("pip install")[1])}
    assert {"accelerate", "pybind11"} <= asked - {"off"} <= names
    assert {"wandb", "sentencepiece", "tiktoken"} <= names  # by extras of cptain's
    builds = [line for line in commands() if "pip wheel" in line]
    assert builds
    assert all("PIP_CONSTRAINT=" in line and "PIP_BUILD_CONSTRAINT=" in line for line in builds)


def test_nothing_is_cloned_without_saying_what() -> None:
    lines = commands()
    assert not any(re.search(r"git( -C \S+)? (clone|pull)", line) for line in lines)
    fetches = [line for line in lines if re.search(r"git\b.* fetch ", line)]
    assert fetches
    assert all(line.endswith('"{{ MEGATRON_REPO }}" "{{ MEGATRON_REF }}"') for line in fetches)


def test_the_recipe_never_ends_post_early_or_names_a_secret() -> None:
    assert not any(re.search(r"\bexit 0\b", line) for line in commands()), "it would skip the apps"
    text = RECIPE.read_text(encoding="utf-8")
    assert not re.search(r"(TOKEN|API_KEY|PASSWORD)\s*=", text)


def test_the_makefile_and_the_constraints_agree_on_torch() -> None:
    (torch,) = re.findall(r"^TORCH +\?= (.+)$", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)
    assert torch in CONSTRAINTS.read_text(encoding="utf-8").splitlines()


def held(constraints: Path, base_constraints: Path) -> list[str]:
    """What hold.py prints in this Python, which has torch as a base has."""
    return subprocess.run(
        [sys.executable, PROJECT / "apptainer" / "hold.py", constraints],
        env={**os.environ, "PIP_CONSTRAINT": str(base_constraints)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()


def test_a_base_with_torch_keeps_its_own_versions_and_its_own_constraints(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "constraints.txt", tmp_path / "constraint.txt"
    ours.write_text("# comment\ntorch==1.0\nno_such.package==3.2\nProto_Buf==9.9\nnumpy==1.0\n")
    theirs.write_text("# the base's\nproto-buf==4.24.4\n")
    assert held(ours, theirs) == [
        f"torch=={importlib.metadata.version('torch')}",
        "no_such.package==3.2",
        f"numpy=={importlib.metadata.version('numpy')}",
    ]


@pytest.mark.parametrize("script", sorted((PROJECT / "apptainer").glob("*.sh")), ids=lambda path: path.name)
def test_a_script_passes_shellcheck(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-x", script.relative_to(PROJECT)], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
