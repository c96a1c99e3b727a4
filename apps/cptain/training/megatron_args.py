"""What train.megatron_args may not hold: arguments that something else says, and arguments that would do nothing.

Megatron takes the last of two equal arguments. Without this a word in megatron_args would train one thing where the run
file, the model's config.json and every record of the run say another. The lists hold the arguments of core 0.13.1,
0.19.2 and 0.20; `tests/test_megatron_args.py` walks the parser of the installed Megatron for those that they lack.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase

from cptain.errors import bad_usage
from cptain.run_file import RunFile

Row = tuple[str, ...]
"""Who says an argument ("train.lr", "config.json", or "" for a default of ours that megatron_args may override), the
flag, and its values."""

_CONFIG_JSON = "config.json"

# Other ways to say what a row says, and rows that this run does not have.
_SAID_BY = {
    _CONFIG_JSON: """
        --activation-func-clamp-value --add-qkv-bias --apply-layernorm-1p --apply-residual-connection-post-layernorm
        --attention-output-gate --cache-mla-latents --decoder-num-layers --disable-dsa-* --disable-mamba-mem-eff-path
        --disable-pad-vocab-size --dsa-* --enable-mhc-* --encoder-num-layers --experimental-attention-variant --gdp-*
        --glu-linear-offset --heterogeneous-* --hybrid-attention-ratio --hybrid-layer-pattern --hybrid-mlp-ratio
        --hybrid-override-pattern --is-hybrid-model --kv-lora-rank --linear-* --mamba-* --mhc-* --mla-*
        --moe-apply-probs-on-input --moe-ffn-hidden-size --moe-latent-size --moe-layer-* --moe-router-bias-update-rate
        --moe-router-enable-expert-bias --moe-router-group-topk --moe-router-num-groups --moe-router-pre-softmax
        --moe-router-score-function --moe-router-topk* --moe-shared-expert-* --moe-upcycling-granularity
        --moe-use-upcycling --mrope-section --mscale --mscale-all-dim --mtp-* --multi-latent-attention --mup-*
        --no-dsa-* --no-pad-vocab-size --no-position-embedding --no-rope-freq --no-yarn-* --num-experts --openai-gelu
        --padded-vocab-size --q-lora-rank --qk-head-dim --qk-l2-norm --qk-layernorm --qk-pos-emb-head-dim --quick-geglu
        --relative-attention-* --rope-scaling-factor --rope-type --rotary-interleaved --rotary-scaling-factor
        --rotary-seq-len-interpolation-factor --softmax-type --spec --squared-relu
        --untie-embeddings-and-output-weights --use-checkpoint-args --use-legacy-models
        --use-mp-args-from-checkpoint-args --use-mup --use-rope-scaling --use-rotary-position-embeddings --v-head-dim
        --vocab-extra-ids --vocab-size --window-attn-skip-freq --window-size --yarn-*
    """,
    "data.input and data.mix": """
        --data-args-path --data-path --mock-data --per-dataset-sequences-path --per-split-data-args-path
        --test-data-path --train-data-path --valid-data-path --validation-set-names
    """,
    "jobs.walltime and jobs.margin": "--exit-duration-in-mins",
    "model.tokenizer": """
        --disable-use-tokenizer-model-from-checkpoint-args --merge-file --no-use-tokenizer-model-from-checkpoint-args
        --null-tokenizer-* --tiktoken-* --tokenizer-* --vocab-file
    """,
    "parallel.expert": "--expert-model-parallel-size --expert-tensor-parallel-size",
    "parallel.tensor": "--model-parallel-size",
    "train.batch_ramp": "--rampup-batch-size --step-batch-size-schedule",
    "train.global_batch_size": "--batch-size --decrease-batch-size-if-needed",
    "train.lr": """
        --override-opt-param-scheduler --override-opt_param-scheduler --use-checkpoint-opt-param-scheduler
        --use-checkpoint-opt_param-scheduler
    """,
    "train.deterministic": "--deterministic-mode",
    "train.precision": "--bf16 --fp16 --fp4-format --fp8-format",
    "train.recompute": """
        --checkpoint-activations --recompute-activations --recompute-granularity --recompute-method
        --recompute-num-layers
    """,
    "train.keep": "--save-retain-interval",
    "train.save_interval": "--persistent-save-interval",
    "train.seq_length": "--decoder-seq-length --encoder-seq-length",
    "train.decay_steps": "--lr-decay-samples --lr-wsd-decay-iters --lr-wsd-decay-samples",
    "train.decay_style": "--lr-wsd-decay-style",
    "train.steps": "--train-samples",
    "train.weight_decay": "--end-weight-decay --start-weight-decay --weight-decay*",
    "train.warmup_steps": "--lr-warmup-fraction --lr-warmup-samples --warmup",
    "wandb": "--wandb-entity --wandb-exp-name --wandb-project",
    "work_dir and name": "--save",
}

# Would break what cptain does around Megatron, whatever the script.
_BREAKS = {
    "the run file says every argument": "--yaml-cfg",
    "a run begins with model.hf and goes on from its own last checkpoint": """
        --ckpt-step --finetune --pretrained-checkpoint
    """,
    "checkpoints are torch_dist, which train and export read": "--ckpt-format --dist-ckpt-format --use-dist-ckpt",
    # 4 layers of Llama 3.1 8B on an H100: 912 ms a step for 852, and a loss of 6.41 for 6.16 after 20 steps.
    "checkpoints and exports would hold weights rounded to fp8, and the loss falls more slowly": """
        --fp4-param-gather --fp8-param-gather
    """,
    "torchrun tells the processes their ranks": "--lazy-mpu-init --local-rank --use-mpi",
}

# What cptain's own script never reads: Megatron does so in its own scripts, in functions that this one does not call,
# or nowhere. Another train.script may read them.
_IGNORED = {
    "it makes no attention masks": """
        --create-attention-mask-in-dataloader --hybrid-context-parallel --max-seqlen-per-dp-cp-rank
    """,
    'data.documents = "masked" does what it is for': """
        --dataloader-inter-document-masking --reset-attention-mask --reset-position-ids
    """,
    "it reads documents as they were tokenized": """
        --allow-ambiguous-pad-tokens --chat-template --fim-* --mask-prob --sample-rate --sft
        --sft-tokenizer-prompt-format --short-seq-prob
    """,
    "it reads one validation set, of eval_iters batches": "--full-validation --multiple-validation-sets",
    "train.max_loss_spike judges every step": "--check-for-spiky-loss --error-injection-*",
    "it builds its data sets itself": """
        --dataloader-defer-npy-index-mmap --dataloader-fast-cache-load --mid-level-dataset-surplus --no-data-sharding
        --no-mmap-bin-files --num-dataset-builder-threads --object-storage-cache-path
    """,
    "it trains GPT models on next tokens": """
        --bert-* --biencoder-* --block-data-path --classes-fraction --data-per-class-fraction --dino-*
        --embedding-path --encoder-* --evidence-data-path --head-lr-mult --ict-* --img-h --img-w
        --indexer-* --iter-per-epoch --logits-load-* --mask-factor --mask-type --num-channels --num-classes
        --output-bert-embeddings --patch-dim --pipeline-model-parallel-split-rank --query-in-block-prob --retriever-*
        --retro-* --swin-* --titles-data-path --use-one-sent-docs --vision-*
    """,
    "it generates no text": """
        --decode-only-cuda-graphs --disable-rl-* --enable-chunked-prefill --flash-decode --grpo-* --inference-*
        --langrl-* --max-tokens-to-oom --mlp-chunks-for-prefill --moe-pad-experts-for-cuda-graph-inference
        --nccl-all-reduce-for-prefill --no-inference-* --no-rl-* --num-speculative-tokens --perform-rl-step
        --refit-method --rl-* --use-legacy-static-engine --use-same-sampling-seed-across-dp-ranks
    """,
    "Megatron's models since core 0.8 do not read it": """
        --no-scatter-gather-tensors-in-pipeline --onnx-safe --use-flash-attn --use-mcore-models
    """,
}


def _listed(table: dict[str, str]) -> Iterator[tuple[str, str]]:
    return ((pattern, says) for says, patterns in table.items() for pattern in patterns.split())


def _refusals(rows: list[Row], own_script: bool) -> Iterator[tuple[str, str]]:
    """Patterns of arguments that are refused, each with the reason."""
    yield from _listed(_BREAKS)
    for flag, owner in [*_listed(_SAID_BY), *((row[1], row[0]) for row in rows if row[0])]:
        yield flag, "the model's config.json says it" if owner == _CONFIG_JSON else f"set {owner}"
    if own_script:
        for flag, why in _listed(_IGNORED):
            yield flag, f"cptain's training script does nothing with it: {why}"


def refusal(flag: str, rows: list[Row], own_script: bool = True) -> str | None:
    """Why an argument is refused in train.megatron_args, or None.

    Args:
        flag: with its dashes, without a value.
        rows: the arguments that cptain builds for this run.
        own_script: whether cptain's script trains, not train.script.
    """
    refusals = list(_refusals(rows, own_script))
    for pattern, why in refusals:
        if fnmatchcase(flag, pattern):
            return why
    if any(flag == row[1] for row in rows):
        return None
    for pattern, why in refusals:
        if pattern.startswith(flag):  # Megatron takes no abbreviations; this one would be of what is refused
            return f"Megatron has no such argument; {pattern}: {why}"
    return None


def check_megatron_args(run: RunFile, rows: list[Row]) -> None:
    """Refuse arguments that the run file or config.json says, and those that would do nothing.

    Args:
        run: the run.
        rows: the arguments that cptain builds for it.

    Raises:
        CptainError: exit status 2, naming the argument and where to say it.
    """
    for word in run.train.megatron_args:
        flag = word.partition("=")[0]
        if flag.startswith("--") and (why := refusal(flag, rows, own_script=run.train.script is None)):
            bad_usage(f"train.megatron_args: {flag}: {why}")
