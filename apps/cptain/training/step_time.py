"""How long a step takes, by what computes it: good for the ratio of two trainings, of which one was measured.

Model FLOPs alone do not tell it: a layer half as wide has a quarter of the matrices, and half of all that is done to
its values one by one. The rates of kernels are those of one profile (docs/benchmarks.md, "by kernel": 4 layers of Llama
3.1 8B, 65,536 tokens, an H100), from which the measured steps of the trainings on one GPU in rates.toml are computed
within 6 %, but for one whose host was slow. Communication is not in it.
"""

import math

from cptain.model.architecture import Architecture
from cptain.model.sizes import expert, parameters
from cptain.training.layout import Layout, recomputed_layers

_PROFILED = 65536 * 4 * 4096  # tokens, layers, hidden size
# FLOP a second of matrix products, and of attention as causal.
_MATRICES = {"bf16": 698e12, "fp8": 1367e12}
_ATTENTION = 388e12
_AGAIN = 2 / 7  # of attention's time, its forward pass
# Seconds: of a value between layers (additions, norms, casts to fp8), of SwiGLU and of the logits, and of a parameter.
_HIDDEN = {"bf16": 47e-3 / _PROFILED, "fp8": 52e-3 / _PROFILED}
_SWIGLU = 26e-3 / (65536 * 4 * 14336)
_LOSS = 24e-3 / (65536 * 128256)
_ADAM = 16e-3 / 1.923e9
_REST = 1.03  # kernels of under 2.5 ms each, and none running
# Seconds that the process which launches the kernels takes for a layer and for a micro batch, on the hosts of these
# trainings, where GPUs waited for it (width 1024, and fp8 in micro batches of 4096 tokens). One host was 16 % slower.
_LAUNCH = {"bf16": 6.9e-3, "fp8": 10.0e-3}
_LAUNCH_BATCH = 12e-3


def whole_step(
    architecture: Architecture, seq_length: int, global_batch_size: int, precision: str, layout: Layout
) -> float:
    """Seconds of a step: of the GPU or of its host, whichever takes longer."""
    launched = launch_seconds(architecture, global_batch_size, precision, layout)
    return max(gpu_seconds(architecture, seq_length, global_batch_size, precision, layout), launched)


def gpu_seconds(
    architecture: Architecture, seq_length: int, global_batch_size: int, precision: str, layout: Layout
) -> float:
    """Of a step, what its kernels take on each GPU; pipeline stages wait for one another's first and last batches."""
    kind = "fp8" if precision == "fp8" else "bf16"
    queries = architecture.num_attention_heads * architecture.kv_channels
    keys = architecture.num_query_groups * architecture.kv_channels
    weights = 2 * architecture.hidden_size * (queries + keys) + architecture.experts_a_token * expert(architecture)
    attention = 6 * queries * seq_length / _ATTENTION
    a_layer = (
        6 * weights / _MATRICES[kind]
        + attention * (1 + (_AGAIN if layout.recompute == "selective" else 0))
        + architecture.hidden_size * _HIDDEN[kind]
        + architecture.experts_a_token * architecture.ffn_hidden_size * _SWIGLU
    )
    head = architecture.vocab_size * (6 * architecture.hidden_size / _MATRICES["bf16"] + _LOSS)
    a_token = architecture.num_layers * a_layer * (1 + _again(architecture, layout) / 3) + head
    waiting = (layout.pipeline - 1) / layout.micro_batches(global_batch_size) if layout.pipeline > 1 else 0.0
    tokens = global_batch_size * seq_length
    return (_REST * (1 + waiting) * tokens * a_token + parameters(architecture) * _ADAM) / layout.gpus


def launch_seconds(architecture: Architecture, global_batch_size: int, precision: str, layout: Layout) -> float:
    """Of a step, what the process of each GPU takes to launch all kernels; it works ahead of the GPU where it can."""
    layers = math.ceil(architecture.num_layers / layout.pipeline) * (1 + _again(architecture, layout) / 3)
    a_batch = layers * _LAUNCH["fp8" if precision == "fp8" else "bf16"] + _LAUNCH_BATCH
    return layout.micro_batches(global_batch_size) * a_batch


def _again(architecture: Architecture, layout: Layout) -> float:
    """The share of the layers that is computed again."""
    a_stage = math.ceil(architecture.num_layers / layout.pipeline)
    return recomputed_layers(layout, a_stage) / a_stage
