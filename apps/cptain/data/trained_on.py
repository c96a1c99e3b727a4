"""What a run trains on, as a small value that its history keeps, so that a resume on other data is noticed."""

import hashlib
import json
from typing import Any

from cptain.data.blend import blend
from cptain.data.manifest import Record
from cptain.data.stages import StageOf, identity, parts_to_train, seen_by, stages
from cptain.run_file import RunFile
from cptain.run_train import Train

_COUNTED = ("files", "documents", "tokens")


def trained_on(run: RunFile, records: list[Record], steps: int) -> dict[str, Any]:
    """The files that have tokens, their blend and their split.

    Args:
        run: the run.
        records: of its data.
        steps: in all.

    Returns:
        What JSON keeps as it is: "files", "documents", "tokens", "tokenized" (those of data.tokenized), "split",
        "masked" (whether documents are), "mix" ("tokens", "uniform", or the weight or the repeats of each table's
        glob), "tokenizer" (its hash), and "sha256" over the split and the prefix, content, tokens and weight of every
        file: where that is equal, it is the same training data in the same proportions.
        Where the mix is of tables, "seen": the tokens of each and its share in the stages that begin after so many
        steps. With [[data.stage]] "order" besides: what each part's order is made of, by its name.
    """
    blended = blend("tokens" if run.data.stage else run.data.mix, records)
    lines = [run.data.split]
    whole = sum(weight for weight, _ in blended)
    lines += [
        json.dumps([record.kept_name, record.sha256, record.tokens, f"{weight / whole:.9g}"])
        for weight, record in blended
    ]
    mix = run.data.mix
    more: dict[str, Any] = {}
    if not isinstance(mix, str):
        found = parts_to_train(run, records)
        plans = [[plan.begin, [float(f"{share:.9g}") for share in plan.shares]] for plan in stages(run, found, steps)]
        more["seen"] = {"tokens": [tokens for _, tokens in found], "stages": plans}
        if run.data.stage:
            more["order"] = {part.name: identity(part, run.data.split) for part, _ in found}
    return {
        "files": len(blended),
        "documents": sum(record.documents for _, record in blended),
        "tokens": sum(record.tokens for _, record in blended),
        "tokenized": sum(record.tokens for _, record in blended if record.is_tokenized),
        "split": run.data.split,
        "masked": run.data.documents == "masked",
        "mix": mix
        if isinstance(mix, str)
        else {part.input: part.weight or f"{part.repeat or 0:g} times" for part in mix},
        "tokenizer": records[0].recipe.tokenizer,
        "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        **more,
    }


def other_data(before: dict[str, Any], after: dict[str, Any], steps: int) -> str:
    """What differs between two values of `trained_on`, in words; "" where nothing does.

    Args:
        before: of what trained.
        after: of what is to train on.
        steps: that are done; with [[data.stage]] what comes later may differ.
    """
    masked, masks = (one.get("masked", False) for one in (before, after))  # not there before the key was
    if masked != masks:
        words = {False: "joined", True: "masked"}
        return f'data.documents "{words[masked]}" → "{words[masks]}"'
    if "order" in before or "order" in after:
        return _other_stages(before, after, steps)
    if before.get("sha256") == after.get("sha256"):
        return ""
    found = [f"{before[key]:,} → {after[key]:,} {key}" for key in _COUNTED if before[key] != after[key]]
    found += [
        f"data.{key} {json.dumps(before[key])} → {json.dumps(after[key])}"
        for key in ("split", "mix")
        if before[key] != after[key]
    ]
    return ", ".join(found) or "other files, or other text in them, with the same counts"


def _other_stages(before: dict[str, Any], after: dict[str, Any], steps: int) -> str:
    """What differs of the first `steps`, which both had to see alike."""
    if not ("order" in before and "order" in after):
        had, has = ("stages" if "order" in one else "none" for one in (before, after))
        return f"data.stage: {had} → {has}, which is another order of the documents"
    old, new = _shares(before, steps), _shares(after, steps)
    if old != new:
        return f"data.stage of steps 1 to {steps}: {json.dumps(old)} → {json.dumps(new)} (later ones may change)"
    used = dict.fromkeys(name for _, shares in old for name in shares)
    if changed := [name for name in used if before["order"][name] != after["order"].get(name)]:
        return f"other files, text or split in {', '.join(changed)} (new files can be a part of their own)"
    return ""


def _shares(data: dict[str, Any], steps: int) -> list[tuple[int, dict[str, float]]]:
    """The stages that begin before a step, each with the shares of the parts that it sees."""
    return [
        (begin, {name: share for name, share in zip(data["order"], shares, strict=True) if share})
        for begin, shares in data["seen"]["stages"]
        if begin < steps
    ]


def tokens_of_tables(run: RunFile, data: dict[str, Any]) -> dict[str, int]:
    """The tokens to train on of each table of the mix, by its title; none where the mix has no tables."""
    tables = [] if isinstance(run.data.mix, str) else run.data.mix
    return {one.title: count for one, count in zip(tables, data.get("seen", {}).get("tokens", ()), strict=False)}


def epochs_seen(data: dict[str, Any], train: Train, steps: int) -> list[float]:
    """How often each table of the mix was seen in so many steps, from `trained_on`; none where it does not say."""
    if not (seen := data.get("seen")):
        return []
    ends = [*(begin for begin, _ in seen["stages"][1:]), steps]
    plans = [StageOf(begin, end, shares) for (begin, shares), end in zip(seen["stages"], ends, strict=True)]
    counted = zip(seen_by(plans, train, steps), seen["tokens"], strict=True)
    return [taken / tokens if tokens else 0.0 for taken, tokens in counted]
