"""What of a run that has begun may change: what is refused, and what the user should know of the rest.

Megatron counts in sequences how far a run is, and shuffles them anew where it needs another number of epochs of them.
The rates, their schedule, steps and the optimizer's own settings may change (`cptain.training.resumed_optimizer`).
"""

import math
from typing import Any

from cptain.data.blend import blend
from cptain.data.manifest import Record, read_manifest
from cptain.data.split import training_tokens
from cptain.data.steps import asked_steps
from cptain.errors import bad_usage
from cptain.run_file import RunFile
from cptain.run_train import HOW_LONG
from cptain.toml_file import shown
from cptain.training.documents import File, same_blend

# Megatron asks each part of a blend for so many more sequences than its share (mid_level_dataset_surplus, a constant in
# core 0.13), and shuffles a last epoch apart of which it needs less than this.
_SURPLUS = 0.005
_LAST_EPOCH_APART = 0.8

_ORDER_KEYS = ("input", "tokenized", "mix", "split")  # of [data]
_COUNTED = "how far it is in its schedule and its data is counted in sequences"
_ORDER_ARG = "--dataloader-type"
_ANEW = "the order of the data begins anew: some sequences come again and others are left out"


def check_changes(before: dict[str, Any], run: RunFile) -> list[str]:
    """Compare a run with its last start.

    Args:
        before: the resolved run file of the last start, as `RunFile.model_dump(mode="json", exclude_none=True)`.
        run: the run, about to resume.

    Returns:
        A line for each change with a consequence that the run file does not show.

    Raises:
        CptainError: exit status 2, a change that a run that has begun cannot take.
    """
    after = run.model_dump(mode="json", exclude_none=True)
    for key, why in (
        ("global_batch_size", _COUNTED),
        ("batch_ramp", _COUNTED),
        ("seq_length", "its data is cut into sequences of this length"),
    ):
        old = before["train"].get(key, [])  # batch_ramp was not there always
        _refuse_change(f"train.{key}", old, after["train"][key], why)
    if (before["train"]["precision"] == "fp32") != (run.train.precision == "fp32"):
        why = "the optimizer's state of fp32 is not that of bf16 and fp8"
        _refuse_change("train.precision", before["train"]["precision"], run.train.precision, why)
    old = before["parallel"].get("expert", 1)
    if (old > 1) != (run.parallel.expert > 1):
        why = "where experts are shared out, Megatron saves an optimizer of their own, else one of all"
        _refuse_change("parallel.expert", old, run.parallel.expert, why)
    lines = []
    staged = bool(run.data.stage and before["data"].get("stage"))  # what was seen stays: cptain.data.trained_on
    for key in () if staged else _ORDER_KEYS:
        if (old := _nameless(before["data"].get(key, []))) != (new := _nameless(after["data"][key])):
            lines.append(f"data.{key}: {shown(old)} → {shown(new)}: {_ANEW}")
    if (old := before["train"].get("seed", run.train.seed)) != run.train.seed:
        lines.append(f"train.seed: {old} → {run.train.seed}: {_ANEW}")
    old, new = (_argument(_ORDER_ARG, document["train"].get("megatron_args", ())) for document in (before, after))
    if old != new:
        lines.append(f"{_ORDER_ARG}: {old or 'default'} → {new or 'default'}: {_ANEW}")
    return lines or ([] if staged else _other_epochs(before, run))


def _nameless(value: Any) -> Any:
    """[[data.mix]] without the names of its tables, which change nothing."""
    tables = isinstance(value, list) and all(isinstance(one, dict) for one in value)
    return [{key: one[key] for key in one if key != "name"} for one in value] if tables else value


def _refuse_change(key: str, old: Any, new: Any, why: str) -> None:
    if old != new:
        bad_usage(
            f"{key}: {shown(old)} → {shown(new)}: a run that has begun keeps it ({why}): set it back, or export the "
            "run and begin another with that as model.hf"
        )


def _argument(flag: str, words: Any) -> str | None:
    """The last value of a flag among Megatron's arguments."""
    value = None
    for place, word in enumerate(words):
        if word == flag:
            value = words[place + 1] if place + 1 < len(words) else None
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def _other_epochs(before: dict[str, Any], run: RunFile) -> list[str]:
    """The line for a change of steps that lets Megatron shuffle other epochs together; none where it does not."""
    records = read_manifest(run.data_folder, run.data.sources)
    length = {key: before["train"].get(key) for key in HOW_LONG}
    earlier = run.model_copy(update={"train": run.train.model_copy(update=length)})
    old, new = (asked_steps(one, records)[0] for one in (earlier, run))
    if old == new:
        return []
    parts = [] if run.data.stage else _parts(run, records)  # Megatron's order has become another one, as was accepted
    if not parts:
        return []
    old_epochs, new_epochs = ([epochs(tokens, share, run, n) for share, tokens in parts] for n in (old, new))
    if old_epochs == new_epochs:
        return []
    most = max(range(len(parts)), key=lambda part: new_epochs[part])
    used = [run.train.tokens_seen(n) * parts[most][0] / parts[most][1] for n in (old, new)]
    return [f"steps: {old} → {new} ({used[0]:.2f} → {used[1]:.2f} epochs of its data): {_ANEW}"]


def _parts(run: RunFile, records: list[Record]) -> list[tuple[float, int]]:
    """Share and training tokens of each part of the blend, as `cptain.training.pretrain` builds them."""
    weighted = blend(run.data.mix, records)
    of_prefix = {str(run.data_folder / record.prefix): record for _, record in weighted}
    parts = []
    for weight, members in same_blend([(weight, File(str(run.data_folder / one.prefix))) for weight, one in weighted]):
        of_part = [of_prefix[file.prefix] for file in members]
        if tokens := training_tokens(run.data_folder, of_part, run.data.split):
            parts.append((weight, tokens))
    total = sum(weight for weight, _ in parts)
    return [(weight / total, tokens) for weight, tokens in parts]


def epochs(tokens: int, share: float, run: RunFile, steps: int) -> tuple[int, bool]:
    """How many epochs of a part Megatron shuffles, and whether the last of them apart from the others.

    These two, beside the documents and the seed, are all that its order depends on (core 0.13 to 0.20,
    `GPTDataset._build_document_sample_shuffle_indices`).

    Args:
        tokens: of the part's training documents.
        share: of the part in the blend.
        run: the run.
        steps: in all.
    """
    seq_length = run.train.seq_length
    wanted = math.ceil(math.ceil(run.train.sequences(steps) * share) * (1 + _SURPLUS))
    number = max(1, math.ceil((wanted * seq_length + 1) / tokens))
    if number == 1:
        return 1, False
    of_last = wanted - ((number - 1) * tokens - 1) // seq_length
    return number, of_last < int(_LAST_EPOCH_APART * ((tokens - 1) // seq_length))
