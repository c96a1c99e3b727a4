"""What a training step needs of a GPU's memory, to choose recomputation by.

Activations follow Korthikanti et al. 2022 (arXiv:2205.05198), table 2, restated for a gated MLP and grouped-query
attention with an attention kernel that keeps no scores; weights and optimizer follow Megatron's distributed optimizer:
bf16 weights and fp32 gradients on every data-parallel rank, fp32 master weights and two moments shared among the ranks.
"""

from typing import Literal

from cptain.model.architecture import Architecture
from cptain.model.sizes import parameters
from cptain.run_file import RunFile

Recompute = Literal["none", "selective", "full"]
_USABLE = 0.85  # of a GPU's memory: PyTorch was seen to reserve 12 to 15 % more than it allocates


def step_bytes(run: RunFile, architecture: Architecture, recompute: Recompute, data_parallel: int = 1) -> float:
    """Bytes that a training step needs on the first pipeline stage's GPU, the fullest one.

    Args:
        run: the run.
        architecture: the model's.
        recompute: what is recomputed in the backward pass.
        data_parallel: ranks that share the optimizer's state; 1 is the safe side.
    """
    parallel, train = run.parallel, run.train
    shard = parallel.tensor * parallel.pipeline
    state = parameters(architecture) / shard * (6 + 12 / data_parallel)
    tokens = train.seq_length * train.micro_batch_size / parallel.context / parallel.tensor
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    queries = architecture.num_attention_heads * architecture.kv_channels
    keys = architecture.num_query_groups * architecture.kv_channels
    # bf16 values that the backward pass reads: two norms' inputs and outputs, q k v and the attention's output, gate,
    # up and product; q and k once more where a norm follows them.
    layer = tokens * 2 * (4 * hidden + 2 * queries + 2 * keys + hidden + 3 * ffn)
    if architecture.qk_layernorm:
        layer += tokens * 2 * (queries + keys)
    kept = {"none": layer, "selective": layer, "full": tokens * 2 * hidden}[recompute]
    # A pipeline stage holds as many micro batches in flight as there are stages behind it, so the first holds all
    # layers' worth.
    activations = architecture.num_layers * kept
    if recompute == "full":
        activations += layer
    # In bf16, and twice in fp32: 10 bytes a logit gives 46.5 GiB for 4 layers of Llama 3.1 8B at 8192 tokens, which is
    # what was measured on an H200.
    logits = tokens * architecture.vocab_size * 10 if parallel.pipeline == 1 else 0.0
    return state + activations + logits


def choose_recompute(run: RunFile, architecture: Architecture, gpu_bytes: int) -> Recompute:
    """`train.recompute`, with "auto" as none where a step then fits a GPU, else full.

    Selective recomputation drops the attention scores, which a fused attention kernel never stores: it is no middle way
    here.
    """
    if run.train.recompute != "auto":
        return run.train.recompute
    fits = step_bytes(run, architecture, "none") < _USABLE * gpu_bytes
    return "none" if fits else "full"
