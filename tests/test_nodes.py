"""What a job finds out about its nodes, and what it refuses of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import RunFileMaker, cptain
from cptain.errors import CptainError
from cptain.training.nodes import Nodes, check_as_asked, check_slots, expand_nodelist, own_address, read_nodes


def own_name() -> str:
    return socket.gethostname()


def pe_hostfile(tmp_path: Path, lines: list[str]) -> dict[str, str]:
    file = tmp_path / "pe_hostfile"
    file.write_text("".join(f"{line}\n" for line in lines))
    return {"PE_HOSTFILE": str(file), "JOB_ID": "4711"}


def pbs_nodefile(tmp_path: Path, hosts: list[str]) -> dict[str, str]:
    file = tmp_path / "nodefile"
    file.write_text("".join(f"{host}\n" for host in hosts))
    return {"PBS_NODEFILE": str(file), "PBS_JOBID": "12.pbs0"}


def test_outside_a_job_and_on_one_node_there_is_nothing_to_join(tmp_path: Path) -> None:
    assert read_nodes({}) is None
    assert read_nodes(pbs_nodefile(tmp_path, ["only"] * 8)) is None
    assert read_nodes({"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "1"}) is None
    assert read_nodes({"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": "1"}) is None


def test_a_list_of_hosts_that_the_image_cannot_see_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_nodes({"PBS_NODEFILE": "/nowhere/1.pbs0"}) is None
    assert (
        "train: PBS_NODEFILE=/nowhere/1.pbs0: No such file or directory: training on this node"
        in capsys.readouterr().err
    )


def test_hosts_come_once_in_the_scheduler_s_order(tmp_path: Path) -> None:
    hosts = ["b"] * 8 + ["a"] * 8 + [own_name()] * 8 + ["b"]
    nodes = read_nodes(pbs_nodefile(tmp_path, hosts))
    assert nodes is not None
    assert (nodes.job, nodes.hosts, nodes.rank) == ("12.pbs0", ["b", "a", own_name()], 2)
    assert nodes.endpoint == "b:10012"


def test_sixty_four_nodes_agree_on_one_rendezvous() -> None:
    environment = {"SLURM_JOB_NODELIST": "gpu[001-060,101-104]", "SLURM_JOB_ID": "123456"}
    every = [read_nodes({**environment, "SLURM_NODEID": str(rank)}) for rank in range(64)]
    assert [nodes.rank for nodes in every if nodes] == list(range(64))
    assert {nodes.endpoint for nodes in every if nodes} == {"gpu001:13456"}
    assert every[63] is not None
    assert every[63].hosts[59:61] == ["gpu060", "gpu101"]
    command = every[63].torchrun("10.0.0.64")
    assert command[:2] == ["--nnodes", "64"]
    assert "is_host=0,join_timeout=600,read_timeout=600" in command
    assert every[0] is not None
    assert "is_host=1,join_timeout=600,read_timeout=600" in every[0].torchrun("10.0.0.1")


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[09-11,07],gpu-a", ["n09", "n10", "n11", "n07", "gpu-a"]),
        ("rack1-n[1-2]-ib,x", ["rack1-n1-ib", "rack1-n2-ib", "x"]),
    ],
)
def test_slurm_s_short_lists_are_read(nodelist: str, hosts: list[str]) -> None:
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["n[1-", "n[a-b]", "", "n[]"])
def test_a_list_that_is_none_is_refused(nodelist: str) -> None:
    with pytest.raises(CptainError, match="cannot be read"):
        expand_nodelist(nodelist)


def own_real_address() -> str:
    return next(
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    )


def test_a_node_finds_itself_by_name_short_name_or_address_and_the_script_s_word_wins(tmp_path: Path) -> None:
    for mine in (own_name(), f"{own_name()}.cluster.example", own_name().upper(), own_real_address()):
        nodes = read_nodes(pbs_nodefile(tmp_path, ["elsewhere.invalid", mine]))
        assert nodes is not None
        assert nodes.rank == 1, mine
    said = read_nodes({**pbs_nodefile(tmp_path, ["x.invalid", "y.invalid"]), "CPTAIN_NODE": "1"})
    assert said is not None
    assert said.rank == 1
    with pytest.raises(CptainError, match=r"this node \(.*\) is none of the job's: x.invalid y.invalid"):
        read_nodes(pbs_nodefile(tmp_path, ["x.invalid", "y.invalid"]))


def test_ipv6_addresses_are_put_in_brackets() -> None:
    assert Nodes("7", ["fd00::1", "fd00::2"]).endpoint == "[fd00::1]:10007"


def test_torchrun_really_meets_over_ipv6(tmp_path: Path) -> None:
    """Two nodes on one machine: the endpoint, and all that is said of it, is what torchrun takes."""
    with socket.socket(socket.AF_INET6) as probe:
        job = next(job for job in range(5000, 9000) if probe.connect_ex(("::1", 10000 + job)))
    nodes = [Nodes(str(job), ["::1", "::1"], [], rank) for rank in (0, 1)]
    script = tmp_path / "hello.py"
    script.write_text(
        "import torch.distributed as d\nd.init_process_group('gloo')\nx = [None, None]\n"
        "d.all_gather_object(x, d.get_rank())\nprint('met', x)\nd.barrier()\nd.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run"]
    processes = [
        subprocess.Popen(
            [*command, *node.torchrun("::1"), "--nproc-per-node", "1", str(script)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for node in nodes
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            assert "met [0, 1]" in output
    finally:
        for process in processes:
            process.kill()


def test_slots_say_how_many_gpus_a_host_gives(tmp_path: Path) -> None:
    lines = ["a 192 all.q@a UNDEFINED", f"{own_name()} 96 all.q@b UNDEFINED"]
    nodes = read_nodes(pe_hostfile(tmp_path, lines))
    assert nodes is not None
    assert nodes.slots == [192, 96]
    with pytest.raises(CptainError, match="has 96 slots, and 4 GPUs on this node need 4 × 48"):
        check_slots(nodes, 48, 4)
    check_slots(Nodes("1", ["a", "b"], [192, 192]), 48, 4)
    with pytest.raises(CptainError, match="a line is not: host slots queue processors"):
        read_nodes(pe_hostfile(tmp_path, ["a"]))


def test_a_peer_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(
        CptainError, match=r"nowhere\.invalid, of the same job, cannot be reached: its name does not res"
    ):
        own_address(Nodes("1", ["nowhere.invalid", "me"], [], 1))
    with pytest.raises(CptainError, match="localhost, of the same job, cannot be reached: its name resolves to "):
        own_address(Nodes("1", ["localhost", "me"], [], 1))


def test_nodes_that_the_scheduler_packed_on_one_host_are_refused(
    make_ready_run: RunFileMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("pbs0\n" * 16)
    file = make_ready_run()
    monkeypatch.setenv("PBS_NODEFILE", str(hosts))
    monkeypatch.setenv("CPTAIN_NODES", "4")
    said = cptain("train", file, "--cpu", "--dry-run")
    assert said.exit_code == 1
    assert said.output.startswith("cptain: train: the job asked for 4 nodes, and the scheduler's list has 1 (")
    monkeypatch.setenv("CPTAIN_NODES", "1")
    assert cptain("train", file, "--cpu", "--dry-run").exit_code == 0


def test_a_node_of_another_number_of_gpus_than_the_site_says_is_refused() -> None:
    check_as_asked(None, 8, {"CPTAIN_NODES": "1", "CPTAIN_GPUS": "8"})
    check_as_asked(None, 0, {"CPTAIN_NODES": "1", "CPTAIN_GPUS": "8"})  # a dry run, elsewhere
    with pytest.raises(CptainError, match=r"the job has 4 GPUs of this node, and the site file says gpus = 8$"):
        check_as_asked(None, 4, {"CPTAIN_NODES": "1", "CPTAIN_GPUS": "8"})
