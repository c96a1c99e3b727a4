"""The image, built by make on the CPU base and run by a real Apptainer; where that cannot be had, these tests fail."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, RunFileMaker, as_if_trained, cptain, of_session
from cptain.data.hf_tokenizer import load_tokenizer
from psutil import virtual_memory
from spython.main import get_client
from transformers import LlamaTokenizer

STAGES = ("preprocess", "convert", "train", "export")
NOBODY = 65534
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
USERS = ["root", "nobody"] if os.getuid() == 0 else ["the user of the tests"]
QUICK = ["--set", "train.steps=4", "--set", "train.warmup_steps=1", "--set", "train.save_interval=2"]


def place_to_unpack() -> dict[str, str]:
    """Without FUSE an image is unpacked at every start, 1.5 GB: that takes 3 s of the kernel in memory, and 4 to 24 s
    on a disk that others write to."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or os.statvfs(memory).f_flag & os.ST_NOEXEC:
        return {}
    has_room = min(shutil.disk_usage(memory).free, virtual_memory().available) > 8e9
    return {"APPTAINER_TMPDIR": str(memory)} if has_room else {}


@pytest.fixture(scope="module")
def client(apptainer: str, public: Path) -> Iterator[Any]:
    """spython's client."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{public / 'bin'}:{os.environ['PATH']}")
        client = get_client(quiet=True)
        yield client


@pytest.fixture(scope="module")
def inputs(apptainer: str, image: Path, public: Path) -> Path:
    """A folder with the demo's text, model and run file, made inside the image; and the image, for every user."""
    folder = public / "demo inputs"
    shutil.copytree(PROJECT / "runs", folder / "runs")
    shutil.copy(PROJECT / "README.ja.md", folder)
    command = [apptainer, "exec", "--bind", str(folder), str(image), "python3", "runs/demo.py", "--inputs-only"]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    (public / "an image").mkdir()
    shutil.copy(image, public / "an image" / "cptain.sif")
    return folder


class Place:
    """A folder of one user's with the inputs in it, and that user's way to run an app there."""

    def __init__(self, folder: Path, user: str, apptainer: str, image: Path) -> None:
        self.folder, self.home, self.apptainer, self.image = folder, folder / "home", apptainer, image
        self.user = AS_NOBODY if user == "nobody" else []
        self.home.mkdir()
        self.owns(folder)

    def owns(self, folder: Path) -> None:
        """Give the user a folder with all that is in it."""
        if self.user:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY)

    def command(self, app: str, *arguments: str) -> list[str]:
        bind = ["--bind", str(self.folder)]
        return [*self.user, self.apptainer, "--silent", "run", *bind, "--app", app, str(self.image), *arguments]

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}
        return {**inherited, **place_to_unpack(), "HOME": str(self.home), "OMP_NUM_THREADS": "1", **more}

    def run(self, app: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(app, *arguments),
            cwd=self.folder,
            env=self.environment(environment),
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture
def place(request: pytest.FixtureRequest, apptainer: str, inputs: Path, public: Path) -> Iterator[Place]:
    """A fresh place, of the user that the test's parameter names or of the one who runs the tests."""
    folder = Path(tempfile.mkdtemp(prefix="a run ", dir=public))
    shutil.copytree(inputs, folder, dirs_exist_ok=True)
    yield Place(folder, getattr(request, "param", USERS[0]), apptainer, public / "an image" / "cptain.sif")
    shutil.rmtree(folder)


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@pytest.mark.parametrize("place", USERS[-1:], indirect=True)  # the most common: no root, no FUSE
def test_the_four_stages_run_from_a_read_only_image(place: Place, model: Path, tmp_path: Path) -> None:
    """On a model that transformers 5 saved, in an image that has 4."""
    before = digest(place.image)
    shutil.rmtree(place.folder / "demo" / "model")
    place.owns(Path(shutil.copytree(model, place.folder / "demo" / "model")))
    assert json.loads((model / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    secrets = {"HF_TOKEN": "hf_very_secret", "WANDB_API_KEY": "wandb_very_secret"}
    for stage in STAGES:
        done = place.run(stage, "runs/tiny.toml", *QUICK, *(["--cpu"] if stage == "train" else []), **secrets)
        assert done.returncode == 0, done.stderr
    run = place.folder / "demo" / "runs" / "tiny"
    assert (run / "hf" / "iter_0000004" / "model.safetensors").stat().st_size > 1e5
    here = tmp_path / "data"
    output = cptain("preprocess", place.folder / "runs" / "tiny.toml", "--set", f'data.output="{here}"')
    assert output.exit_code == 0, output.output
    pairs = sorted(file.relative_to(here) for file in here.rglob("*.bin"))
    assert pairs
    assert all((here / pair).read_bytes() == (run / "data" / pair).read_bytes() for pair in pairs)
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["train"]["git_commit"]
    assert provenance["train"]["packages"]["megatron-core"]

    assert [path.name for path in place.home.iterdir() if path.name != ".apptainer"] == []
    for file in place.folder.rglob("*"):
        if file.is_file():
            assert b"very_secret" not in file.read_bytes(), file
    assert digest(place.image) == before


def test_an_export_computes_in_the_image_s_transformers_what_it_does_in_this_one(
    place: Place, make_ready_run: RunFileMaker
) -> None:
    file = make_ready_run()
    exported = as_if_trained(file)
    assert cptain("export", file).exit_code == 0
    folder = shutil.copytree(exported, place.folder / "exported")
    script = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    torch.save(model(torch.arange(1, 200)[None]).logits, sys.argv[2])
print(transformers.__version__)
"""
    inside = [place.apptainer, "exec", "--bind", str(place.folder), str(place.image), "python3"]
    versions, logits = [], []
    for python in (inside, [sys.executable]):
        saved = place.folder / "logits.pt"
        command = [*python, "-c", script, str(folder), str(saved)]
        done = subprocess.run(command, env=place.environment({}), capture_output=True, text=True, check=True)
        versions.append(done.stdout.strip())
        logits.append(torch.load(saved))
    assert versions[0] != versions[1]
    assert (logits[0] - logits[1]).abs().max() < 1e-5


def test_a_tokenizer_that_transformers_5_saved_gives_the_same_ids_in_an_image_with_4(place: Place) -> None:
    """4 would put a BOS before every text of this one, whose class it knows: its default, and not 5's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlo", "▁a", "he", "ll"]
    merges = [("▁", "a"), ("h", "e"), ("l", "l")]
    tokenizer = LlamaTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    folder = place.folder / "llama"
    tokenizer.save_pretrained(folder)
    place.owns(folder)
    text = "hello a 猫<|x|> b</s>"
    code = "import sys; from pathlib import Path; from cptain.data.hf_tokenizer import load_tokenizer as load; "
    code += "print(load(Path(sys.argv[1]))(sys.argv[2])['input_ids'])"
    inside = [place.apptainer, "exec", "--bind", str(place.folder), str(place.image), "python3", "-c", code]
    done = subprocess.run(
        [*inside, str(folder), text], env=place.environment({}), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == tokenizer(text)["input_ids"] == load_tokenizer(folder)(text)["input_ids"]


def test_training_that_gets_sigterm_saves_exits_75_and_resumes(place: Place) -> None:
    for stage in ("preprocess", "convert"):
        assert place.run(stage, "runs/tiny.toml").returncode == 0
    train = ("train", "runs/tiny.toml", "--cpu", "--set", "train.steps=30")
    process = subprocess.Popen(
        place.command(*train),
        cwd=place.folder,
        env=place.environment({}),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    logs = place.folder / "demo" / "runs" / "tiny" / "logs"
    deadline = time.monotonic() + 120
    while not any("iteration        5/" in log.read_text() for log in logs.glob("*.log")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # As schedulers do: the group, every process of the session, and both again; Apptainer passes each on once more.
    for pause in (0.021, 5.0):
        os.killpg(process.pid, signal.SIGTERM)
        for pid in of_session(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(pause)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "stopped by SIGTERM; saved at step " in said
    assert " again: " not in said
    again = place.run(*train)
    assert again.returncode == 0, again.stderr
    assert "train: from step" in again.stderr
    assert "step 30 of 30" in again.stderr


def test_exit_statuses_arrive_as_cptain_set_them(client: Any, image: Path, place: Place) -> None:
    def status(app: str, *arguments: str) -> int:
        return int(client.run(str(image), list(arguments), app=app, return_result=True)["return_code"])

    assert status("train", "--help") == 0
    assert status("train", "--no-such-option") == 2
    assert status("export", "no-such-run.toml") == 2
    failed = place.run("export", "runs/tiny.toml")  # nothing is trained yet
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1, failed.stderr


@pytest.mark.parametrize(
    "odd", ["two  words", "'single' \"double\"", "$HOME `id` *.toml", "café 日本", "a;b&c|d\\e", ""]
)
def test_odd_arguments_arrive_as_they_are(place: Place, odd: str) -> None:
    done = place.run("export", "runs/tiny.toml", "--iteration", odd)
    assert done.returncode == 2
    assert repr(odd) in done.stderr


def test_the_image_and_every_app_pass_their_tests(apptainer: str, image: Path) -> None:
    for app in ([], *(["--app", stage] for stage in STAGES)):
        done = subprocess.run([apptainer, "test", *app, image], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (app, done.stderr)


@pytest.mark.parametrize("stage", STAGES)
def test_run_help_of_an_app_says_how_to_run_it(apptainer: str, image: Path, stage: str) -> None:
    done = subprocess.run([apptainer, "run-help", "--app", stage, image], capture_output=True, text=True, check=True)
    assert f"--app {stage} IMAGE run.toml" in done.stdout


def test_the_image_without_an_app_lists_the_apps(client: Any, image: Path) -> None:
    listed = client.run(str(image), return_result=True)
    assert listed["return_code"] == 0
    assert all(f"--app {stage} IMAGE run.toml" in listed["message"] for stage in STAGES)
    assert client.run(str(image), ["run.toml"], return_result=True)["return_code"] == 2


def test_an_app_that_is_not_there_is_named_and_fails(place: Place) -> None:
    done = place.run("nosuch", "run.toml")
    assert done.returncode == 1
    assert "nosuch" in done.stdout + done.stderr


def test_the_other_commands_are_reached_through_exec(client: Any, image: Path) -> None:
    assert "verify" in client.execute(str(image), ["cptain", "--help"])


def test_the_labels_say_what_the_image_was_built_from(client: Any, image: Path) -> None:
    labels = client.inspect(str(image))["attributes"]["labels"]
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", labels["org.opencontainers.image.revision"])
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    assert labels["org.opencontainers.image.created"].startswith("20")
    assert labels["org.opencontainers.image.base.name"] == ".apptainer/base"
    assert labels["cptain.megatron.origin"] == "PyPI"
    assert labels["cptain.megatron.version"] == "0.19.2"
    assert labels["cptain.torch"].startswith("2.13.0")
    packages = client.execute(str(image), ["sha256sum", "/opt/cptain/packages.txt"])
    assert packages.split()[0] == labels["cptain.packages.sha256"]


def test_what_pip_installed_is_what_the_constraints_say(client: Any, image: Path) -> None:
    packages = client.execute(str(image), ["cat", "/opt/cptain/packages.txt"]).lower().replace("_", "-").splitlines()
    pinned = (PROJECT / "apptainer" / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    installed = {line.split("+")[0] for line in packages}
    own = {"cptain==0.1.0", "megatron-core==0.19.2"}
    assert own <= installed
    unpinned = {line for line in installed - own if line not in pinned}
    assert {line.partition("==")[0] for line in unpinned} <= {"pip", "wheel"}  # Debian's


def inside(client: Any, image: Path, program: str, options: list[str] | None = None) -> str:
    """What a Python program prints inside the image."""
    return str(client.execute(str(image), ["python3", "-c", program], options=options or [])).strip()


def test_all_that_a_rank_imports_has_its_bytecode_in_the_image(client: Any, image: Path) -> None:
    """Nobody can write it later: each rank would compile 3,000 files at each start."""
    program = """
import os, sys, warnings
warnings.simplefilter("ignore")
sys.argv[1:] = ["--cpu"]
from cptain.training import pretrain
pretrain.import_megatron(True)
import megatron.training
files = {getattr(module, "__cached__", None) for module in sys.modules.values()}
files = {file for file in files if isinstance(file, str)}
print(len(files), *(file for file in files if not os.path.exists(file)))
"""
    found = inside(client, image, program).splitlines()[-1]
    assert int(found) > 1500


def test_the_hosts_python_does_not_leak_in(client: Any, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/host/packages")
    monkeypatch.setenv("PYTHONNOUSERSITE", "")
    assert inside(client, image, "import sys, site; print(site.ENABLE_USER_SITE, '/host/packages' in sys.path)") == (
        "False False"
    )


def test_caches_leave_home_unless_the_user_says_where(
    client: Any, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import json, os, pathlib; from cptain import image; image.keep_caches_out_of_home(pathlib.Path('/run'));"
        "print(json.dumps({name: os.environ[name] for name in "
        "('HF_HOME', 'WANDB_DIR', 'TORCHINDUCTOR_CACHE_DIR', 'TRITON_CACHE_DIR')}))"
    )
    monkeypatch.delenv("HF_HOME", raising=False)
    default = json.loads(inside(client, image, program))
    assert default["HF_HOME"] == "/run/cache/huggingface"
    assert default["WANDB_DIR"] == "/run"
    assert not any(folder.startswith(os.environ["HOME"] + "/") for folder in default.values())
    monkeypatch.setenv("HF_HOME", "/plain")
    assert json.loads(inside(client, image, program))["HF_HOME"] == "/plain"
    monkeypatch.setenv("APPTAINERENV_HF_HOME", "/prefixed")
    assert json.loads(inside(client, image, program))["HF_HOME"] == "/prefixed"
    assert json.loads(inside(client, image, program, ["--env", "HF_HOME=/option"]))["HF_HOME"] == "/option"


def test_an_image_of_another_commit_than_the_jobs_expect_is_warned_of(place: Place) -> None:
    done = place.run("preprocess", "runs/tiny.toml", CPTAIN_EXPECT_COMMIT="0123456789")
    assert done.returncode == 0
    (warning,) = (line for line in done.stderr.splitlines() if "warning" in line)
    built_from = json.loads((place.folder / "demo/runs/tiny/provenance.json").read_text())["preprocess"]["git_commit"]
    assert "0123456789" in warning
    assert built_from in warning
    expected = place.run("preprocess", "runs/tiny.toml", CPTAIN_EXPECT_COMMIT=built_from)
    assert "warning" not in expected.stderr


# SingularityCE, which Debian 12 and PyPI have not. What is its own: it reads no APPTAINER_ variable, and has other
# options.


def test_a_job_runs_with_a_program_that_reads_no_variable_of_apptainer_s(place: Place) -> None:
    program = place.folder / "singularity"
    program.write_text(
        '#!/bin/bash\nunset "${!APPTAINER_@}" "${!APPTAINERENV_@}"\n'
        f'exec {place.apptainer} "$1" --no-mount tmp,cwd,home "${{@:2}}"\n'  # so that only --bind shows it the run
    )
    program.chmod(0o755)
    site = place.folder / "here.toml"
    content = f'scheduler = "local"\ngpus = 0\napptainer = "{program}"\nbinds = ["{place.folder.parent}"]\n'
    content += f'scratch = "{place.folder}"\n'
    site.write_text(content)
    run = place.folder / "runs" / "tiny.toml"
    rendered = cptain("jobs", run, "--site", site, "--set", f'jobs.image="{place.image}"')
    assert rendered.exit_code == 0, rendered.output
    script = Path(rendered.stdout.strip()).with_name("convert.sh")
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=place.environment({}))
    assert done.returncode == 0, done.stderr
    assert (place.folder / "demo" / "runs" / "tiny" / "megatron" / "release").is_dir()
