"""The demo, as `make demo` runs it: stopped by Ctrl-C in mid training, and then from beginning to end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import PROJECT
from cptain.megatron.log import read_steps, train_logs


def start_demo(project: Path) -> "subprocess.Popen[str]":
    """Start the demo of a project, its output in one, in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, project / "runs" / "demo.py"],
        env={**os.environ, "PYTHONPATH": str(PROJECT / "apps")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_lets_the_training_save_and_ends_the_demo_in_a_line_and_the_next_is_a_whole_one(
    tmp_path: Path, model: Path, text_folder: Path
) -> None:
    """With the tests' own small model and text in the place of the demo's."""
    (tmp_path / "runs").mkdir()
    shutil.copy(PROJECT / "runs" / "demo.py", tmp_path / "runs")
    run_file = (PROJECT / "runs" / "tiny.toml").read_text(encoding="utf-8")
    (tmp_path / "runs" / "tiny.toml").write_text(run_file.replace("= 60\n", "= 30\n"), encoding="utf-8")
    shutil.copytree(model, tmp_path / "demo" / "model")
    shutil.copytree(text_folder, tmp_path / "demo" / "text")
    run = tmp_path / "demo" / "runs" / "tiny"

    demo = start_demo(tmp_path)
    while not read_steps(train_logs(run / "logs")):
        assert demo.poll() is None, demo.communicate()[0]
        time.sleep(0.02)
    os.killpg(demo.pid, signal.SIGINT)
    output, _ = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert "Traceback" not in output
    assert output.splitlines()[-1] == "demo: stopped; the next one begins anew"
    saved = int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 0 < saved < 30
    assert "train: SIGINT: saving after this step" in output

    whole, _ = (demo := start_demo(tmp_path)).communicate(timeout=300)
    assert demo.returncode == 0, whole
    assert re.search(r"\(30 steps, one stop\)$", whole, flags=re.MULTILINE), whole
