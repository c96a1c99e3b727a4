"""What of a run would be refused, and what would be wrong without a word, as far as its files and its own logs show."""

import math
import os
from pathlib import Path
from typing import Any

from cptain.checkpoint.tracker import TRACKER
from cptain.data.vocabulary import extension_of, read_extension, run_architecture
from cptain.doctor.checks import Found, Subject, fail, ok, warn
from cptain.errors import CptainError, one_line
from cptain.history import read_history, stretches
from cptain.run_file import RunFile
from cptain.run_train import Train
from cptain.scheduling.before_queue import check_before_queue
from cptain.scheduling.render import check_on_site, image_of
from cptain.toml_file import validate
from cptain.training.metrics import metrics_file, read_metrics
from cptain.training.start import beginning

_FIRST = 5  # steps that still show what a training began with
_NEAR = 0.9  # of ln V: what a trained model loses on any text is far below it
_RATE = 1e-3  # of a rate: Megatron logs six digits
_LOOKED_AT = 1 << 28  # bytes of ids: a second's reading
# Optimizer states that any layout loads (core 0.13 to 0.20); the others are cut as the layout was.
_HOW_CUT = ("distrib_optim_sharding_type", "param_state_sharding_type")  # of a checkpoint's common state
_ANY_LAYOUT = ("fully_sharded_model_space", "fully_reshardable")


def _run(subject: Subject) -> RunFile:
    assert subject.run is not None
    os.environ["HF_HUB_OFFLINE"] = "1"  # a check downloads no model
    return subject.run


def site(subject: Subject) -> Found:
    """What `cptain jobs` would refuse."""
    run = _run(subject)
    if subject.site is None:
        return ok("no site was given")
    check_on_site(run, subject.site, subject.site_name)
    if lines := check_before_queue(run, subject.site, Path(image_of(run))):
        return warn("; ".join(lines), "cptain doctor where these disks are seen, such as in a job: submit.sh doctor")
    return ok(f"{subject.site_name}: {subject.site}")


def _not_made(run: RunFile) -> dict[str, str]:
    """What a training reads and no stage has made yet, with the stage that makes it."""
    begun = run.train.from_ or any(run.checkpoints_folder.glob("iter_*"))
    return {
        what: stage
        for what, stage, there in (
            ("the data", "preprocess", _has_manifest(run)),
            ("the converted checkpoint", "convert", begun or (run.megatron_folder / TRACKER).exists()),
        )
        if not there
    }


def _has_manifest(run: RunFile) -> bool:
    """Whether the run's data is made."""
    return (run.data_folder / "manifest.json").exists()


def train(subject: Subject) -> Found:
    """What `train` would refuse; nothing is written."""
    from cptain.training.prepare import prepare

    run = _run(subject)
    if missing := _not_made(run):
        means = f"{' and '.join(missing)} not made yet: what train would say of them is not known"
        return warn(means, "; ".join(f"cptain {stage} RUN" for stage in missing.values()))
    if run.model.vocabulary:
        made, wanted = read_extension(run.folder / "tokenizer"), extension_of(run)
        if made is None or wanted is None or made.tokenizer != wanted.tokenizer:
            return fail("the tokenizer of [model.vocabulary] is not made yet", "cptain preprocess RUN")
    on_cpu = subject.site is not None and subject.site.gpus == 0
    command = prepare(run, cpu=on_cpu, dry_run=True, write=False)
    if command.start > command.steps:
        return fail(f"train.steps = {command.steps}: the run is at step {command.start}, beyond it", "more train.steps")
    return ok(f"goes from step {command.start:,} to {command.steps:,}; cptain train RUN --dry-run says with what")


def begins_at_random(subject: Subject) -> Found:
    """A model that knows nothing gives every token of V the same chance: its loss is ln V."""
    run = _run(subject)
    metrics = read_metrics(metrics_file(run))
    first = [values["loss"] for step, values in metrics.items() if step <= _FIRST and "loss" in values]
    if not first:
        return ok("no first step in the run's logs yet")
    vocabulary = run_architecture(run, ["config.json"]).vocab_size
    limit = math.log(vocabulary)
    if max(first) > _NEAR * limit:
        means = f"the loss began at {max(first):.2f}, and ln {vocabulary:,} = {limit:.2f} is that of random weights"
        return warn(
            means, "cptain verify --logits MODEL <run>/megatron, before more is trained; is the tokenizer its own?"
        )
    return ok(f"the loss began at {max(first):.2f}; ln {vocabulary:,} = {limit:.2f} would be a random model's")


def padded_rows(subject: Subject) -> Found:
    """Ids beyond the vocabulary train rows of padding, which export cuts off."""
    from cptain.data.indexed_dataset import ids_over
    from cptain.data.manifest import read_manifest

    run = _run(subject)
    if not _has_manifest(run):
        return ok("no data is made yet")
    size = run_architecture(run, ["config.json"]).vocab_size
    pairs = [run.data_folder / record.prefix for record in read_manifest(run.data_folder, run.data.sources)]
    over, looked = ids_over([pair for pair in pairs if pair.with_name(pair.name + ".bin").is_file()], size, _LOOKED_AT)
    if over:
        means = f"{over:,} of {looked:,} tokens of {run.data_folder} have no row among the model's {size:,}"
        return fail(means, "model.tokenizer = the model's own, and cptain preprocess RUN --force")
    return ok(f"of {looked:,} tokens none is over the model's {size:,} rows")


def _kinds(content: Any) -> list[Any]:
    """Every word on how the optimizer's state is cut, in nested dicts and lists."""
    if isinstance(content, dict):
        own = [content[key] for key in _HOW_CUT if key in content]
        return own + [kind for one in content.values() for kind in _kinds(one)]
    return [kind for one in content for kind in _kinds(one)] if isinstance(content, list) else []


def optimizer(subject: Subject) -> Found:
    """Whether the state that is resumed can be cut for the layout that is asked."""
    from cptain.checkpoint.common_state import saved_arguments
    from cptain.checkpoint.torch_dist import TorchDistReader

    run = _run(subject)
    if "the converted checkpoint" in _not_made(run):
        return ok("it begins anew")
    begins = beginning(run, run_architecture(run))
    if begins.iteration is None:
        return ok("it begins anew")
    with TorchDistReader(begins.source) as reader:
        arguments, kinds = saved_arguments(reader.common), _kinds(reader.common)
    cut = [kind for kind in kinds if kind not in _ANY_LAYOUT]
    saved = {key: arguments.get(f"{key}_model_parallel_size") for key in ("tensor", "pipeline")}
    if begins.same_layout or not cut:
        return ok("of the same layout" if begins.same_layout else "of another layout, in a form that any loads")
    as_saved = ", ".join(f"parallel.{key} = {size}" for key, size in saved.items())
    means = f"{begins.source} has the optimizer's state as {cut[0]}, which loads at {as_saved} alone"
    return fail(
        means, f"{as_saved}; or save once more at these with --dist-ckpt-optim-fully-reshardable in train.megatron_args"
    )


def masks(subject: Subject) -> Found:
    """Masks that are asked for and make no difference."""
    run = _run(subject)
    asked = [word for word in run.train.megatron_args if word.partition("=")[0] == "--reset-attention-mask"]
    if asked:  # only another train.script gets as far as this
        means = "--reset-attention-mask does nothing under Transformer Engine: tokens see the documents before theirs"
        return warn(means, 'leave it out, or train with data.documents = "masked" and without train.script')
    return ok("none is asked for that would be ignored")


def rate_at(train: Train, steps: int, step: int) -> float:
    """The learning rate after a step, as Megatron's OptimizerParamScheduler has it (the tests hold this against it).

    Args:
        train: the run file's.
        steps: of the run, in all.
        step: from 1.
    """
    warmup, decay = train.warmup(steps), train.decay(steps)
    if step <= warmup:
        return train.lr * step / warmup
    if train.schedule == "constant":
        return train.lr
    begin = steps - decay if train.schedule == "wsd" else warmup
    if step > begin + decay:
        return train.min_lr
    done = max(0.0, (step - begin) / decay)
    style = (train.decay_style or "linear") if train.schedule == "wsd" else train.schedule
    left = {
        "linear": 1 - done,
        "cosine": (math.cos(math.pi * done) + 1) / 2,
        "minus_sqrt": 1 - math.sqrt(done),
        "exponential": 2 * math.pow(0.5, done) - 1,
    }[style]
    return train.min_lr + left * (train.lr - train.min_lr)


def learning_rate(subject: Subject) -> Found:
    """The rates that were logged against the schedule that each start of training was given."""
    run = _run(subject)
    logged = {
        step: one["learning_rate"] for step, one in read_metrics(metrics_file(run)).items() if "learning_rate" in one
    }
    looked = 0
    for start, first, last in stretches(read_history(run.folder), max(logged, default=0)):
        try:
            asked = validate(RunFile, start.run, run.folder / "history.jsonl").train
        except CptainError as error:  # of a run file that another release wrote
            means = f"steps {first:,} to {last:,} are of another release, and not compared: {one_line(error)}"
            return warn(means, "cptain doctor of the release that trained them (provenance.json)")
        if any(word.startswith("--lr-warmup-init") for word in asked.megatron_args):
            first = max(first, asked.warmup(start.steps) + 1)  # it begins elsewhere than at 0
        for step in sorted(step for step in logged if first <= step <= last):
            looked += 1
            expected = rate_at(asked, start.steps, step)
            if not math.isclose(logged[step], expected, rel_tol=_RATE, abs_tol=_RATE * asked.lr * 1e-3):
                means = f"step {step:,} had {logged[step]:.4g}, where the run file's schedule says {expected:.4g}"
                remedy = (
                    f"cptain train RUN --dry-run shows what Megatron is told; begin again from a step before {step:,}"
                )
                return fail(means, remedy)
    return ok(f"as the schedule says at {looked:,} steps" if looked else "no step in the run's logs yet")
