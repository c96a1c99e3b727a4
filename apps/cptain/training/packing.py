"""Documents of a micro batch as Megatron's packed sequences (THD): none attends to another, and each has its positions.

Transformer Engine ignores attention masks where it is causal (Megatron-LM #2357), and takes the ends of documents
instead, whose attention it then computes one by one. All sequences of the micro batch are one such row; on the CPU
`cptain.megatron.cpu` has the attention.
"""

from typing import Any

import torch

_ROWS = 16  # of a matrix in fp8, which a rank's tokens are


def packed(batch: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """A micro batch in one row, and Megatron's PackedSeqParams of it.

    The lengths come to the CPU, which waits for the GPU once a micro batch: the longest is the size of Megatron's table
    of rotary positions.

    Args:
        batch: of `cptain.training.pretrain`, [4, micro batch, sequence]; position ids, its second, are 0 where a
            document begins, as at the beginning of each sequence.

    Returns:
        [4, 1, tokens of this context-parallel rank], and the parameters.
    """
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    row = batch.flatten(1)
    begins = (row[1] == 0).nonzero().view(-1)
    lengths = torch.nn.functional.pad(begins, (0, 1), value=row.shape[1]).diff()
    padded = {}
    size = parallel_state.get_context_parallel_world_size()
    if size > 1:
        whole = 2 * size * _ROWS * parallel_state.get_tensor_model_parallel_world_size()
        row, lengths = share(row, lengths, size, parallel_state.get_context_parallel_rank(), whole)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    if size > 1:  # Transformer Engine asks for them; what fills a document is of it here
        padded = {"cu_seqlens_q_padded": ends, "cu_seqlens_kv_padded": ends}
    longest = int(lengths.max())
    parameters = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        **padded,
    )
    return row[:, None], parameters


def share(
    row: torch.Tensor, lengths: torch.Tensor, size: int, rank: int, whole: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A context-parallel rank's tokens: of each document an early and a late piece of 2 × size equal ones.

    Documents are filled at their ends to lengths that this divides. No token of theirs sees what comes after it, and
    with a loss mask of 0 nothing of it is trained on.

    Args:
        row: [4, tokens], with positions as its second.
        lengths: of its documents.
        size: of the context-parallel group.
        rank: in it.
        whole: a multiple of 2 × size that all tokens are filled to.

    Returns:
        [4, tokens of the rank], and the filled lengths, of all ranks together.
    """
    pieces = 2 * size
    filled = (lengths + pieces - 1) // pieces * pieces
    filled[-1] += -filled.sum() % whole
    begins = filled.cumsum(0) - filled
    wide = row.new_zeros(len(row), int(filled.sum()))
    wide[:, begins.repeat_interleave(lengths) + row[1]] = row
    place = torch.arange(wide.shape[1], device=row.device) - begins.repeat_interleave(filled)
    piece = place * pieces // filled.repeat_interleave(filled)
    return wide[:, (piece == rank) | (piece == pieces - 1 - rank)], filled


def install() -> None:
    """Let pipeline stages expect what they get of each other, a micro batch in one row. Call after Megatron's import
    and before training."""
    from megatron.training import training

    get = training.get_forward_backward_func

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        forward_backward = get(*args, **kwargs)

        def in_one_row(*, seq_length: int, micro_batch_size: int, **named: Any) -> Any:
            return forward_backward(seq_length=seq_length * micro_batch_size, micro_batch_size=1, **named)

        return in_one_row

    training.get_forward_backward_func = get_forward_backward_func
