"""Why an argument of a script has no key in the run file: one table, for the mapping and for what differs after it."""

from fnmatch import fnmatchcase

CONVERTS = (
    "this start converts a checkpoint and trains nothing: cptain export does that, from the run's own checkpoints"
)

_REASONS = {
    CONVERTS: "--ckpt-convert-* --ckpt-step",
    'speed and memory alone: train.recompute = "auto" recomputes what a GPU\'s memory asks for': """
        --recompute-activations --recompute-granularity --recompute-method --recompute-num-layers --recompute-modules
        --checkpoint-activations --distribute-saved-activations
    """,
    "the architecture comes from the model's config.json, and nothing from a checkpoint's arguments": """
        --use-checkpoint-args --use-mp-args-from-checkpoint-args --no-use-tokenizer-model-from-checkpoint-args
    """,
    "a run begins with the model that cptain convert makes of model.hf, and goes on from its own checkpoints": """
        --load --no-load-optim --no-load-rng --finetune --pretrained-checkpoint --exit-on-missing-checkpoint
        --auto-detect-ckpt-format --override-opt_param-scheduler --use-checkpoint-opt_param-scheduler
    """,
    "checkpoints lie in the run's folder, as torch_dist": """
        --save --ckpt-format --dist-ckpt-format --use-dist-ckpt --ckpt-fully-parallel-save
        --ckpt-assume-constant-structure --dist-ckpt-optim-fully-reshardable
    """,
    "cptain logs every step, to logs/metrics.jsonl, TensorBoard and W&B": """
        --log-interval --log-throughput --log-progress --log-params-norm --log-num-zeros-in-grad --log-timers-*
        --log-memory-* --log-validation-* --log-world-size-* --log-learning-rate-* --log-loss-scale-* --log-batch-size-*
        --no-log-* --tensorboard-* --timing-log-* --wandb-save-dir --wandb-id --one-logger-*
        --enable-one-logger --logging-level --log-params-norm --eval-micro-batch-size
    """,
    "torchrun starts one process a GPU, on every node": """
        --use-mpi --local-rank --lazy-mpu-init --rank --world-size --distributed-backend --distributed-timeout-minutes
        --nccl-communicator-config-path
    """,
    "Megatron's models since core 0.8 do not read it": """
        --use-flash-attn --use-mcore-models --no-scatter-gather-tensors-in-pipeline --onnx-safe --use-flash-attn-*
    """,
    "a kernel that a SwiGLU model with Transformer Engine has no use for": """
        --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-bias-swiglu-fusion
        --no-rope-fusion --no-persist-layer-norm --bias-gelu-fusion
    """,
    "speed alone: cptain's own choice": """
        --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --overlap-p2p-communication
        --sequence-parallel --num-workers --manual-gc --manual-gc-interval --attention-backend --transformer-impl
        --no-gradient-accumulation-fusion --cross-entropy-loss-fusion --cross-entropy-fusion-impl
        --no-create-attention-mask-in-dataloader --create-attention-mask-in-dataloader --align-grad-reduce
        --align-param-gather --moe-grouped-gemm --moe-token-dispatcher-type --moe-permute-fusion
        --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --use-cpu-initialization
    """,
    "the router's product is in fp32: in bf16, experts that are nearly alike change places": "--moe-router-dtype",
    "the loss of every step is judged by train.max_loss_spike": """
        --no-check-for-nan-in-loss-and-grad --rerun-mode --check-for-spiky-loss --check-for-large-grads
    """,
    "the weights come from model.hf, and none is drawn": """
        --init-method-std --init-method-xavier-uniform --no-initialization --perform-initialization
    """,
    "the model's config.json says it, in the forks' own words": """
        --rope-theta --rope-factor --rope-low-freq-factor --rope-high-freq-factor
        --rope-original-max-positional-embeddings
    """,
    "it measures speed: cptain names slow ranks by itself, and logs tokens a second": """
        --profile* --torch-profile* --use-pytorch-profiler --log-straggler --disable-straggler-on-startup --straggler-*
    """,
    "it is for fp16 alone": "--initial-loss-scale --min-loss-scale --loss-scale --loss-scale-window --hysteresis",
    "training stops by jobs.walltime and jobs.margin": """
        --exit-signal-handler --exit-duration-in-mins --exit-interval --exit-signal
    """,
    "the index files of the data sets lie in the run's folder": "--data-cache-path",
    "cptain itself sends W&B the numbers, by wandb.project and the run's name": """
        --wandb-project --wandb-entity --wandb-exp-name --wandb-name --wandb-offline
    """,
    "data.tokenized, data.mix and data.validation say it": """
        --data-path --data-args-path --train-data-path --valid-data-path --test-data-path --per-split-data-args-path
    """,
    "model.hf says it": "--tokenizer-model --tokenizer-type --vocab-file --merge-file --tokenizer-hf-*",
}


def reason(flag: str) -> str | None:
    """Why an argument is no key, or None."""
    return next(
        (why for why, patterns in _REASONS.items() for pattern in patterns.split() if fnmatchcase(flag, pattern)), None
    )
