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
from cptain.training.megatron_args import Row, check_megatron_args
from cptain.training.memory import Recompute

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


def _cpu_rows() -> list[Row]:
    return [
        ("", "--transformer-impl", "local"),
        ("", "--distributed-backend", "gloo"),
        ("", "--use-cpu-initialization"),
        ("", "--no-gradient-accumulation-fusion"),
        ("", "--no-persist-layer-norm"),
        ("", "--no-masked-softmax-fusion"),
        ("", "--no-bias-swiglu-fusion"),
        ("", "--no-rope-fusion"),
        ("", "--num-workers", "0"),
    ]


def _gpu_rows(run: RunFile, script: Path) -> list[Row]:
    rows: list[Row] = [
        ("", "--transformer-impl", "transformer_engine"),
        ("", "--distributed-backend", "nccl"),
        ("", "--use-distributed-optimizer"),
        ("", "--overlap-grad-reduce"),
        ("", "--overlap-param-gather"),
        ("", "--attention-backend", "auto"),
        ("", "--manual-gc"),
        ("", "--num-workers", "2"),
    ]
    if run.parallel.tensor > 1:
        rows += [("", "--sequence-parallel")]
    if run.train.precision != "fp32":  # it computes in bf16
        rows += [("", "--cross-entropy-loss-fusion")]
    if core_version(script) >= (0, 17):
        # The optimizer's state in a form that any layout loads. Before 0.17 that is the default, and the only one; the
        # default since then can change its data-parallel size alone.
        rows += [("", "--dist-ckpt-optim-fully-reshardable")]
    if not weight_gradient.is_fused(own_script=run.train.script is None):
        rows += [("", "--no-gradient-accumulation-fusion")]
    return rows


_PRECISION: dict[str, list[Row]] = {
    "fp32": [],
    "bf16": [("train.precision", "--bf16")],
    "fp8": [
        ("train.precision", "--bf16"),
        ("train.precision", "--fp8-format", "hybrid"),
        ("", "--fp8-recipe", "tensorwise"),
    ],
}
_RECOMPUTE: dict[Recompute, list[Row]] = {
    "none": [],
    "selective": [("train.recompute", "--recompute-granularity", "selective")],
    "full": [
        ("train.recompute", "--recompute-granularity", "full"),
        ("train.recompute", "--recompute-method", "uniform"),
        ("train.recompute", "--recompute-num-layers", "1"),
    ],
}


def _run_rows(run: RunFile, tokenizer_folder: Path, data_args: Path, steps: int) -> list[Row]:
    """What the run file says, and the defaults that hold for every run."""
    parallel, train = run.parallel, run.train
    return [
        ("parallel.tensor", "--tensor-model-parallel-size", str(parallel.tensor)),
        ("parallel.pipeline", "--pipeline-model-parallel-size", str(parallel.pipeline)),
        ("parallel.context", "--context-parallel-size", str(parallel.context)),
        ("train.seq_length", "--seq-length", str(train.seq_length)),
        ("train.micro_batch_size", "--micro-batch-size", str(train.micro_batch_size)),
        ("train.global_batch_size", "--global-batch-size", str(train.global_batch_size)),
        ("train.steps", "--train-iters", str(steps)),
        ("train.lr", "--lr", repr(train.lr)),
        ("train.min_lr", "--min-lr", repr(train.min_lr)),
        ("", "--lr-decay-style", "cosine"),
        ("train.steps", "--lr-decay-iters", str(steps)),
        ("train.warmup_steps", "--lr-warmup-iters", str(train.warmup_steps)),
        ("", "--weight-decay", "0.1"),
        ("", "--clip-grad", "1.0"),
        ("", "--optimizer", "adam"),
        ("", "--adam-beta1", "0.9"),
        ("", "--adam-beta2", "0.95"),
        ("model.tokenizer", "--tokenizer-type", "HuggingFaceTokenizer"),
        ("model.tokenizer", "--tokenizer-model", str(tokenizer_folder)),
        ("data.input and data.mix", "--data-args-path", str(data_args)),
        ("", "--data-cache-path", str(run.folder / "data-cache")),
        ("data.split", "--split", run.data.split),
        ("", "--no-create-attention-mask-in-dataloader"),
        ("", "--ckpt-format", "torch_dist"),
        ("work_dir and name", "--save", str(run.checkpoints_folder)),
        ("train.save_interval", "--save-interval", str(train.save_interval)),
        ("", "--exit-signal-handler"),
        ("train.eval_interval", "--eval-interval", str(train.eval_interval)),
        ("", "--eval-iters", "1"),
        ("", "--log-interval", "1"),
        ("", "--log-throughput"),
    ]


def _load_rows(run: RunFile, resume: bool, same_layout: bool) -> list[Row]:
    if not resume:
        return [("model.megatron", "--load", str(run.megatron_folder)), ("", "--no-load-optim"), ("", "--no-load-rng")]
    rows: list[Row] = [("work_dir and name", "--load", str(run.checkpoints_folder))]
    if run.train.script is not None:  # cptain's own leaves nothing of the checkpoint's schedule to be overridden
        rows += [("train.lr", "--override-opt_param-scheduler")]
    if not same_layout:  # random states belong to a rank, and nothing here drops out; the fork would not start
        rows += [("", "--no-load-rng")]
    return rows


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
    recompute: Recompute | None,
) -> Flags:
    """Everything that Megatron needs to know, as flags with their values; those of train.megatron_args follow.

    Args:
        run: the run.
        architecture: the model's.
        tokenizer_folder: the tokenizer's local folder.
        data_args: the blend (`cptain.data.blend.write_blend`).
        script: the training script.
        steps: optimizer steps in all.
        resume: whether <run>/checkpoints is continued, or the converted checkpoint begun with.
        same_layout: whether what is continued was saved with the run's tensor and pipeline parallel sizes.
        recompute: what is recomputed in the backward pass; None trains on the CPU.

    Raises:
        CptainError: what Megatron cannot represent; what train.megatron_args may not hold.
    """
    rows: list[Row] = [("config.json", *flag) for flag in arguments.flags(architecture, run.parallel.tensor)]
    rows += _run_rows(run, tokenizer_folder, data_args, steps)
    rows += _load_rows(run, resume, same_layout)
    rows += _PRECISION[run.train.precision]
    if recompute is None:
        rows += _cpu_rows()
    else:
        rows += _gpu_rows(run, script)
        rows += _RECOMPUTE[recompute]
    check_megatron_args(run, rows)
    return [row[1:] for row in rows]
