"""Documents of a micro batch as Megatron's packed sequences (THD): none attends to another, and each has its positions.

Transformer Engine ignores attention masks where it is causal (Megatron-LM #2357), and takes the ends of documents
instead, whose attention it then computes one by one. All sequences of the micro batch are one such row; on the CPU
`cptain.megatron.cpu` has the attention.
"""

from typing import Any

import torch


def packed(position_ids: torch.Tensor) -> Any:
    """Megatron's PackedSeqParams of a micro batch.

    The lengths come to the CPU, which waits for the GPU once a micro batch: the longest is the size of Megatron's table
    of rotary positions.

    Args:
        position_ids: of the micro batch, 0 where a document begins, as at the beginning of each sequence.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    begins = (position_ids.reshape(-1) == 0).nonzero().view(-1)
    ends = torch.nn.functional.pad(begins, (0, 1), value=position_ids.numel()).to(torch.int32)
    longest = int(position_ids.max()) + 1
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


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
