"""Megatron's arguments, built from the run file and the model's config.json.

Only flags that the lab's fork (core 0.13.1), upstream releases and PyPI's megatron-core all know. What they say of the
model is in `cptain.model.arguments`.
"""

from pathlib import Path

from cptain.errors import CptainError
from cptain.megatron import weight_gradient
from cptain.megatron.version import core_version
from cptain.model import arguments
from cptain.model.architecture import Architecture
from cptain.run_file import RunFile
from cptain.training.memory import choose_recompute

Flags = list[tuple[str, ...]]


def check_parallel(run: RunFile, architecture: Architecture, processes: int) -> None:
    """Refuse sizes that do not divide one another, naming both.

    Args:
        run: the run.
        architecture: the model's.
        processes: of all nodes together.

    Raises:
        CptainError: exit status 2.
    """
    parallel, train = run.parallel, run.train
    data_parallel = processes // parallel.model_size
    rules = (
        (
            "tensor × pipeline × context",
            parallel.model_size,
            "processes",
            processes,
            "a GPU, or a CPU process, is one process",
        ),
        ("parallel.pipeline", parallel.pipeline, "layers", architecture.num_layers, ""),
        ("parallel.tensor", parallel.tensor, "attention heads", architecture.num_attention_heads, ""),
        ("parallel.tensor", parallel.tensor, "key and value heads", architecture.num_query_groups, ""),
        ("parallel.tensor", parallel.tensor, "MLP channels", architecture.ffn_hidden_size, ""),
        (
            "micro_batch_size × data-parallel size",
            train.micro_batch_size * max(1, data_parallel),
            "sequences of train.global_batch_size",
            train.global_batch_size,
            f"micro_batch_size = {train.micro_batch_size}, {data_parallel} copies of the model",
        ),
        ("2 × parallel.context", 2 * parallel.context, "tokens of train.seq_length", train.seq_length, "")
        if parallel.context > 1
        else ("", 1, "", 1, ""),
        ("parallel.tensor", parallel.tensor, "tokens of train.seq_length", train.seq_length, ""),
    )
    for divisor_name, divisor, name, number, why in rules:
        if number % divisor:
            raise CptainError(
                f"{divisor_name} = {divisor} does not divide the {number} {name}" + (f" ({why})" if why else ""), 2
            )
    if train.seq_length > architecture.max_position_embeddings:
        raise CptainError(
            f"train.seq_length = {train.seq_length}: the model's config.json allows at most "
            f"{architecture.max_position_embeddings} (max_position_embeddings, or the sliding_window of a Mistral)",
            2,
        )


def _cpu_flags() -> Flags:
    return [
        ("--transformer-impl", "local"),
        ("--distributed-backend", "gloo"),
        ("--use-cpu-initialization",),
        ("--no-gradient-accumulation-fusion",),
        ("--no-persist-layer-norm",),
        ("--no-masked-softmax-fusion",),
        ("--no-bias-swiglu-fusion",),
        ("--no-rope-fusion",),
        ("--num-workers", "0"),
    ]


def _gpu_flags(run: RunFile, script: Path) -> Flags:
    flags: Flags = [
        ("--transformer-impl", "transformer_engine"),
        ("--distributed-backend", "nccl"),
        ("--use-distributed-optimizer",),
        ("--overlap-grad-reduce",),
        ("--overlap-param-gather",),
        ("--attention-backend", "auto"),
        ("--manual-gc",),
        ("--num-workers", "2"),
    ]
    if run.parallel.tensor > 1:
        flags += [("--sequence-parallel",)]
    if run.train.precision != "fp32":  # it computes in bf16
        flags += [("--cross-entropy-loss-fusion",)]
    if core_version(script) >= (0, 17):
        # The optimizer's state in a form that any layout loads. Before 0.17 that is the default, and the only one; the
        # default since then can change its data-parallel size alone.
        flags += [("--dist-ckpt-optim-fully-reshardable",)]
    if not weight_gradient.is_fused(own_script=run.train.script is None):
        flags += [("--no-gradient-accumulation-fusion",)]
    return flags


_PRECISION: dict[str, Flags] = {
    "fp32": [],
    "bf16": [("--bf16",)],
    "fp8": [("--bf16",), ("--fp8-format", "hybrid"), ("--fp8-recipe", "tensorwise")],
}
_RECOMPUTE: dict[str, Flags] = {
    "none": [],
    "selective": [("--recompute-granularity", "selective")],
    "full": [("--recompute-granularity", "full"), ("--recompute-method", "uniform"), ("--recompute-num-layers", "1")],
}


def megatron_flags(
    run: RunFile,
    architecture: Architecture,
    *,
    tokenizer_folder: Path,
    data_args: Path,
    script: Path,
    steps: int,
    resume: bool,
    same_layout: bool,
    gpu_bytes: int | None,
) -> Flags:
    """Everything that Megatron needs to know, as flags with their values.

    Args:
        run: the run.
        architecture: the model's.
        tokenizer_folder: the tokenizer's local folder.
        data_args: the blend (`cptain.data.blend.write_blend`).
        script: the training script.
        steps: optimizer steps in all.
        resume: whether <run>/checkpoints is continued, or the converted checkpoint begun with.
        same_layout: whether what is continued was saved with the run's tensor and pipeline parallel sizes.
        gpu_bytes: memory of a GPU; None on the CPU.

    Raises:
        CptainError: what Megatron cannot represent.
    """
    parallel, train = run.parallel, run.train
    flags: Flags = arguments.flags(architecture, parallel.tensor)
    flags += [
        ("--tensor-model-parallel-size", str(parallel.tensor)),
        ("--pipeline-model-parallel-size", str(parallel.pipeline)),
        ("--context-parallel-size", str(parallel.context)),
        ("--seq-length", str(train.seq_length)),
        ("--micro-batch-size", str(train.micro_batch_size)),
        ("--global-batch-size", str(train.global_batch_size)),
        ("--train-iters", str(steps)),
        ("--lr", repr(train.lr)),
        ("--min-lr", repr(train.min_lr)),
        ("--lr-decay-style", "cosine"),
        ("--lr-decay-iters", str(steps)),
        ("--lr-warmup-iters", str(train.warmup_steps)),
        ("--weight-decay", "0.1"),
        ("--clip-grad", "1.0"),
        ("--optimizer", "adam"),
        ("--adam-beta1", "0.9"),
        ("--adam-beta2", "0.95"),
        ("--tokenizer-type", "HuggingFaceTokenizer"),
        ("--tokenizer-model", str(tokenizer_folder)),
        ("--data-args-path", str(data_args)),
        ("--data-cache-path", str(run.folder / "data-cache")),
        ("--split", run.data.split),
        ("--no-create-attention-mask-in-dataloader",),
        ("--ckpt-format", "torch_dist"),
        ("--save", str(run.checkpoints_folder)),
        ("--save-interval", str(train.save_interval)),
        ("--exit-signal-handler",),
        ("--eval-interval", str(train.eval_interval)),
        ("--eval-iters", "1"),
        ("--log-interval", "1"),
        ("--log-throughput",),
    ]
    if resume:
        # The run file wins over the schedule that the checkpoint carries: Megatron would refuse a changed number of
        # steps.
        flags += [("--load", str(run.checkpoints_folder)), ("--override-opt_param-scheduler",)]
        if not same_layout:  # random states belong to a rank, and nothing here drops out; the fork would not start
            flags += [("--no-load-rng",)]
    else:
        flags += [("--load", str(run.megatron_folder)), ("--no-load-optim",), ("--no-load-rng",)]
    flags += _PRECISION[train.precision]
    if gpu_bytes is None:
        flags += _cpu_flags()
    else:
        flags += _gpu_flags(run, script)
        flags += _RECOMPUTE[choose_recompute(run, architecture, gpu_bytes)]
    return flags
