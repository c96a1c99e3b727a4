"""The loss of a vocabulary that is cut among tensor-parallel ranks, in two passes over the logits.

The first reads them and gives what a token's loss needs; the second, in the backward pass, writes the gradient in their
place. So a logit costs the bytes that the output layer gave it. Megatron's own fused loss keeps the softmax in fp32
beside it, in five kernels: 10 bytes a logit, and gradients in bf16 whatever the precision.
"""

from typing import Any

import torch


def statistics(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log of the summed exponentials of each row, and its label's logit or 0 where another rank has it.

    Args:
        logits: [rows, columns].
        labels: [rows], a column each, or a number outside of them.

    Returns:
        fp32 [2, rows].
    """
    here = (labels >= 0) & (labels < logits.shape[1])
    chosen = logits.gather(1, labels.where(here, 0)[:, None])[:, 0].float()
    return torch.stack([torch.logsumexp(logits.float(), dim=1), chosen.where(here, 0)])


def write_gradient(
    logits: torch.Tensor, labels: torch.Tensor, log_sums: torch.Tensor, of_losses: torch.Tensor, z_loss: float
) -> None:
    """Put the gradient of the loss and of z_loss × log_sums² in the place of the logits.

    It is (softmax × (1 + 2 × z_loss × log_sums) - one at the label) × the gradient of the row's loss.

    Args:
        logits: [rows, columns].
        labels: as for `statistics`.
        log_sums: fp32 [rows], over the columns of all ranks.
        of_losses: fp32 [rows].
        z_loss: the coefficient.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    softmax = torch.exp(logits.float() - log_sums[:, None])
    softmax *= 1 + 2 * z_loss * log_sums[:, None]
    logits.copy_((softmax - (columns == labels[:, None]).float()) * of_losses[:, None])


class _CrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: Any, z_loss: float) -> torch.Tensor:
        size = torch.distributed.get_world_size(group) if group is not None else 1
        rank = torch.distributed.get_rank(group) if group is not None else 0
        rows = logits.view(-1, logits.shape[-1])
        local = labels.reshape(-1) - rank * rows.shape[1]
        if rows.is_cuda:
            from cptain.megatron import cross_entropy_kernels as kernels

            log_sums, chosen = kernels.statistics(rows, local)
        else:
            log_sums, chosen = statistics(rows, local)
        if size > 1:
            largest = log_sums.clone()
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
            sums = torch.stack([torch.exp(log_sums - largest), chosen])
            torch.distributed.all_reduce(sums, group=group)
            log_sums, chosen = largest + torch.log(sums[0]), sums[1]
        ctx.save_for_backward(logits, local, log_sums)
        ctx.z_loss = z_loss
        return (log_sums - chosen).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *of_losses: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, local, log_sums = ctx.saved_tensors
        rows, of_rows = logits.view(-1, logits.shape[-1]), of_losses[0].reshape(-1).float()
        if rows.is_cuda:
            from cptain.megatron import cross_entropy_kernels as kernels

            kernels.write_gradient(rows, local, log_sums, of_rows, ctx.z_loss)
        else:
            write_gradient(rows, local, log_sums, of_rows, ctx.z_loss)
        return logits, None, None, None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, group: Any = None, z_loss: float = 0.0) -> torch.Tensor:
    """The loss of each token. The backward pass overwrites the logits and can run once.

    Args:
        logits: [sequence, micro batch, vocabulary / tensor-parallel size], contiguous.
        labels: [sequence, micro batch], ids of the whole vocabulary.
        group: of the tensor-parallel ranks, in the order of their vocabulary; None has the whole vocabulary here.
        z_loss: so many times log²(the sum of the exponentials) is trained on beside the loss, and not in what is
            returned (Chowdhery et al. 2022, arXiv:2204.02311, section 5).

    Returns:
        fp32 [sequence, micro batch], in nats.
    """
    losses: torch.Tensor = _CrossEntropy.apply(logits, labels, group, z_loss)
    return losses


def language_model_loss(labels: torch.Tensor, logits: torch.Tensor, z_loss: float) -> torch.Tensor:
    """In the place of GPTModel.compute_language_model_loss: labels and losses are [micro batch, sequence]."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    losses = cross_entropy(logits.contiguous(), labels.transpose(0, 1).contiguous(), group, z_loss)
    return losses.transpose(0, 1).contiguous()
