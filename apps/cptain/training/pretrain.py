"""The training script that torchrun starts: GPT pre-training over megatron.training and megatron.core.

It takes Megatron's own arguments and runs with the fork (core 0.13.1), with upstream and with PyPI's megatron-core.
Megatron's `pretrain` came with two interfaces: a model provider alone until 0.16, a container of configs beside it
since 0.17; `_train` knows both. What every rank needs of a batch is broadcast as one tensor, so that none of Megatron's
own batch functions, which change from release to release, is needed.

    torchrun … pretrain.py [--cpu] --blend FILE --max-loss-spike NATS --step-timeout SECONDS [--validation-sets FILE]
        [--z-loss Z] [--batch-ramp JSON] --megatron-args N MEGATRON ARGUMENTS

The last N words are the run file's train.megatron_args, which have yet to be looked at by the Megatron at hand.

Exit status: 0 where training stopped as Megatron means it to (finished, a deadline, a signal), 1 where it gave up, with
the reason as the last line. How far it came is in the checkpoint's tracker.
"""

import argparse
import functools
import gc
import inspect
import itertools
import json
import os
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # and not in Megatron's spawned children, which come no further
    gc.disable()  # until all is imported: of what stays, the collector's looks took an eighth of a rank's CPU

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from cptain.batches import Ramp, sequences
from cptain.megatron import cross_entropy, no_tokenizer, saving, weight_gradient
from cptain.megatron.importing import before_import, import_megatron
from cptain.megatron.layers import gpt_layer
from cptain.megatron.unread_arguments import unread
from cptain.processes import end
from cptain.training import batch_ramp, order, packing, resumed_optimizer, validation
from cptain.training.documents import Documents, File, same_blend
from cptain.training.health import Health
from cptain.training.ledger import Ledger
from cptain.training.sequences import data_set_class

CPU = "--cpu" in sys.argv
before_import(CPU)  # here, not in main: Megatron's spawned children import this module and no more

Batch = dict[str, torch.Tensor]
_validation_sets: list[validation.Named] = []  # of --validation-sets, the same on every rank
_blend_content: dict[str, Any] = {}  # of --blend
_ramp: list[Ramp] = []  # of --batch-ramp, where there is one


def _masks_documents() -> bool:
    return bool(_blend_content["documents"] == "masked")


def _model_provider(pre_process: bool = True, post_process: bool = True, *, z_loss: float, **more: Any) -> Any:
    """Megatron's GPTModel for this pipeline stage, from Megatron's arguments, with cptain's loss."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    spec = gpt_layer(
        args.transformer_impl == "transformer_engine",
        qk_layernorm=args.qk_layernorm,
        num_experts=args.num_experts,
        moe_grouped_gemm=args.moe_grouped_gemm,
    )
    config = more.pop("config", None) or core_transformer_config_from_args(args)
    accepted = inspect.signature(GPTModel.__init__).parameters
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        **{name: value for name, value in more.items() if name in accepted},
    )
    model.compute_language_model_loss = functools.partial(cross_entropy.language_model_loss, z_loss=z_loss)
    return model


def _batch(iterator: Iterator[Batch] | None) -> tuple[Any, ...]:
    """Tokens, position ids, labels and loss mask of this rank, each [micro batch, sequence / context parallel size];
    where documents are masked each [1, all of it] and then Megatron's PackedSeqParams, else None.

    Tensor-parallel rank 0 reads; the four travel to its peers as one int64 tensor, since a loss mask is 0 or, of what
    counts, 1 or the number of a domain or a validation set, negative where it is not trained on.
    """
    from megatron.core import parallel_state
    from megatron.training import get_args

    args = get_args()
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        assert iterator is not None
        data = next(iterator)
        packed = torch.stack(
            [data["tokens"], data["position_ids"], data["labels"], data["loss_mask"].to(torch.int64)]
        ).cuda(non_blocking=True)
    else:
        packed = torch.empty((4, args.micro_batch_size, args.seq_length), dtype=torch.int64, device="cuda")
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            packed,
            parallel_state.get_tensor_model_parallel_src_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
    if _masks_documents():
        packed, documents = packing.packed(packed)
        return *packed.unbind(), documents
    if (size := parallel_state.get_context_parallel_world_size()) > 1:
        # A causal mask makes late tokens dear: a rank gets one early and one late chunk of 2 × size, as Megatron's
        # attention expects.
        rank = parallel_state.get_context_parallel_rank()
        chunks = packed.chunk(2 * size, dim=2)
        packed = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=2)
    return *packed.unbind(), None


_ledger: list[Ledger] = []  # of the domains that --blend names


def _loss(
    loss_mask: torch.Tensor, validates: bool, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The sum of the losses that count, how many they are, and both for the log, of each validation set too.

    Megatron divides the first two and takes the mean over all ranks. Those of a context-parallel group may count
    different numbers of tokens, so the sum is weighted to give the mean over the tokens of all of them.
    """
    from megatron.core import parallel_state

    numbers, losses = loss_mask.view(-1), losses.view(-1).float()
    mask = (numbers > 0).float()
    loss = torch.sum(losses * mask)
    tokens = mask.sum().to(torch.int)
    names = [one.name for one in _validation_sets] if validates else []
    if not validates:
        _ledger[0].add(losses.detach(), numbers)
    by_set = validation.loss_by_set(losses.detach(), numbers, names)
    logged = {"lm loss": torch.stack([loss.detach(), tokens.to(loss.dtype)]), **by_set}
    if (size := parallel_state.get_context_parallel_world_size()) > 1:
        of_all = tokens.clone()
        torch.distributed.all_reduce(of_all, group=parallel_state.get_context_parallel_group())
        loss = loss * (tokens * size / of_all.clamp(min=1))
    return loss, tokens, logged


def _looks_at_batches() -> bool:
    """Whether this rank's pipeline stage looks at a batch: the first and the last do, and each where attention has to
    know the documents."""
    from megatron.core import parallel_state

    if _masks_documents():
        return True
    first, last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
    return bool(first(ignore_virtual=True) or last(ignore_virtual=True))


def _reads_data() -> bool:
    """Whether this rank reads the data, which its tensor-parallel peers get from it."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_rank() == 0 and _looks_at_batches()


def _forward_step(iterator: Iterator[Batch] | None, model: Any, *_: Any) -> Any:
    """One micro batch through this pipeline stage."""
    tokens, position_ids, labels, loss_mask, documents = _batch(iterator) if _looks_at_batches() else (None,) * 5
    # No mask: causal attention makes its own.
    output = model(tokens, position_ids, None, labels=labels, packed_seq_params=documents)
    return output, lambda losses: _loss(typing.cast(torch.Tensor, loss_mask), not model.training, losses)


def _blend(
    weighted: list[tuple[float, File]], bounds: tuple[float, float], numbers: dict[str, int]
) -> list[tuple[float, Documents]]:
    """What of the files lies between two fractions of each, by weight; files without a part in it are left out."""
    blend = []
    for weight, files in same_blend(weighted):
        if parts := [(file, file.part(bounds)) for file in files if file.part(bounds)]:
            blend.append((weight, Documents(parts, numbers)))
    return blend


def _datasets(samples: Any, vp_stage: int | None = None) -> list[Any]:
    """Train, validation and test datasets, from the blend that --blend names (`cptain.data.blend_file`).

    Every file is cut as --split says, and each split is built from the files that have a part in it: Megatron alone
    never returns from a file so small that its part is empty.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.training import get_args
    from megatron.training.global_vars import get_tokenizer

    args = get_args()
    for ramp in _ramp:
        samples = (sequences(ramp, args.global_batch_size, args.train_iters), *samples[1:])
    weighted = [(weight, File(prefix)) for weight, prefix in _blend_content["files"]]
    built: dict[str, Documents] = {}
    numbers = order.numbers_of(_blend_content)

    class Sequences(data_set_class(_blend_content)):  # type: ignore[misc]
        @staticmethod
        def build_low_level_dataset(dataset_path: str, config: Any) -> Documents:
            return built[dataset_path]

    def config(prefixes: list[str], weights: list[float] | None, place: int) -> Any:
        return GPTDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            blend=(prefixes, weights),
            split=",".join("1" if split == place else "0" for split in range(3)),
            path_to_cache=args.data_cache_path,
            tokenizer=get_tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=args.eod_mask_loss,
            create_attention_mask=False,
        )

    def data_set(parts: list[Documents], weights: list[float] | None, place: int, counts: Any) -> Any:
        """So many sequences of a blend, as the `place`-th of Megatron's three data sets."""
        built.update({documents.path_prefix: documents for documents in parts})
        blend = config([documents.path_prefix for documents in parts], weights, place)
        return BlendedMegatronDatasetBuilder(Sequences, counts, _reads_data, blend).build()[place]

    datasets: list[Any] = []
    ends = list(itertools.accumulate((float(part) for part in args.split.split(",")), initial=0.0))
    for place in range(3):
        if place and not args.eval_iters:
            datasets.append(None)
            continue
        if place == 1 and _validation_sets:
            datasets.append(
                validation.build(_validation_sets, args, lambda one, count: data_set([one], None, 1, [count] * 3))
            )
            continue
        bounds = (ends[place] / ends[3], ends[place + 1] / ends[3])
        if place == 0 and "stages" in _blend_content:
            datasets.append(order.build(_blend_content, args, bounds, config(["stages"], None, 0), _reads_data()))
            continue
        blend = _blend(weighted, bounds, numbers)
        if not blend:
            if place == 0:
                raise ValueError(f"no file is long enough to have a training part by --split {args.split}")
            if place == 1:
                args.eval_iters = 0  # Megatron would ask the missing data set for a batch
            datasets.append(None)
            continue
        weights, parts = zip(*blend, strict=True)
        datasets.append(data_set(list(parts), list(weights), place, samples))
    return datasets


_datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank calls it; _reads_data decides


def _refuse_unread(words: list[str]) -> None:
    """Arguments that would change nothing; one process of a node looks for all."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and (flags := unread(words, Path(__file__))):
        raise ValueError(f"{', '.join(flags)}: this Megatron takes it and reads it nowhere")


def _log_every_step_by_itself() -> None:
    """What core 0.19 logs at the second step of a start is the mean of the first two (0.13 does not)."""
    from megatron.training import training

    log = training.training_log
    if "is_first_iteration" in inspect.signature(log).parameters:
        training.training_log = lambda *args, **kwargs: log(*args, **{**kwargs, "is_first_iteration": False})


def _set_clock() -> None:
    """Let the minutes of --exit-duration-in-mins end at CPTAIN_DEADLINE, seconds since the epoch.

    Megatron would count them from the moment this process imported it, which the slowest node's start puts off.
    """
    from megatron.training import training

    if (deadline := os.environ.get("CPTAIN_DEADLINE")) and "--exit-duration-in-mins" in sys.argv:
        minutes = int(sys.argv[sys.argv.index("--exit-duration-in-mins") + 1])
        training._TRAIN_START_TIME = float(deadline) - 60 * minutes


def _train(health: Health, words: list[str], z_loss: float) -> None:
    """Train until Megatron stops; `words` are the run file's train.megatron_args."""
    if not CPU:
        weight_gradient.install()
    import_megatron(CPU)
    _refuse_unread(words)
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    gc.freeze()
    gc.enable()
    no_tokenizer.install()
    saving.install()
    resumed_optimizer.install()
    for ramp in _ramp:
        batch_ramp.install(ramp)
    health.install()
    _ledger[0].install()
    if _masks_documents():
        packing.install()
    if _validation_sets:
        validation.install()
    _log_every_step_by_itself()
    _set_clock()
    model_provider = functools.partial(_model_provider, z_loss=z_loss)
    if "cfg_container" in inspect.signature(pretrain).parameters:
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        container = pretrain_cfg_container_from_args(parse_and_validate_args())
        pretrain(container, _datasets, ModelType.encoder_or_decoder, _forward_step, model_provider=model_provider)
    else:
        pretrain(_datasets, model_provider, ModelType.encoder_or_decoder, _forward_step)


def _say_peak() -> None:
    """The most memory that this rank had allocated, as Megatron writes it: after the first step, which some releases
    alone log, Adam's moments are not there yet."""
    peak, reserved = torch.cuda.max_memory_allocated() / 2**20, torch.cuda.max_memory_reserved() / 2**20
    rank = os.environ.get("RANK", "0")
    print(f"[Rank {rank}] (at the end) memory (MB) | max allocated: {peak:.2f} | max reserved: {reserved:.2f}")


def _stopped_as_asked() -> bool:
    """Whether training got so far that Megatron's own exit, if any, is a stop and not a failure to start."""
    from megatron.training import get_args

    # The iteration counts a step only when the next one begins; the samples do when it ends.
    return any(getattr(get_args(), name, 0) for name in ("curr_iteration", "iteration", "consumed_train_samples"))


@record  # type: ignore[untyped-decorator]
def main() -> None:
    """Train; where Megatron calls sys.exit, look at whether it had a right to."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--blend", type=Path, required=True)
    parser.add_argument("--max-loss-spike", type=float, required=True)
    parser.add_argument("--step-timeout", type=float, required=True)
    parser.add_argument("--megatron-args", type=int, required=True)
    parser.add_argument("--validation-sets", type=Path)
    parser.add_argument("--z-loss", type=float, default=0.0)
    parser.add_argument("--batch-ramp", type=json.loads)
    own, sys.argv[1:] = parser.parse_known_args()
    words = sys.argv[len(sys.argv) - own.megatron_args :]
    health = Health(own.max_loss_spike, own.step_timeout, own.cpu)
    _blend_content.update(json.loads(own.blend.read_text(encoding="utf-8")))
    _ledger.append(Ledger([part["name"] for part in _blend_content.get("parts", ())]))
    if own.batch_ramp:
        _ramp.append(own.batch_ramp)
    if own.validation_sets:
        _validation_sets.extend(validation.read_sets(own.validation_sets))
    try:
        if CPU:
            from cptain.megatron.cpu import CudaToCpu

            with CudaToCpu():
                _train(health, words, own.z_loss)
        else:
            try:
                _train(health, words, own.z_loss)
            finally:
                _say_peak()
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise
        if not _stopped_as_asked():
            raise RuntimeError("Megatron gave up before the first step; its log says why") from stop


if __name__ == "__main__":
    main()
    if CPU:
        end(0)
