"""make image: what it refuses, and what it leaves when it fails; with either program."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROJECT, make

STAGES = ("preprocess", "convert", "train", "export")


@pytest.mark.parametrize(("version", "status"), [("4.1.5", 0), ("4.1.5", 255), ("3.11.4-1", 0)])
def test_an_image_is_built_with_the_options_and_variables_of_singularityce(
    version: str, status: int, tmp_path: Path
) -> None:
    program = tmp_path / "singularity"
    program.write_text(
        f'#!/bin/bash\ncase $1 in --version) echo "singularity-ce version {version}" ;; version) echo {version} ;;\n'
        "build)\n"
        f'printf "%s\\n" "$@" > "{tmp_path}/arguments"; env > "{tmp_path}/environment"\n'
        f'touch "${{@: -2:1}}"; exit {status} ;; esac\n'
    )
    program.chmod(0o755)
    image = tmp_path / "cptain.sif"
    names = ("BOOTSTRAP", "BASE", "MEGATRON", "MEGATRON_REPO", "MEGATRON_REF")
    environment = {**os.environ, **dict.fromkeys(names, "x"), "APPTAINER": str(program), "IMAGE_GB": "0"}
    environment |= {"https_proxy": "http://proxy:1", "APPTAINER_CACHEDIR": str(tmp_path / "cache")}
    build = [PROJECT / "apptainer" / "build.sh", image]
    done = subprocess.run(build, env=environment, capture_output=True, text=True)
    if version < "4":
        assert done.stderr == f"image: {program} is version {version}, and Singularity.def needs 4.0 or later\n"
        return
    assert not {"--mksquashfs-args", "--ignore-subuid"} & set((tmp_path / "arguments").read_text().splitlines())
    told = (tmp_path / "environment").read_text().splitlines()
    assert {"SINGULARITYENV_https_proxy=http://proxy:1", f"SINGULARITY_CACHEDIR={tmp_path}/cache"} <= set(told)
    assert any(line.startswith(f"SINGULARITY_TMPDIR={tmp_path}/") for line in told)
    if status:
        assert done.stderr == (
            "image: the build failed (status 255; its reason is above); an image that Apptainer built on another "
            f"machine runs here too: copy it to {image}\n"
        )
    else:
        assert done.stdout == f"image: {image}\n"


# How a build goes wrong. Each leaves an image that was there as it was, and nothing half-built beside it.


@pytest.fixture
def old(image: Path, tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "old image.sif"
    file.write_text("good")
    yield file
    assert file.read_text() == "good"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in (".apptainer", "bin")) == [file.name]
    assert list(tmp_path.glob(".apptainer/tmp/*")) == []


def refused(*arguments: str, **environment: str) -> str:
    """The one line that a refused build says."""
    done = make(*arguments, **environment)
    assert done.returncode != 0, done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("image: "))
    return line


@pytest.mark.parametrize(
    ("target", "variable"), [("image", "IMAGE"), ("image-cpu", "IMAGE_CPU"), ("sandbox", "SANDBOX")]
)
def test_an_image_that_is_there_is_not_overwritten_unasked(old: Path, target: str, variable: str) -> None:
    assert refused(target, f"{variable}={old}") == f"image: {old} exists: FORCE=1 replaces it"


def test_a_machine_without_apptainer_is_told_how_to_get_it(old: Path) -> None:
    line = refused("image", f"IMAGE={old}", "FORCE=1", "APPTAINER=/nowhere/apptainer")
    assert line.startswith("image: no apptainer or singularity on PATH: ")
    assert "module load apptainer" in line


@pytest.mark.parametrize("version", ["1.1.9-1.el8", "1.0.0", "0.9"])
def test_an_apptainer_without_build_arguments_is_refused(old: Path, version: str) -> None:
    fake = old.parent / "bin" / "apptainer"  # no release older than 1.2 can be had for these machines
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho {version}\n")
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    line = refused("image", f"IMAGE={old}", "FORCE=1", PATH=path)
    assert line == f"image: {fake} is version {version}, and Singularity.def needs 1.2 or later"


def test_a_disk_without_room_is_refused_before_anything_is_built(old: Path) -> None:
    line = refused("image", f"IMAGE={old}", "FORCE=1", "IMAGE_GB=1000000")
    assert "3000000 GB" in line
    assert "APPTAINER_TMPDIR=" in line


def test_a_registry_that_cannot_be_reached_leaves_the_old_image(old: Path) -> None:
    line = refused("image", f"IMAGE={old}", "FORCE=1", "IMAGE_GB=1", "BASE=localhost:9/nosuch:1")
    assert line.startswith("image: the build failed")
    assert line.endswith(f"{old} is as it was")


def test_an_inexact_megatron_is_refused(old: Path) -> None:
    done = make("image-cpu", f"IMAGE_CPU={old}", "FORCE=1", "MEGATRON=megatron-core>=0.17")
    assert done.returncode != 0
    assert "give an exact version, such as megatron-core==0.19.2" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_build_leaves_the_old_image(old: Path, number: signal.Signals) -> None:
    build = subprocess.Popen(
        ["make", "image-cpu", f"IMAGE_CPU={old}", "FORCE=1"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert build.stdout is not None
    for line in build.stdout:
        if "Running post scriptlet" in line:
            break
    os.killpg(build.pid, number)  # as a terminal and a scheduler do
    build.stdout.read()
    assert build.wait(timeout=60) != 0
