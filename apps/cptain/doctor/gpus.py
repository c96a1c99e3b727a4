"""What a machine's GPUs have to be: there, free, of one speed, right in their sums, and known to the image's torch."""

import importlib.util
import os
import re
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path

from cptain.doctor.checks import Found, Subject, fail, ok, warn
from cptain.doctor.machine import said_by

_COMPAT = Path("/usr/local/cuda/compat")  # of NVIDIA's images: newer CUDA on an older driver
_OTHERS = 1 << 10  # MiB of a GPU that are in use: a context alone takes some 500
_PRODUCT_SECONDS = 20.0  # torch's import from a cold disk, and a second of sums
_SLOW = 1.15  # times the median: H100s of one kind differ by a few %
_LEAVE_OUT = "leave this node out, and tell the site's support"


def _listed(columns: str) -> list[list[str]]:
    """What nvidia-smi says of each GPU that this process may use, its index first; none where it does not answer."""
    said = said_by("nvidia-smi", f"--query-gpu=index,{columns}", "--format=csv,noheader,nounits") or ""
    rows = [re.split(r",\s*", line.strip()) for line in said.splitlines() if line.strip()]
    given = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.isdigit()]
    return [row for row in rows if row[0] in given] if given else rows


def _expected() -> int | None:
    """How many GPUs of this node the job asked for."""
    asked = os.environ.get("CPTAIN_GPUS", "")
    return int(asked) if asked.isdigit() else None


def gpus(subject: Subject) -> Found:
    """How many there are, and whether they are alike."""
    rows, expected = _listed("name,memory.total,ecc.errors.uncorrected.volatile.total"), _expected()
    if not rows:
        if not expected:
            return ok("none, as on a login node; train needs them, or --cpu")
        return fail(
            f"nvidia-smi names none, and the job has {expected}", f"apptainer exec --nv …; nvidia-smi; {_LEAVE_OUT}"
        )
    if expected and expected != len(rows):
        return fail(f"{len(rows)} GPUs, and the job has {expected} of this node", f"nvidia-smi -L; {_LEAVE_OUT}")
    if broken := [row[0] for row in rows if row[3].isdigit() and int(row[3])]:
        return fail(
            f"GPU {', '.join(broken)}: memory errors that were not corrected", f"nvidia-smi -q -d ECC; {_LEAVE_OUT}"
        )
    if len({tuple(row[1:3]) for row in rows}) > 1:
        return warn(f"of several kinds: {', '.join(sorted({row[1] for row in rows}))}", "CUDA_VISIBLE_DEVICES=…")
    return ok(f"{len(rows)} × {rows[0][1]}")


def driver(subject: Subject) -> Found:
    """The driver's CUDA against that which torch was built for: within a major version any driver serves."""
    said = said_by("nvidia-smi")
    has = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", said or "")
    spec = importlib.util.find_spec("torch")
    needs = str(runpy.run_path(str(Path(str(spec.origin)).with_name("version.py")))["cuda"]) if spec else "None"
    if not has or needs == "None":
        return ok("no driver here" if not has else "torch is one for the CPU")
    shown = f"torch is built for CUDA {needs}, and the driver has {has[1]}.{has[2]}"
    if int(needs.partition(".")[0]) <= int(has[1]):
        return ok(shown)
    remedy = "an image of an earlier base (make image BASE=…), or nodes with a newer driver"
    if _COMPAT.is_dir():
        return warn(f"{shown}: it runs by the image's compat libraries, or not", remedy)
    return fail(shown, remedy)


def memory(subject: Subject) -> Found:
    """What others use of the GPUs."""
    used = [row for row in _listed("memory.used") if row[1].isdigit() and int(row[1]) > _OTHERS]
    if used:
        shown = ", ".join(f"GPU {index} {int(mib) / 1024:.0f} GiB" for index, mib in used)
        return warn(f"in use before anything of yours: {shown}", "nvidia-smi; a job that was not ended holds it")
    return ok("free")


def nccl(subject: Subject) -> Found:
    """The version that torch brings."""
    import torch

    if torch.version.cuda is None:
        return ok("torch is one for the CPU")
    return judged_nccl(tuple(torch.cuda.nccl.version()[:3]))


def judged_nccl(version: tuple[int, ...]) -> Found:
    """2.28.3 to 2.28.8 were seen to hang (nvidia-resiliency-ext's release notes)."""
    shown = ".".join(map(str, version))
    if (2, 28, 3) <= version <= (2, 28, 8):
        return warn(f"NCCL {shown}: trainings were seen to hang with 2.28.3 to 2.28.8", "an image of another base")
    return ok(f"NCCL {shown}")


def product(device: str = "cuda", size: int = 8192) -> tuple[float, str]:
    """A product of matrices whose result is known to the bit.

    Row i of A is all a_i, column j of B all b_j, small whole numbers: every element is size × a_i × b_j, with no
    rounding anywhere in fp32. A wrong one is a broken GPU.

    Returns:
        Seconds of one product, the fastest of several, and what is wrong with the result.
    """
    import torch

    rows = (torch.arange(size, device=device) % 7 + 1).to(torch.bfloat16)
    columns = (torch.arange(size, device=device) % 5 + 1).to(torch.bfloat16)
    a, b = rows[:, None].expand(size, size).contiguous(), columns[None, :].expand(size, size).contiguous()
    seconds = []
    for _ in range(20):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    expected = (size * rows.float()[:, None] * columns.float()[None, :]).to(torch.bfloat16)
    wrong = int((result != expected).sum())
    return min(seconds), f"{wrong:,} of {size * size:,} elements of a product are wrong" if wrong else ""


_PROGRAM = "from cptain.doctor.gpus import product; seconds, wrong = product(); print(seconds, wrong, sep='|')"


def arithmetic(subject: Subject) -> Found:
    """A product on each GPU at once, each in a process of its own."""
    indices = [row[0] for row in _listed("uuid")]
    if not indices:
        return ok("no GPU here")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": index, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in indices
    ]
    until, said = time.monotonic() + _PRODUCT_SECONDS, {}
    for index, process in zip(indices, started, strict=True):
        try:
            output, errors = process.communicate(timeout=max(0.1, until - time.monotonic()))
            said[index] = output if process.returncode == 0 else f"nan|{(errors.strip() or 'it died').splitlines()[-1]}"
        except subprocess.TimeoutExpired:
            process.kill()
            said[index] = f"nan|no answer in {_PRODUCT_SECONDS:g} s"
    return judged_products(said)


def judged_products(said: dict[str, str]) -> Found:
    """What the products say: wrong sums, no answer, or a GPU slower than its siblings."""
    results = {index: one.strip().partition("|") for index, one in said.items()}
    if wrong := [f"GPU {index}: {result[2]}" for index, result in results.items() if result[2]]:
        return fail("; ".join(wrong), f"nvidia-smi -q; dmesg | grep Xid; {_LEAVE_OUT}")
    seconds = {index: float(result[0]) for index, result in results.items()}
    typical = statistics.median_low(seconds.values())
    slow = [
        f"GPU {index} takes {one / typical:.2f} times as long"
        for index, one in seconds.items()
        if one > _SLOW * typical
    ]
    if slow:
        return warn(
            f"{'; '.join(slow)} as its siblings: all wait for it", f"nvidia-smi -q -d PERFORMANCE; {_LEAVE_OUT}"
        )
    return ok(f"right on {len(seconds)} GPUs; {2 * 8192**3 / typical / 1e12:.0f} TFLOP/s each")
