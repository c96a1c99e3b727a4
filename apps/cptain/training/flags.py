"""Megatron's arguments, built from the run file and the model's config.json.

Only flags that the lab's fork (core 0.13.1), upstream releases and PyPI's megatron-core all know. What they say of the
model is in `cptain.model.arguments`.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from cptain.errors import CptainError
from cptain.megatron import weight_gradient
from cptain.megatron_version import core_version
from cptain.model import arguments
from cptain.model.architecture import Architecture, model_folder
from cptain.run_file import RunFile
from cptain.run_train import Train
from cptain.toml_file import seconds
from cptain.training.layout import Layout, Recompute, stage_layers
from cptain.training.megatron_args import Row, check_megatron_args

if TYPE_CHECKING:  # it imports torch, which `cptain plan` does without
    from cptain.training.start import Beginning

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
    data_parallel, alike = processes // parallel.model_size, processes // (parallel.tensor * parallel.pipeline)
    if parallel.pipeline > architecture.num_layers:
        raise CptainError(
            f"parallel.pipeline = {parallel.pipeline}: the model has {architecture.num_layers} layers, and a stage "
            "needs one",
            2,
        )
    micro_batch_size = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    rules = (
        (
            "tensor × pipeline × context",
            parallel.model_size,
            "processes",
            processes,
            "a GPU, or a CPU process, is one process",
        ),
        ("parallel.tensor", parallel.tensor, "attention heads", architecture.num_attention_heads, ""),
        ("parallel.tensor", parallel.tensor, "key and value heads", architecture.num_query_groups, ""),
        ("parallel.tensor", parallel.tensor, "MLP channels", architecture.ffn_hidden_size, ""),
        ("parallel.expert", parallel.expert, "experts of a layer", architecture.experts, ""),
        ("parallel.expert", parallel.expert, "GPUs that have equal weights otherwise", alike, "copies × context"),
        (
            "micro_batch_size × data-parallel size",
            micro_batch_size * max(1, data_parallel),
            "sequences of train.global_batch_size" + " and batch_ramp" * bool(train.batch_ramp),
            train.divides_batches,
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


def _expert_rows(run: RunFile, architecture: Architecture, cpu: bool) -> list[Row]:
    """How a mixture of experts is trained. The router's product is in fp32: rounded to bf16, experts that are nearly
    alike change places (transformers leaves it in the model's dtype)."""
    if architecture.mixture is None:
        return []
    balance = "aux_loss" if architecture.mixture.aux_loss else "none"
    rows: list[Row] = [
        ("parallel.expert", "--expert-model-parallel-size", str(run.parallel.expert)),
        ("", "--moe-router-load-balancing-type", balance),
        ("", "--moe-aux-loss-coeff", repr(architecture.mixture.aux_loss)),
        ("", "--moe-token-dispatcher-type", "alltoall"),
        ("", "--moe-router-dtype", "fp32"),
    ]
    if not cpu and run.train.precision != "fp32":  # Transformer Engine's kernels that compute many experts at once
        rows += [("", "--moe-grouped-gemm")]
    return rows


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
    if run.train.script is not None and run.train.precision != "fp32":  # cptain's own has its own loss; this is bf16
        rows += [("", "--cross-entropy-loss-fusion")]
    if core_version(script) >= (0, 17):
        # The optimizer's state in a form that any layout loads. Before 0.17 that is the default, and the only one; the
        # default since then can change its data-parallel size alone.
        rows += [("", "--dist-ckpt-optim-fully-reshardable")]
    if not weight_gradient.is_fused(own_script=run.train.script is None):
        rows += [("", "--no-gradient-accumulation-fusion")]
    return rows


def _precision_rows(train: Train) -> list[Row]:
    if train.precision == "fp32":
        return []
    rows: list[Row] = [("train.precision", "--bf16")]
    if train.precision == "fp8":
        recipe = train.fp8_recipe or "tensorwise"
        rows += [("train.precision", "--fp8-format", "hybrid"), ("train.fp8_recipe", "--fp8-recipe", recipe)]
        if recipe == "delayed":  # Megatron's default looks at the last step alone
            rows += [("", "--fp8-amax-history-len", "1024"), ("", "--fp8-amax-compute-algo", "max")]
    return rows


def _recompute_rows(recompute: Recompute) -> list[Row]:
    """Whole layers: all of them, each by itself, or the first of every stage. Attention alone: "selective"."""
    if recompute == "none":
        return []
    if recompute == "selective":
        return [("train.recompute", "--recompute-granularity", "selective")]
    method, layers = ("uniform", 1) if recompute == "full" else ("block", recompute)
    return [
        ("train.recompute", "--recompute-granularity", "full"),
        ("train.recompute", "--recompute-method", method),
        ("train.recompute", "--recompute-num-layers", str(layers)),
    ]


def schedule_rows(train: Train, steps: int) -> list[Row]:
    """The schedule of a run of `steps`.

    Megatron's --lr-decay-iters is the step that the decay ends at, the warm-up included; its default form of a
    wsd's decay is the exponential one.
    """
    warmup, decay = train.warmup(steps), train.decay(steps)
    ends = steps if train.schedule in ("wsd", "constant") else warmup + decay
    rows: list[Row] = [
        ("train.schedule", "--lr-decay-style", "WSD" if train.schedule == "wsd" else train.schedule),
        ("train.decay_steps", "--lr-decay-iters", str(ends)),
        ("train.warmup_steps", "--lr-warmup-iters", str(warmup)),
    ]
    if train.schedule == "wsd":
        rows += [
            ("train.decay_steps", "--lr-wsd-decay-iters", str(decay)),
            ("train.decay_style", "--lr-wsd-decay-style", train.decay_style or "linear"),
        ]
    return rows


def _stage_rows(layers: int, stages: int) -> list[Row]:
    """Stages that hold different numbers of layers; Megatron divides evenly by itself."""
    held = stage_layers(layers, stages)
    if len(set(held)) == 1:
        return []
    return [
        ("", "--decoder-first-pipeline-num-layers", str(held[0])),
        ("", "--decoder-last-pipeline-num-layers", str(held[-1])),
    ]


def _run_rows(run: RunFile, layout: Layout, steps: int) -> list[Row]:
    """What the run file says, and the defaults that hold for every run."""
    parallel, train = run.parallel, run.train
    return [
        ("parallel.tensor", "--tensor-model-parallel-size", str(parallel.tensor)),
        ("parallel.pipeline", "--pipeline-model-parallel-size", str(parallel.pipeline)),
        ("parallel.context", "--context-parallel-size", str(parallel.context)),
        ("train.seq_length", "--seq-length", str(train.seq_length)),
        ("train.micro_batch_size", "--micro-batch-size", str(layout.micro_batch_size)),
        ("train.global_batch_size", "--global-batch-size", str(train.global_batch_size)),
        ("train.steps", "--train-iters", str(steps)),
        ("train.lr", "--lr", repr(train.lr)),
        ("train.min_lr", "--min-lr", repr(train.min_lr)),
        *schedule_rows(train, steps),
        ("", "--optimizer", "adam"),
        ("train.weight_decay", "--weight-decay", repr(train.weight_decay)),
        ("train.adam_beta1", "--adam-beta1", repr(train.adam_beta1)),
        ("train.adam_beta2", "--adam-beta2", repr(train.adam_beta2)),
        ("train.adam_eps", "--adam-eps", repr(train.adam_eps)),
        ("train.clip_grad", "--clip-grad", repr(train.clip_grad)),
        ("train.seed", "--seed", str(train.seed)),
        ("model.tokenizer", "--tokenizer-type", "HuggingFaceTokenizer"),
        ("model.tokenizer", "--tokenizer-model", str(model_folder(run.tokenizer))),
        ("", "--data-cache-path", str(run.folder / "data-cache")),
        ("data.split", "--split", run.data.split),
        ("", "--no-create-attention-mask-in-dataloader"),
        ("", "--ckpt-format", "torch_dist"),
        ("work_dir and name", "--save", str(run.checkpoints_folder)),
        ("train.save_interval", "--save-interval", str(train.save_interval)),
        ("", "--exit-signal-handler"),
        ("train.eval_interval", "--eval-interval", str(train.eval_interval)),
        ("train.eval_steps", "--eval-iters", str(train.eval_steps)),
        ("", "--log-interval", "1"),
        ("", "--log-throughput"),
    ]


def keys_of_flags() -> dict[str, str]:
    """Which key of the run file says a flag of Megatron's, for those that a run file's own keys say."""
    train = {"seq_length": 1, "global_batch_size": 1, "steps": 2, "lr": 1.0, "schedule": "wsd", "decay_steps": 1}
    content = {"name": "any", "work_dir": "/", "model": {"hf": "/"}, "data": {"input": ["/"]}, "train": train}
    run = RunFile.model_validate(content, context={"folder": Path("/")})
    return {row[1]: row[0] for row in _run_rows(run, Layout(1, 1, 1, 1), 2) if row[0]}


def _health_rows(run: RunFile) -> list[Row]:
    """What leaves the judgement of steps to cptain's own script (`cptain.training.health`), in every Megatron alike.

    Megatron's own looks for NaN make the CPU wait for the GPU in every micro batch and bucket; releases differ in what
    follows: some save a checkpoint.
    """
    # Over the time of a step: a collective that runs into its own limit leaves no stacks.
    minutes = max(10, math.ceil(seconds(run.train.step_timeout) / 60) + 2)
    return [
        ("train.max_loss_spike", "--no-check-for-nan-in-loss-and-grad"),
        ("train.max_loss_spike", "--rerun-mode", "disabled"),
        ("", "--distributed-timeout-minutes", str(minutes)),
    ]


def _load_rows(run: RunFile, begins: "Beginning") -> list[Row]:
    root, branch = begins.source.parent, run.train.from_
    weights_alone: list[Row] = [("", "--no-load-optim"), ("", "--no-load-rng")]
    rows: list[Row] = [("model.megatron" if root == run.megatron_folder else "work_dir and name", "--load", str(root))]
    if branch and root != run.checkpoints_folder:
        rows += [("train.from", "--ckpt-step", str(branch.iteration))]
        weights_alone += [("train.from", "--finetune")]  # from step 0
    if begins.iteration is None:
        return rows + weights_alone
    if run.train.script is not None:  # cptain's own leaves nothing of the checkpoint's schedule to be overridden
        rows += [("train.lr", "--override-opt_param-scheduler")]
    if not begins.same_layout:  # random states belong to a rank, and nothing here drops out; the fork would not start
        rows += [("", "--no-load-rng")]
    return rows


def megatron_flags(
    run: RunFile,
    architecture: Architecture,
    *,
    script: Path,
    steps: int,
    begins: "Beginning",
    layout: Layout,
    cpu: bool,
) -> Flags:
    """Everything that Megatron needs to know, as flags with their values; those of train.megatron_args follow.

    Args:
        run: the run.
        architecture: the model's.
        script: the training script.
        steps: optimizer steps in all.
        begins: where the training begins.
        layout: the run's, with every "auto" decided.
        cpu: whether the CPU trains, which recomputes nothing.

    Raises:
        CptainError: what Megatron cannot represent; what train.megatron_args may not hold.
    """
    rows: list[Row] = [("config.json", *flag) for flag in arguments.flags(architecture, run.parallel.tensor)]
    rows += _run_rows(run, layout, steps)
    rows += _stage_rows(architecture.num_layers, layout.pipeline)
    rows += _health_rows(run) if run.train.script is None else []
    rows += _load_rows(run, begins)
    rows += _precision_rows(run.train)
    rows += [("train.deterministic", "--deterministic-mode")] if run.train.deterministic else []
    if run.data.validation or run.data.stage:  # a validation is a round of the sets, and a run its stages, in order
        rows += [("data.validation and data.stage", "--dataloader-type", "single")]
    rows += _expert_rows(run, architecture, cpu)
    rows += _cpu_rows() if cpu else [*_gpu_rows(run, script), *_recompute_rows(layout.recompute)]
    check_megatron_args(run, rows)
    return [row[1:] for row in rows]
