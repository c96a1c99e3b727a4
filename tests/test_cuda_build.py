"""train --cpu and verify --logits where torch was built for CUDA and Transformer Engine is installed, as in an image.

A CUDA build of torch with Transformer Engine is 6 GB and minutes to install, too dear for every new machine. Both ends
were seen with the real ones (torch 2.11 and 2.14 with CUDA 13, Transformer Engine 2.12, no driver), and what failed
there fails here: Transformer Engine's kernels, at any tensor of the CPU, and torch's C++ when it is asked for the
accelerator's stream, with the words of both.
"""

from pathlib import Path

import pytest
from conftest import RunFileMaker, cptain
from cptain.run_file import load_run

KERNELS_FOR_GPUS = 'raise RuntimeError("CUDAGuardImpl initialized with non-CUDA DeviceType: cpu")\n'
CUDA_BUILD = """
import torch

def no_driver(*arguments):
    raise RuntimeError("CUDA error: CUDA driver version is insufficient for CUDA runtime version")

torch._C._accelerator_getAccelerator = lambda: torch.device("cuda")
torch._C._accelerator_getDeviceIndex = torch._C._accelerator_getStream = no_driver
"""


@pytest.fixture
def cuda_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every process that is started from now on."""
    folder = tmp_path / "site"
    for package in ("transformer_engine", "apex"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(KERNELS_FOR_GPUS)
    (folder / "sitecustomize.py").write_text(CUDA_BUILD)
    monkeypatch.syspath_prepend(folder)  # multiprocessing hands it on
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")


@pytest.mark.usefixtures("cuda_build")
def test_training_on_the_cpu_works_under_a_cuda_build(make_ready_run: RunFileMaker) -> None:
    result = cptain("train", make_ready_run(train__steps=2), "--cpu")
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("cuda_build")
def test_logits_are_compared_on_the_cpu_under_a_cuda_build(ready_run: Path, model: Path) -> None:
    result = cptain("verify", model, load_run(ready_run).megatron_folder, "--logits")
    assert result.exit_code == 0, result.output
