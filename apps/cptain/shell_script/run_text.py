"""A mapped script as the text of a run file: the keys that matter, each with its reason, and what it could not say."""

import hashlib
import json
import re
from typing import Any

from cptain.run_data import Data
from cptain.run_file import Jobs
from cptain.run_train import Parallel, Train
from cptain.scheduling.sites import load_site
from cptain.shell_script.mapping import Mapping
from cptain.shell_script.values import is_known
from cptain.toml_file import Section, seconds

NO_FOLDER = "/path/to/your/runs"
_ALWAYS = {
    "train": ("seq_length", "micro_batch_size", "global_batch_size", "steps", "lr", "min_lr", "warmup_steps",
              "save_interval", "eval_interval", "eval_steps"),
    "parallel": ("pipeline",),
    "data": ("split", "tokenized", "mix"),
    "jobs": ("nodes",),
}  # fmt: skip
_SECTIONS: dict[str, type[Section]] = {"data": Data, "parallel": Parallel, "train": Train, "jobs": Jobs}
_WIDTH = 118
_GENERIC = ("train", "run", "job", "submit", "pretrain", "sbatch_train", "qsub_train")


def value(thing: Any) -> str:
    """A value in TOML."""
    if isinstance(thing, bool):
        return str(thing).lower()
    if isinstance(thing, float) and thing >= 1e4 and thing == int(thing):
        return str(int(thing))
    if isinstance(thing, float):
        short = re.sub(r"e([+-])0*", lambda match: "e" + match[1].replace("+", ""), repr(thing))
        return short if thing != int(thing) or "e" in short else repr(thing)
    if isinstance(thing, list) and len(thing) > 1 and not isinstance(thing[0], int):
        return "[\n" + "".join(f"  {value(one)},\n" for one in thing) + "]"
    return json.dumps(thing, ensure_ascii=False)


def run_name(mapping: Mapping) -> str:
    """The run's name: the script's file name, with its folder's where that says nothing; never that of the folder that
    the script saves in, which would then hold two kinds of checkpoints."""
    stem = mapping.script.file.resolve().with_suffix("")
    name = f"{stem.parent.name}-{stem.name}" if stem.name in _GENERIC else stem.name
    name = re.sub(r"[^\w .,+=@-]", "-", name).lstrip(" .,+=@-") or "imported"
    saved = (mapping.script.value("--save") or "").rstrip("/").rpartition("/")[2]
    return (name + "-cptain" if name == saved else name)[:200]


def put_jobs(mapping: Mapping) -> None:
    """Set name, work_dir, [jobs] and what follows from the directives."""
    script, directives = mapping.script, mapping.script.directives
    saved = script.value("--save") or ""
    parent = saved.rstrip("/").rpartition("/")[0]
    mapping.put("name", run_name(mapping))
    if parent and is_known(saved) and saved.startswith("/"):
        mapping.put("work_dir", parent, "beside the script's own checkpoints")
    else:
        mapping.put("work_dir", NO_FOLDER, "to be filled in")
    site = load_site(directives.site)[0] if directives.site else None
    if directives.site:
        mapping.put("jobs.site", directives.site)
    if directives.group:
        mapping.put("jobs.group", directives.group)
    elif site and site.needs_group:
        mapping.notes["jobs.site"] = "it asks for a group, which the script does not say: jobs.group"
    if directives.nodes:
        converts = any(one.flag.startswith("--ckpt-convert") for one in script.arguments)
        mapping.put("jobs.nodes", directives.nodes, "of the conversion, not of the training" if converts else "")
    if directives.walltime:
        longest = site.max_walltime if site else None
        if longest and seconds(directives.walltime) > seconds(longest):
            note = f"the script asks for {directives.walltime}, and the site allows this; the jobs of a run are a chain"
            mapping.put("jobs.walltime", longest, note)
        else:
            mapping.put("jobs.walltime", directives.walltime)


def _default(section: str, key: str) -> Any:
    table = _SECTIONS.get(section)
    return table.by_key()[key].get_default() if table and key in table.by_key() else None


def _kept(mapping: Mapping, section: str) -> list[tuple[str, str, str]]:
    """The keys of a section that matter: key, value and note."""
    rows = []
    for dotted, thing in mapping.keys.items():
        of, _, key = dotted.rpartition(".")
        if of != section:
            continue
        if thing == _default(section, key) and key not in _ALWAYS.get(section, ()):
            continue
        note = mapping.notes.get(dotted, "")
        is_ours = thing == _default(section, key) and note.startswith("Megatron's default")
        rows.append((key, value(thing), "" if is_ours else note))
    table = _SECTIONS.get(section)
    order = list(table.by_key()) if table else []
    return sorted(rows, key=lambda row: order.index(row[0]) if row[0] in order else -1)


def _comment(text: str) -> list[str]:
    lines, line = [], "#"
    for word in text.split():
        if len(line) + len(word) + 1 > _WIDTH:
            lines.append(line)
            line = "#  "
        line += " " + word
    return [*lines, line]


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    wide = max((len(key) for key, _, _ in rows), default=0)
    lines = []
    for key, text, note in rows:
        line = f"{key:{wide}} = {text}"
        if note and ("\n" in text or len(line) + len(note) + 4 > _WIDTH):
            lines += [*_comment(note), line]
        else:
            lines.append(f"{line}  # {note}" if note else line)
    return lines


def run_text(mapping: Mapping) -> str:
    """The run file."""
    script = mapping.script
    digest = hashlib.sha256(script.file.read_bytes()).hexdigest()[:12]
    lines = _comment(f"From {script.file.name} (SHA-256 {digest}…), by cptain import-script: docs/import-script.md.")
    for one in mapping.differs:
        lines += _comment(f"OTHER THAN THE SCRIPT: {one}")
    lines += _table(_kept(mapping, ""))
    order = ("model", "data", "parallel", "train", "wandb", "jobs")
    for section in order:
        rows = _kept(mapping, section)
        if section == "train" and mapping.passed:
            words = [word for one in mapping.passed for word in (one.flag, *one.values)]
            rows.append(("megatron_args", json.dumps(words, ensure_ascii=False), ""))
        if rows:
            lines += ["", f"[{section}]", *_table(rows)]
        for name, tables in mapping.tables.items() if section == "data" else ():
            for table in tables:
                lines += ["", f"[[{name}]]", *_table([(key, value(thing), "") for key, thing in table.items()])]
    return "\n".join(lines) + "\n"
