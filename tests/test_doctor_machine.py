"""cptain doctor: every fault of a machine that is planted is found, named and answered."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import RunFileMaker
from cptain.doctor import gpus, machine
from cptain.doctor.checks import Subject, ok
from cptain.doctor.gpus import judged_nccl, judged_products, product
from cptain.run_file import load_run
from stand_ins import programs


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an nvidia-smi on PATH that answers with these rows, by the first column that is asked for after index."""

    def put(version: str = "13.0", **rows: list[str]) -> None:
        cases = "".join(
            f"*index,{column}*) printf '%s\\n' {' '.join(map(repr, row))} ;;\n" for column, row in rows.items()
        )
        script = (
            f"#!/bin/bash\ncase \"$*\" in\n{cases.replace('__', '.')}'') echo '| CUDA Version: {version} |' ;;\nesac\n"
        )
        monkeypatch.setenv("PATH", programs(tmp_path / "bin", **{"nvidia-smi": script})["PATH"])

    return put


def test_gpus_are_counted_compared_and_held_against_the_job(
    smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = ["0, H100, 81559, 0", "1, H100, 81559, 0"]
    smi(name=name, memory__used=["0, 3", "1, 20480"])
    assert gpus.gpus(Subject()) == ok("2 × H100")
    assert "GPU 1 20 GiB" in gpus.memory(Subject()).means
    monkeypatch.setenv("CPTAIN_GPUS", "4")
    assert gpus.gpus(Subject()).means == "2 GPUs, and the job has 4 of this node"
    monkeypatch.delenv("CPTAIN_GPUS")
    smi(name=[name[0], "1, H100, 81559, 3"])
    assert gpus.gpus(Subject()).means == "GPU 1: memory errors that were not corrected"
    smi(name=[name[0], "1, A100, 40960, 0"])
    assert gpus.gpus(Subject()).state == "warn"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpus.gpus(Subject()) == ok("1 × A100")
    smi(uuid=["0, GPU-a", "1, GPU-b"])
    found = gpus.arithmetic(Subject())  # torch here has no GPU: as where the driver's libraries are not seen
    assert found.state == "fail"
    assert found.means.startswith("GPU 1: ")


@pytest.mark.parametrize(("has", "state"), [("13.0", "ok"), ("12.4", "ok"), ("11.8", "fail")])
def test_a_driver_older_than_torch_s_cuda_is_a_fail(
    has: str, state: str, smi: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(version=has)
    (tmp_path / "version.py").write_text("cuda = '12.8'")

    class Spec(NamedTuple):
        origin: str = str(tmp_path / "__init__.py")

    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: Spec())
    monkeypatch.setattr(gpus, "_COMPAT", tmp_path / "none")
    assert gpus.driver(Subject()).state == state


def test_products_are_exact_and_wrong_silent_or_slow_gpus_are_named() -> None:
    seconds, wrong = product("cpu", 256)
    assert seconds > 0
    assert wrong == ""
    assert judged_products({"0": "0.1|\n", "1": "0.1|\n"}).state == "ok"
    slow = judged_products({"0": "0.1|", "1": "0.13|", "2": "0.1|"})
    assert (slow.state, "GPU 1 takes 1.30 times" in slow.means) == ("warn", True)
    bad = judged_products({"0": "0.1|3 of 9 elements of a product are wrong", "1": "nan|no answer in 20 s"})
    assert bad.state == "fail"
    assert "GPU 0: 3 of 9" in bad.means
    assert "GPU 1: no answer" in bad.means


@pytest.mark.parametrize(
    ("version", "state"),
    [((2, 28, 2), "ok"), ((2, 28, 3), "warn"), ((2, 28, 8), "warn"), ((2, 28, 9), "ok"), ((2, 27, 5), "ok")],
)
def test_nccl_that_hangs_is_warned_of(version: tuple[int, ...], state: str) -> None:
    assert judged_nccl(version).state == state


def test_full_disks_and_quotas_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert machine.space(Subject()).state == "warn"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage._replace(free=1 << 50))
    assert machine.space(Subject()).state == "ok"
    lfs = "#!/bin/bash\necho '     /home 26214000* 26214400 26214400 - 9 0 0 -'"
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", lfs=lfs)["PATH"])
    quota = machine.space(Subject())
    assert quota.state == "warn"
    assert "of a quota of" in quota.means
    full = OSError(122, "Disk quota exceeded")

    def refuse(file: int) -> None:
        raise full

    monkeypatch.setattr(machine.os, "fsync", refuse)
    assert "Disk quota exceeded" in machine.space(Subject()).means
    assert machine.space(Subject()).state == "fail"


def test_a_work_dir_that_nodes_do_not_share_or_the_user_may_not_write_is_named(
    make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(make_run(jobs__nodes=2))
    for kind, state in (("lustre", "ok"), ("ext4", "warn"), ("fuse.beegfs", "ok"), ("tmpfs", "warn")):
        monkeypatch.setattr(machine, "_file_system", lambda folder, kind=kind: kind)
        assert machine.work_dir(Subject(run)).state == state
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert machine.work_dir(Subject(run)).state == "fail"


def test_binds_clock_locale_and_keys_are_looked_at(make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(make_run(model__megatron="/nowhere/else/megatron", wandb__project="p"))
    assert machine.binds(Subject(run)).remedy.startswith("apptainer exec --bind /nowhere ")
    assert machine.clock(Subject()).state == "ok"
    monkeypatch.setattr(machine.time, "time", lambda: 0.0)
    assert machine.clock(Subject()).state == "warn"
    assert machine.utf_8(Subject()).state == "ok"
    monkeypatch.setattr(machine.locale, "getpreferredencoding", lambda setting: "EUC-JP")
    assert machine.utf_8(Subject()).means.startswith("the locale's encoding is EUC-JP")
    monkeypatch.setattr(machine, "check_wandb_is_installed", lambda run: None)
    monkeypatch.setattr(machine, "has_wandb_key", lambda: False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert machine.keys(Subject(run)).state == "fail"
    assert machine.keys(Subject(run, in_job=True)).state == "ok"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert machine.keys(Subject(run)).state == "ok"


def test_ports_namespaces_and_fuse_are_looked_at(
    tmp_path: Path, make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_INFINIBAND", tmp_path / "ib")
    assert machine.infiniband(Subject()).state == "ok"
    two = Subject(load_run(make_run(jobs__nodes=2)), in_job=True)
    assert machine.infiniband(two).state == "warn"
    for card, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        (tmp_path / "ib" / card / "ports" / "1").mkdir(parents=True)
        (tmp_path / "ib" / card / "ports" / "1" / "state").write_text(f"{state}\n")
    assert machine.infiniband(two).means == "1 ports are up; mlx5_1:1 is DOWN"
    (tmp_path / "ib" / "mlx5_0" / "ports" / "1" / "state").write_text("2: INIT\n")
    assert machine.infiniband(two).state == "fail"
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    (tmp_path / "sys" / "user").mkdir(parents=True)
    for number, state in (("0", "warn"), ("1000", "ok")):
        (tmp_path / "sys" / "user" / "max_user_namespaces").write_text(number)
        assert machine.user_namespaces(Subject()).state == state
    monkeypatch.setattr(machine, "was_unpacked", lambda: True)
    assert "make sandbox" in machine.fuse(Subject()).remedy
