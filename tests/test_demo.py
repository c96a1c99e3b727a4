"""The demo, as `make demo` runs it: stopped by Ctrl-C in mid training, and then from beginning to end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import tomli_w
from conftest import PROJECT
from cptain.megatron.log import read_steps, train_logs


@contextmanager
def demo_of(project: Path) -> Iterator["subprocess.Popen[str]"]:
    """Start the demo of a project, its output in one, in a session of its own: a Ctrl-C is a signal to its group."""
    demo = subprocess.Popen(
        [sys.executable, project / "runs" / "demo.py"],
        env={**os.environ, "PYTHONPATH": str(PROJECT / "apps"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield demo
    finally:
        with suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGKILL)


def test_ctrl_c_lets_the_training_save_and_ends_the_demo_in_a_line_and_the_next_is_a_whole_one(
    tmp_path: Path, model: Path, text_folder: Path
) -> None:
    """With the tests' own small model and text in the place of the demo's."""
    (tmp_path / "runs").mkdir()
    shutil.copy(PROJECT / "runs" / "demo.py", tmp_path / "runs")
    run_file = tomllib.loads((PROJECT / "runs" / "tiny.toml").read_text(encoding="utf-8"))
    run_file["train"]["steps"] = 40
    (tmp_path / "runs" / "tiny.toml").write_text(tomli_w.dumps(run_file), encoding="utf-8")
    shutil.copytree(model, tmp_path / "demo" / "model")
    shutil.copytree(text_folder, tmp_path / "demo" / "text")
    run = tmp_path / "demo" / "runs" / "tiny"

    with demo_of(tmp_path) as demo:
        while not read_steps(train_logs(run / "logs")):
            assert demo.poll() is None, demo.communicate()[0]
            time.sleep(0.02)
        os.killpg(demo.pid, signal.SIGINT)
        output, _ = demo.communicate(timeout=600)
    assert demo.returncode == 1
    assert "Traceback" not in output
    assert "train: SIGINT: saving after this step" in output
    assert output.splitlines()[-1] == "demo: stopped by SIGINT; the next one begins anew"
    saved = int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 0 < saved < 40

    with demo_of(tmp_path) as demo:
        output, _ = demo.communicate(timeout=600)
    assert demo.returncode == 0, output
    assert re.search(r"\(40 steps, one stop\)$", output, flags=re.MULTILINE), output
