"""[sweep]: one run file that describes several runs, one for each combination of its rows.

What the runs have in common is made once: their data and their converted checkpoint lie in the folder that bears the
name of the run file itself, unless the sweep changes what goes into them.
"""

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

from cptain.data.recipe import options
from cptain.errors import bad_usage
from cptain.run_file import RunFile, set_key, sweep_keys
from cptain.toml_file import validate


def expand(run: RunFile, file: Path) -> list[RunFile]:
    """The runs that a run file describes; the run itself where it has no [sweep].

    Args:
        run: the run file, as loaded.
        file: where it was read: relative paths in the sweep start there.

    Raises:
        CptainError: exit status 2; a combination that is no run, or two with one name.
    """
    if not run.sweep:
        return [run]
    document = _document(run)
    runs: dict[str, RunFile] = {}
    for rows in itertools.product(*(list(enumerate(rows, 1)) for rows in run.sweep.values())):
        combination: dict[str, Any] = json.loads(json.dumps(document))
        labels = []
        for keys, (number, row) in zip(run.sweep, rows, strict=True):
            values = dict(zip(sweep_keys(keys), row if "," in keys else [row], strict=True))
            for dotted, value in values.items():
                set_key(combination, dotted.split("."), value)
            if "name" not in values:
                labels.append(_label(*next(iter(values.items())), number))
        combination["name"] = "-".join([str(combination["name"]), *labels])
        one = validate(RunFile, combination, file)
        if one.name in runs:
            bad_usage(f'{file}: sweep: two of its runs would be "{one.name}"')
        runs[one.name] = one
    return _share(run, list(runs.values()), file)


def _document(run: RunFile) -> dict[str, Any]:
    """What a resolved run file holds, but for [sweep]."""
    return run.model_dump(mode="json", exclude_none=True, exclude={"sweep"})


def _label(dotted: str, value: Any, number: int) -> str:
    """What a row adds to its run's name: the key's last part, and the value, or the row's number where it is long."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    plain = isinstance(value, (int, float, str)) and len(text) <= 20 and not set(text) & set("/*$\n")
    return f"{dotted.rpartition('.')[2]}{text if plain else number}"


def _share(run: RunFile, runs: list[RunFile], file: Path) -> list[RunFile]:
    """Give runs that are made of the same text, or the same model, one folder for it."""
    data = [
        json.dumps([one.data.input, one.data.tokenized, options(one), one.base_tokenizer, *_new_tokens(one)])
        for one in runs
    ]
    models = [json.dumps([one.model.hf, *_extension(one)]) for one in runs]
    shared = []
    for one, text, model in zip(runs, data, models, strict=True):
        changes: dict[str, Any] = {}
        for section, key, made_of, this in (("data", "output", data, text), ("model", "megatron", models, model)):
            if getattr(getattr(one, section), key) is None:
                kinds = list(dict.fromkeys(made_of))
                number = f"-{kinds.index(this) + 1}" if len(kinds) > 1 else ""
                folder = run.folder / f"{'data' if section == 'data' else 'megatron'}{number}"
                changes[section] = getattr(one, section).model_copy(update={key: folder})
        shared.append(one.model_copy(update=changes))
    folders = (
        ("data.output", [one.data_folder for one in shared], data),
        (
            "model.megatron",
            [one.megatron_folder for one in shared],
            models,
        ),
    )
    for key, places, made_of in folders:
        if len(set(zip(places, made_of, strict=True))) > len(set(places)):
            bad_usage(f"{file}: {key} is one folder, and the sweep would put different things into it: leave {key} out")
    return shared


def _new_tokens(run: RunFile) -> list[str]:
    """What the tokenizer is extended with; nothing where it is not."""
    vocabulary = run.model.vocabulary
    return [str(vocabulary.add), str(vocabulary.tokenizer)] if vocabulary else []


def _extension(run: RunFile) -> list[str]:
    """What the model is extended with, and how; nothing where it is not."""
    vocabulary = run.model.vocabulary
    return [run.base_tokenizer, *_new_tokens(run), vocabulary.initialise] if vocabulary else []


def refuse_sweep(run: RunFile, file: Path, typed: list[str]) -> None:
    """A stage works on one run: refuse a run file that describes several, with a command that does the first of them.

    Args:
        run: the run file, as loaded.
        file: where it was read.
        typed: the arguments that cptain was called with.
    """
    if not run.sweep:
        return
    runs = expand(run, file)
    settings = ["sweep={}", *_settings(_document(run), _document(runs[0]))]
    command = shlex.join(["cptain", *typed, *(word for setting in settings for word in ("--set", setting))])
    bad_usage(f"{file}: sweep: describes {len(runs)} runs and a stage works on one; the first of them: {command}")


def _settings(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """KEY=VALUE for every key that makes of one resolved run file the other."""
    settings = []
    for key, value in after.items():
        if isinstance(value, dict):
            settings += _settings(before.get(key, {}), value, f"{prefix}{key}.")
        elif value != before.get(key):
            settings.append(f"{prefix}{key}={_inline(value)}")
    return settings


def _inline(value: Any) -> str:
    """A value as TOML, on one line: JSON but for tables."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_inline(part)}' for key, part in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    return json.dumps(value, ensure_ascii=False)
