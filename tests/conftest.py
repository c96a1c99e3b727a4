"""A tiny model, a little text and runs made of them, below a folder with a space in its name."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import zstandard
from click.testing import CliRunner, Result
from stand_ins import KEEPS_ENVIRONMENT, TWO_NODES, Submission, write_site

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "runs"))
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the tests share the cores
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would compile cptain, 0.15 s each

TINY = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

RunFileMaker = Callable[..., Path]
pytest_plugins = ("image_fixtures",)

# Begun first, that none is left to one worker at the end; while the first builds the image, the other needs none.
_LONGEST = ("cluster", "demo", "interrupted", "experts", "image", "train", "health", "masked_documents", "checkpoint")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, in that order; the others are as they were."""
    place = {f"test_{name}.py": number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skipped test is a failure: nothing that should run may be left out without a word."""
    if hasattr(session.config, "workeroutput"):  # one of pytest-xdist's processes; the one that prints takes it up
        session.config.workeroutput["counts"] = dict(_COUNTS)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter and reporter.stats.get("skipped"):
        reporter.write_line("CI: a test was skipped, which counts as a failure", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


_COUNTS: Counter[str] = Counter()


def count(what: str, number: int = 1) -> None:
    """Count what a suite tried; the last lines of the session say how many."""
    _COUNTS[what] += number


def pytest_testnodedown(node: Any, error: object) -> None:
    """What the tests of another process counted."""
    _COUNTS.update(getattr(node, "workeroutput", {}).get("counts", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The counts, in every log."""
    for what, number in _COUNTS.items():
        terminalreporter.write_line(f"{what}: {number}")


def cptain(*arguments: object) -> Result:
    """Run a command in this process; `output` holds stdout and stderr."""
    from cptain.cli import main

    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one line that a wrong use is answered with."""
    result = cptain("jobs", *arguments)
    assert result.exit_code == 2, result.output
    return result.output.splitlines()[-1]


def cptain_process(*arguments: object, **options: Any) -> "subprocess.Popen[str]":
    """Start a command as a user does, in a process of its own."""
    command = [sys.executable, "-m", "cptain", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def in_megatron(script: str) -> Any:
    """Run Python beside Megatron, on the CPU, in a process of its own; gives what it leaves in `found`."""
    begin = "from cptain.megatron.importing import before_import, import_megatron\nbefore_import(cpu=True)\n"
    begin += "import_megatron(cpu=True)\n"
    end = "\nimport json\nfrom cptain.processes import end\nprint(json.dumps(found))\nend(0)"
    done = subprocess.run([sys.executable, "-c", begin + script + end], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make in the project; its stderr is in stdout."""
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=PROJECT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


def of_session(leader: int) -> list[int]:
    """The living processes of a session."""
    from cptain.processes import read_of_all, stat_fields

    found = []
    for pid, stat in read_of_all("stat"):
        state, _, _, session = stat_fields(stat.decode(errors="replace"))[:4]
        if int(session) == leader and state != "Z":
            found.append(pid)
    return found


def rows_of(tensor: Any) -> Callable[[int, int, Any], None]:
    """Where a writer of checkpoints gets the rows of a tensor."""
    import torch

    return lambda first, stop, buffer: buffer.copy_(tensor[first:stop].contiguous().view(-1).view(torch.uint8))


def leftovers(folder: Path) -> list[Path]:
    """What is half-written, or was left so, below `folder`."""
    return [path for path in folder.rglob("*") if ".partial" in path.name]


def wait_until_half_written(folder: Path) -> None:
    """Wait until a file below `folder` is being written and has bytes in it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):  # one may take its final name between the two looks
            if any(path.stat().st_size for path in leftovers(folder)):
                return
        time.sleep(0.02)
    raise AssertionError(f"nothing half-written appeared in {folder}")


def write_jsonl(file: Path, texts: list[str]) -> None:
    """Write documents, compressed as the file's name says."""
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    if file.name.endswith(".gz"):
        content = gzip.compress(content)
    elif file.name.endswith(".zst"):
        content = zstandard.ZstdCompressor().compress(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents in English, Japanese and neither."""
    from demo import python_help

    japanese = [f"第{number}章。吾輩は猫である。名前はまだ無い。😀\n" * (number % 5 + 1) for number in range(40)]
    return [*[text[:2000] for text in python_help()], *japanese, " leading and trailing space ", "\n\n\t", "Ω≈ç√∫"]


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a space in its name."""
    return tmp_path_factory.mktemp("one run")


@pytest.fixture(scope="session")
def model(session_folder: Path, texts: list[str]) -> Path:
    """A Llama 3.1 of two layers whose vocabulary (500) Megatron pads, to 512 with one or two processes."""
    from demo import make_model

    folder = session_folder / "model"
    make_model(folder, texts, **TINY)
    return folder


@pytest.fixture(scope="session")
def text_folder(session_folder: Path, texts: list[str]) -> Path:
    """Three files of three kinds, two of the same name in two folders, at two depths."""
    folder = session_folder / "text"
    write_jsonl(folder / "a.jsonl", texts[:40])
    write_jsonl(folder / "sub" / "a.jsonl.gz", texts[40:80])
    write_jsonl(folder / "sub" / "deeper" / "b.jsonl.zst", texts[80:])
    return folder


@pytest.fixture(scope="session")
def run_content(model: Path, text_folder: Path) -> dict[str, Any]:
    """What the tests' run files hold, but for work_dir."""
    return {
        "name": "run",
        "model": {"hf": str(model)},
        # There is little text, and some tests train on it until they stop it.
        "data": {"input": [f"{text_folder}/**/*.jsonl*"], "split": "90,10,0", "max_epochs": 1e6},
        "train": {
            "seq_length": 64,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "steps": 8,
            "lr": 1e-3,
            "min_lr": 1e-4,
            "warmup_steps": 1,
            "precision": "fp32",
            "save_interval": 4,
            "eval_interval": 4,
        },
    }


def write_run_file(folder: Path, content: dict[str, Any], changes: dict[str, Any]) -> Path:
    """Write folder/run.toml, with dotted keys of `changes` set (None: removed)."""
    content = json.loads(json.dumps({**content, "work_dir": str(folder / "runs")}))
    for dotted, value in changes.items():
        *path, key = dotted.split(".")
        section = content
        for step in path:
            section = section.setdefault(step, {})
        if value is None:
            section.pop(key, None)
        else:
            section[key] = value
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.toml"
    file.write_text(tomli_w.dumps(content), encoding="utf-8")
    return file


@pytest.fixture
def make_run(tmp_path: Path, run_content: dict[str, Any]) -> RunFileMaker:
    """Writes run files of this test; keyword arguments with __ for dots change keys."""

    def make(**changes: Any) -> Path:
        return write_run_file(tmp_path, run_content, {key.replace("__", "."): value for key, value in changes.items()})

    return make


@pytest.fixture
def make_jobs_run(make_run: RunFileMaker) -> RunFileMaker:
    """Writes run files with all that a site can ask for."""

    def make(**changes: Any) -> Path:
        jobs = {"site": "pbs", "group": "group1", "nodes": 2, "walltime": "10:00:00", "image": "/shared/cptain.sif"}
        more = {"train__global_batch_size": 64} | changes  # the sites have up to 8 GPUs
        return make_run(**{f"jobs__{key}": value for key, value in jobs.items()} | more)

    return make


@pytest.fixture
def make_submission(make_run: RunFileMaker, tmp_path: Path) -> Callable[..., Submission]:
    """Renders the jobs of a run of two nodes for a PBS site with these keys; __ for dots changes keys of the run."""

    def make(apptainer: str = KEEPS_ENVIRONMENT, site: dict[str, Any] | None = None, **changes: Any) -> Submission:
        image = tmp_path / "cptain.sif"
        image.touch()
        file = write_site(tmp_path / "here.toml", **{"launcher": "pbs_tmrsh", "train": TWO_NODES, **(site or {})})
        jobs = {"image": str(image), "nodes": 2, "walltime": "01:00:00", "shards": 2, "chain": 1}
        run = make_run(**{f"jobs__{key}": value for key, value in jobs.items()} | changes)
        result = cptain("jobs", run, "--site", file)
        assert result.exit_code == 0, result.output
        return Submission(Path(result.stdout.strip()), tmp_path, apptainer)

    return make


@pytest.fixture(scope="session")
def ready_run(session_folder: Path, run_content: dict[str, Any]) -> Path:
    """A run file whose data and converted checkpoint are there, and nothing is trained."""
    file = write_run_file(session_folder / "ready", run_content, {})
    for stage in ("preprocess", "convert"):
        result = cptain(stage, file)
        assert result.exit_code == 0, result.output
    return file


@pytest.fixture
def make_ready_run(ready_run: Path, make_run: RunFileMaker) -> RunFileMaker:
    """Like `make_run`, sharing the data and the converted checkpoint of `ready_run`, as runs of a sweep do."""
    shared = ready_run.parent / "runs" / "run"

    def make(**changes: Any) -> Path:
        return make_run(data__output=str(shared / "data"), model__megatron=str(shared / "megatron"), **changes)

    return make


def say_iteration(file: Path, iteration: int) -> None:
    """Let a checkpoint's common.pt name this iteration, as if it had been saved so."""
    import torch
    from cptain.checkpoint.saved_files import write_record

    torch.save({**torch.load(file, weights_only=False), "iteration": iteration}, file)
    write_record(file.parent)


def as_if_trained(file: Path, *iterations: int) -> Path:
    """Put the converted checkpoint where training would have saved these iterations, by default 1; gives the folder of
    the last one's export."""
    from cptain.checkpoint.tracker import iteration_folder, write_tracker
    from cptain.run_file import load_run

    run = load_run(file)
    for iteration in iterations or (1,):
        folder = iteration_folder(run.checkpoints_folder, iteration)
        shutil.copytree(run.megatron_folder / "release", folder)
        say_iteration(folder / "common.pt", iteration)
        write_tracker(run.checkpoints_folder, iteration)
    return run.hf_folder / folder.name


@pytest.fixture
def text(tmp_path: Path, make_run: RunFileMaker, ready_run: Path) -> Any:
    """Writes bytes as an input file and gives a run file for it, whose tokenizer transformers has been asked about."""

    def write(content: bytes, name: str = "x.jsonl", **changes: Any) -> Path:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
        file = make_run(data__input=["in/**/*.jsonl*"], **changes)
        if "data__output" not in changes:
            from cptain.run_file import load_run

            shutil.copytree(load_run(ready_run).tokenizers_folder, load_run(file).tokenizers_folder, dirs_exist_ok=True)
        return file

    return write


@pytest.fixture
def make_model_run(model: Path, tmp_path: Path, make_run: RunFileMaker) -> Callable[..., Path]:
    """Copies the model, changes its config.json, and gives a run file for the copy."""

    def make(changes: dict[str, Any] | None = None, edit: Callable[[Path], None] = lambda folder: None) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(model, folder)
        config = json.loads((folder / "config.json").read_text())
        for key, value in (changes or {}).items():
            *path, last = key.split(".")
            section = config
            for step in path:
                section = section[step]
            section[last] = value
        (folder / "config.json").write_text(json.dumps(config))
        edit(folder)
        return make_run(model__hf=str(folder))

    return make


@pytest.fixture(scope="session")
def trained_run(session_folder: Path, run_content: dict[str, Any], ready_run: Path) -> Path:
    """A run file whose eight steps were trained by the real Megatron, in one go."""
    shared = ready_run.parent / "runs" / "run"
    changes = {"data.output": str(shared / "data"), "model.megatron": str(shared / "megatron")}
    file = write_run_file(session_folder / "trained", run_content, changes)
    result = cptain("train", file, "--cpu")
    assert result.exit_code == 0, result.output
    return file


@pytest.fixture
def own_trained_run(trained_run: Path, make_ready_run: RunFileMaker) -> Path:
    """A run file of a copy of `trained_run`, for a test that adds to it."""
    from cptain.run_file import load_run

    file = make_ready_run()
    shutil.copytree(load_run(trained_run).folder, load_run(file).folder)
    return file


@pytest.fixture(autouse=True)
def shared_runs_stay_as_they_are(request: pytest.FixtureRequest) -> Iterator[None]:
    """What one test adds to a run that all share, another finds or not, by the order in which they happen to run."""
    shared = [request.getfixturevalue(name) for name in ("ready_run", "trained_run") if name in request.fixturenames]

    def files() -> set[Path]:
        there = (path for file in shared for path in (file.parent / "runs" / "run").rglob("*"))
        return {path for path in there if ".in-use" not in path.parts}  # locks

    before = files()
    yield
    changed = before ^ files()
    assert not changed, f"{request.node.name} changed a shared run: {sorted(map(str, changed))[:5]}: copy it"
