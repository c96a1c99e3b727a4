"""What a training step needs of a GPU's memory.

Activations follow Korthikanti et al. 2022 (arXiv:2205.05198), table 2, restated for a gated MLP and grouped-query
attention with an attention kernel that keeps no scores; weights and optimizer follow Megatron's distributed optimizer:
weights and fp32 gradients on every data-parallel rank, master weights and Adam's two moments shared among the ranks. Of
experts a rank has its share alone, and each is taken to get as many tokens as any other; none of this is measured yet.
The peak is in the second step: the moments are made at the end of the first, and the memory that Megatron logs by
default is the first step's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cptain.model.architecture import Architecture
from cptain.model.sizes import expert, parameters
from cptain.run_file import RunFile
from cptain.training.layout import Layout, recomputed_layers, stage_layers


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a GPU of one pipeline stage.

    Attributes:
        weights: with the copies that fp8 makes.
        gradients: in fp32, or in bf16 where train.megatron_args asks for that.
        master: the optimizer's own weights.
        moments: Adam's.
        activations: of all layers and micro batches in flight, as the backward pass begins.
        logits: then; on the last stage. Their gradients take their place, but for a training script of the user's own.
        rebuilt: of one layer, in the backward pass, where all are recomputed; the logits are gone by then.
        buffers: where fused weight gradients leave what autograd wants: one in bf16 for each shape of a weight.
        in_optimizer: what the optimizer's step holds more; the activations are gone by then.
    """

    weights: float
    gradients: float
    master: float
    moments: float
    activations: float
    logits: float
    rebuilt: float
    buffers: float
    in_optimizer: float

    @property
    def _always(self) -> float:
        return self.weights + self.gradients + self.master + self.buffers

    @property
    def _computing(self) -> float:
        return self.activations + max(self.logits, self.rebuilt)

    @property
    def first_peak(self) -> float:
        """The most in the first step, whose end makes the moments."""
        return self._always + max(self._computing, self.moments + self.in_optimizer)

    @property
    def peak(self) -> float:
        """The most in any later step."""
        return self._always + self.moments + max(self._computing, self.in_optimizer)


@dataclass(frozen=True)
class _Optimizer:
    """Bytes a parameter: `gradient` on every rank, the others shared among the data-parallel ranks."""

    gradient: float
    master: float
    moments: float
    in_step: float


def _argument(run: RunFile, flag: str) -> str | None:
    """The value of an argument in train.megatron_args; empty for a switch, None where it is not there."""
    words = run.train.megatron_args
    for place in reversed(range(len(words))):
        name, equals, value = words[place].partition("=")
        if name == flag:
            after = words[place + 1] if place + 1 < len(words) and not equals else value
            return "" if after.startswith("--") else after
    return None


def _optimizer(run: RunFile) -> _Optimizer:
    """What train.megatron_args makes of Adam.

    Transformer Engine's Adam computes in fp32: moments that are kept in fewer bits are all there in fp32 as well while
    it steps, so that they save nothing at the peak of a large model. Its master weights are the 16 bits that bf16
    weights lack. A whole 8B on two GPUs: 69.6 GB by this and 70.3 measured in bf16, 99.3 and 99.9 in fp8.
    """
    if run.train.precision == "fp32":
        return _Optimizer(gradient=4, master=0, moments=8, in_step=0)
    gradient = 2.0 if _argument(run, "--grad-reduce-in-bf16") is not None else 4.0
    if _argument(run, "--use-precision-aware-optimizer") is None:
        return _Optimizer(gradient, master=4, moments=8, in_step=0 if gradient == 4 else 4)
    sizes = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    kept = [sizes.get(_argument(run, flag) or "fp32", 4) for flag in ("--exp-avg-dtype", "--exp-avg-sq-dtype")]
    # With fp8, unless by delayed scaling, Megatron keeps whole fp32 weights and gradients of the shard.
    whole = run.train.precision == "fp8" and run.train.fp8_recipe != "delayed"
    return _Optimizer(gradient, 8 if whole else 2, moments=sum(kept), in_step=sum(4 for size in kept if size < 4))


def _layer_activations(run: RunFile, architecture: Architecture) -> float:
    """Bytes a token that a layer's backward pass reads."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    queries = architecture.num_attention_heads * architecture.kv_channels
    keys = architecture.num_query_groups * architecture.kv_channels
    # Two norms' inputs and outputs, q k v, the attention's output and its residual, gate, up and product; q and k once
    # more where a norm follows them. A token that several experts compute is copied for each, and comes back from each.
    times = architecture.experts_a_token
    values = 5 * hidden + 2 * queries + 2 * keys + 3 * times * ffn
    if architecture.mixture:
        values += 2 * times * hidden
    if architecture.qk_layernorm:
        values += queries + keys
    if run.train.precision == "fp8":  # one byte for what goes into a matrix product
        return 2 * values - (hidden + queries + times * (hidden + ffn))
    return values * (4 if run.train.precision == "fp32" else 2)


def stage_memory(run: RunFile, architecture: Architecture, layout: Layout, stage: int) -> StageMemory:
    """What a stage needs.

    Args:
        run: the run; its layout is not looked at.
        architecture: the model's.
        layout: how it lies on the GPUs.
        stage: from 0; the first holds most micro batches in flight, the last the logits.
    """
    train, optimizer = run.train, _optimizer(run)
    fp32, last = train.precision == "fp32", stage == layout.pipeline - 1
    layers = stage_layers(architecture.num_layers, layout.pipeline)[stage]
    embedding = architecture.vocab_size * architecture.hidden_size
    vocabulary = embedding * ((stage == 0) + (last and not (stage == 0 and architecture.tied_embeddings)))
    untied = embedding * (1 if architecture.tied_embeddings else 2)
    whole_layer = (parameters(architecture) - untied) / architecture.num_layers
    mlps = architecture.experts * expert(architecture)  # a share of them on each GPU
    layer = (whole_layer - mlps + mlps / layout.expert) / layout.tensor
    weights = layers * layer + vocabulary / layout.tensor
    # Fewer GPUs have the same experts than have the same of all else: of both the optimizer has its share once in all.
    shard = (layers * whole_layer + vocabulary) / layout.tensor / (layout.data * layout.context)
    tokens = train.seq_length * layout.micro_batch_size / layout.context / layout.tensor
    in_flight = min(layout.pipeline - stage, layout.micro_batches(train.global_batch_size))
    whole = tokens * _layer_activations(run, architecture)
    its_input = tokens * architecture.hidden_size * (4 if fp32 else 2)
    again = recomputed_layers(layout, layers)
    fused = not fp32 and "--no-gradient-accumulation-fusion" not in train.megatron_args
    return StageMemory(
        weights=weights * (4 if fp32 else 2) + (2 * layers * layer if train.precision == "fp8" else 0),
        gradients=optimizer.gradient * weights,
        master=optimizer.master * shard,
        moments=optimizer.moments * shard,
        activations=in_flight * (again * its_input + (layers - again) * whole),
        # As the head gives them; Megatron's own loss keeps them in fp32 twice. Both measured in bf16.
        logits=last * tokens * architecture.vocab_size * ((4 if fp32 else 2) + (8 if train.script else 0)),
        rebuilt=whole if again == layers else 0,
        buffers=2 * (layer + last * embedding / layout.tensor) if fused else 0,
        in_optimizer=optimizer.in_step * shard,
    )


def fullest(run: RunFile, architecture: Architecture, layout: Layout) -> tuple[StageMemory, int]:
    """What the stage that needs most needs, and which it is, from 0."""
    last = layout.pipeline - 1
    # Those between the ends are alike but for what is in flight, of which the second stage has most.
    stages = {0, min(1, last), last}
    found: Iterator[tuple[StageMemory, int]] = (
        (stage_memory(run, architecture, layout, stage), stage) for stage in sorted(stages)
    )
    return max(found, key=lambda one: one[0].peak)
