"""cptain's own loss against PyTorch's, whole and with the vocabulary cut in two; its kernels for a GPU against it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cptain.megatron.cross_entropy import cross_entropy
from torch.nn import functional

SEQUENCE, BATCH, VOCABULARY = 7, 3, 50


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a wide range, labels at both ends of each half of the vocabulary, and a gradient a token."""
    generator = torch.Generator().manual_seed(1)
    logits = (30 * torch.randn(SEQUENCE, BATCH, VOCABULARY, generator=generator)).to(dtype)
    labels = torch.randint(VOCABULARY, (SEQUENCE, BATCH), generator=generator)
    labels[:4, 0] = torch.tensor([0, 24, 25, 49])
    weights = torch.randint(2, (SEQUENCE, BATCH), generator=generator) * torch.rand(
        SEQUENCE, BATCH, generator=generator
    )
    return logits, labels, weights


def expected(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's losses and the gradient of the logits, in fp64."""
    logits, labels, weights = example(dtype)
    exact = logits.double().requires_grad_()
    losses = functional.cross_entropy(exact.view(-1, VOCABULARY), labels.view(-1), reduction="none").view(labels.shape)
    (losses * weights).sum().backward()
    assert exact.grad is not None
    return losses.detach(), exact.grad


def of_rank(rank: int, folder: Path) -> None:
    """One of two processes that have half of the vocabulary each; leaves its losses and gradients in the folder."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    logits, labels, weights = example(torch.float32)
    # As in Megatron: the logits are what another function gave.
    half = logits.chunk(2, dim=-1)[rank].clone().requires_grad_()
    losses = cross_entropy(half * 1, labels, torch.distributed.group.WORLD)
    (losses * weights).sum().backward()
    torch.save((losses.detach(), half.grad), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_losses_and_gradients_are_pytorchs(dtype: torch.dtype, tolerance: float) -> None:
    logits, labels, weights = example(dtype)
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf * 1, labels)
    (losses * weights).sum().backward()
    wanted, gradient = expected(dtype)
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(losses, wanted.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=tolerance, atol=1e-5)


def test_z_loss_is_trained_on_and_not_returned() -> None:
    logits, labels, weights = example(torch.float32)
    exact, leaf = logits.double().requires_grad_(), logits.clone().requires_grad_()
    losses = functional.cross_entropy(exact.view(-1, VOCABULARY), labels.view(-1), reduction="none").view(labels.shape)
    ((losses + 1e-3 * torch.logsumexp(exact, dim=-1) ** 2) * weights).sum().backward()
    found = cross_entropy(leaf * 1, labels, z_loss=1e-3)
    (found * weights).sum().backward()
    assert exact.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(found, losses.detach().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_two_ranks_with_half_of_the_vocabulary_each_give_the_same(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(of_rank, (tmp_path,), nprocs=2)
    wanted, gradient = expected(torch.float32)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for losses, _ in parts:
        torch.testing.assert_close(losses, wanted.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part for _, part in parts], dim=-1).double(), gradient, rtol=1e-5, atol=1e-5)


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    logits, labels, _ = example(torch.bfloat16)
    given = logits.requires_grad_() * 1
    before = given.data_ptr()
    seen: list[int] = []
    given.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    cross_entropy(given, labels).sum().backward()
    assert seen == [before]


KERNELS = """
import torch
from cptain.megatron import cross_entropy, cross_entropy_kernels

cross_entropy_kernels.BLOCK = 16
for dtype in (torch.float32, torch.bfloat16):
    logits = (30 * torch.randn(5, 50, generator=torch.Generator().manual_seed(1))).to(dtype)
    labels, of_losses = torch.tensor([0, 49, 17, -1, 50]), torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0])
    wanted = cross_entropy.statistics(logits, labels)
    torch.testing.assert_close(cross_entropy_kernels.statistics(logits, labels), wanted)
    by_kernel, by_torch = logits.clone(), logits.clone()
    cross_entropy_kernels.write_gradient(by_kernel, labels, wanted[0], of_losses, 1e-3)
    cross_entropy.write_gradient(by_torch, labels, wanted[0], of_losses, 1e-3)
    torch.testing.assert_close(by_kernel, by_torch)
"""


def test_the_kernels_of_a_gpu_do_in_triton_s_interpreter_what_the_cpu_does() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", KERNELS], env=environment, check=True)
