"""What a training step needs of a GPU's memory, to choose recomputation by.

Activations follow Korthikanti et al. 2022 (arXiv:2205.05198), table 2, restated for a gated MLP and grouped-query
attention with an attention kernel that keeps no scores; weights and optimizer follow Megatron's distributed optimizer:
weights and fp32 gradients on every data-parallel rank, master weights and Adam's two moments shared among the ranks.
The peak is in the second step: the moments are made at the end of the first, and the memory that Megatron logs by
default is the first step's.
"""

from dataclasses import astuple, dataclass
from typing import Literal

from cptain.model.architecture import Architecture
from cptain.model.sizes import parameters
from cptain.run_file import RunFile

Recompute = Literal["none", "selective", "full"]
_USABLE = 0.85  # of a GPU's memory: PyTorch was seen to reserve 12 to 15 % more than it allocates


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a GPU of one pipeline stage, at the end of a forward pass.

    Attributes:
        weights: with the copies that fp8 makes.
        gradients: in fp32.
        master: the optimizer's own weights.
        moments: Adam's.
        activations: of all layers and micro batches in flight.
        logits: and their gradients; on the last stage.
        buffers: where fused weight gradients leave what autograd wants: one in bf16 for each shape of a weight.
    """

    weights: float
    gradients: float
    master: float
    moments: float
    activations: float
    logits: float
    buffers: float

    @property
    def peak(self) -> float:
        """All of it."""
        return float(sum(astuple(self)))


def _layer_activations(run: RunFile, architecture: Architecture) -> float:
    """Bytes a token that a layer's backward pass reads."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    queries = architecture.num_attention_heads * architecture.kv_channels
    keys = architecture.num_query_groups * architecture.kv_channels
    # Two norms' inputs and outputs, q k v, the attention's output and its residual, gate, up and product; q and k once
    # more where a norm follows them.
    values = 5 * hidden + 2 * queries + 2 * keys + 3 * ffn
    if architecture.qk_layernorm:
        values += queries + keys
    if run.train.precision == "fp8":  # one byte for what goes into a matrix product
        return 2 * values - (2 * hidden + queries + ffn)
    return values * (4 if run.train.precision == "fp32" else 2)


def stage_memory(
    run: RunFile, architecture: Architecture, recompute: Recompute, data_parallel: int, stage: int
) -> StageMemory:
    """What a stage needs.

    Args:
        run: the run.
        architecture: the model's.
        recompute: what is recomputed in the backward pass.
        data_parallel: copies of the model.
        stage: from 0; the first holds most micro batches in flight, the last the logits.
    """
    parallel, train = run.parallel, run.train
    layers = architecture.num_layers / parallel.pipeline
    embedding = architecture.vocab_size * architecture.hidden_size
    first, last = stage == 0, stage == parallel.pipeline - 1
    vocabulary = embedding * (first + (last and not (first and architecture.tied_embeddings)))
    untied = embedding * (1 if architecture.tied_embeddings else 2)
    layer = (parameters(architecture) - untied) / architecture.num_layers / parallel.tensor
    weights = layers * layer + vocabulary / parallel.tensor
    shard = weights / (data_parallel * parallel.context)
    tokens = train.seq_length * train.micro_batch_size / parallel.context / parallel.tensor
    in_flight = min(parallel.pipeline - stage, train.global_batch_size // (train.micro_batch_size * data_parallel))
    whole = tokens * _layer_activations(run, architecture)
    full = recompute == "full"
    kept = tokens * architecture.hidden_size * (4 if train.precision == "fp32" else 2) if full else whole
    fp32 = train.precision == "fp32"
    return StageMemory(
        weights=weights * (4 if fp32 else 2) + (2 * layers * layer if train.precision == "fp8" else 0),
        gradients=4 * weights,
        master=0 if fp32 else 4 * shard,
        moments=8 * shard,
        activations=in_flight * layers * kept + (whole if full else 0),
        # Once as the head gives them, twice in fp32. Measured in bf16, 4 layers of Llama 3.1 8B at 8192 tokens.
        logits=last * tokens * architecture.vocab_size * (12 if fp32 else 10),
        buffers=0 if fp32 else 2 * (layer + last * embedding / parallel.tensor),
    )


def choose_recompute(
    run: RunFile, architecture: Architecture, gpu_bytes: int, data_parallel: int
) -> tuple[Recompute, list[str]]:
    """`train.recompute`, with "auto" as none where a step of the fullest stage then fits a GPU, else full.

    Selective recomputation drops the attention scores, which a fused attention kernel never stores: it is no middle way
    here.

    Returns:
        What is recomputed, and of "auto" a line that says why.
    """
    if run.train.recompute != "auto":
        return run.train.recompute, []
    stages = {0, run.parallel.pipeline - 1}
    peak, stage = max((stage_memory(run, architecture, "none", data_parallel, one).peak, one) for one in stages)
    chosen: Recompute = "none" if peak < _USABLE * gpu_bytes else "full"
    return chosen, [
        f'train.recompute = "auto": {chosen}, as a step without it needs {peak / 2**30:.0f} GiB of the GPU\'s '
        f"{gpu_bytes / 2**30:.0f} (stage {stage + 1} of {run.parallel.pipeline}; data-parallel size {data_parallel})"
    ]
