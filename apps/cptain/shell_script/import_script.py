"""The command: a script to a run file, with all that it could not say."""

from pathlib import Path

from cptain import atomic
from cptain.errors import CptainError, bad_usage
from cptain.run_file import load_run
from cptain.shell_script.mapping import Mapping, map_arguments
from cptain.shell_script.namespaces import Comparison, compare
from cptain.shell_script.run_text import put_jobs, run_text
from cptain.shell_script.trainer import read_script


def import_script(
    file: Path,
    given: tuple[str, ...] = (),
    variables: tuple[str, ...] = (),
    out: Path | None = None,
    force: bool = False,
    tree: Path | None = None,
) -> tuple[Path, list[str]]:
    """Make a run file of a script that starts pretrain_gpt.py.

    Args:
        file: the script.
        given: its own arguments.
        variables: NAME=VALUE, of the environment that it is started in.
        out: the run file; default: the script's name with .toml, in the working directory.
        force: write over a file that is there.
        tree: a checkout of Megatron-LM for the comparison, in the place of the installed one.

    Returns:
        The run file, and what is to be said of it.

    Raises:
        CptainError: the script cannot be read or starts no pretrain_gpt.py; there is such a file already.
    """
    target = out or Path(file.stem + ".toml")
    if target.is_dir():
        bad_usage(f"{target}: is a folder: -o names a file")
    if target.exists() and not force:
        bad_usage(f"{target}: is there already: --force writes over it, -o names another")
    if tree and not (tree / "megatron" / "training" / "arguments.py").is_file():
        bad_usage(f"--megatron {tree}: no checkout of Megatron-LM: it has no megatron/training/arguments.py")
    mapping = map_arguments(read_script(file, given, variables))
    put_jobs(mapping)
    atomic.write_text(target, run_text(mapping))
    try:
        run = load_run(target)
    except CptainError as error:
        return target, [*_mapped(mapping), f"the run file is not complete: {error}"]
    try:
        found = compare(mapping, run, tree)
    except CptainError as error:
        return target, [*_mapped(mapping), f"not compared by Megatron's own parser: {error}"]
    if drop_unknown(mapping, found.unknown):
        atomic.write_text(target, run_text(mapping))
    return target, [*_mapped(mapping), *comparison_lines(found)]


def drop_unknown(mapping: Mapping, unknown: list[str]) -> bool:
    """Leave out of train.megatron_args what the Megatron at hand would end at. Gives whether there is any."""
    mine = [one for one in mapping.passed if one.flag in unknown or str(one) in unknown]
    mapping.passed = [one for one in mapping.passed if one not in mine]
    mapping.left += [(one, "the Megatron at hand has no such argument") for one in mine]
    mapping.differs += [f"{one}: the Megatron at hand has no such argument" for one in mine]
    return bool(mine)


def _mapped(mapping: Mapping) -> list[str]:
    script = mapping.script
    count = len(script.arguments) - len(mapping.left) - len(mapping.of_model) - len(mapping.passed)
    lines = [
        f"{script.file}: line {script.line} starts pretrain_gpt.py with {len(script.arguments)} arguments: "
        f"{count} are keys, {len(mapping.of_model)} are what the model's config.json says, "
        f"{len(mapping.passed)} are passed through"
    ]
    if script.others:
        more = ", ".join(map(str, script.others))
        lines.append(f"it starts pretrain_gpt.py again (line {more}): this is of the first start")
    lines += [f"read with it: {name}" for name in dict.fromkeys(script.reading.sourced)]
    lines += [f"taken for granted: {what}" for what in script.reading.assumed]
    lines += [f"line {number}: {text}: no key says it" for number, text in script.directives.unread.items()]
    lines += [
        f"line {one.line}: {one}: no key: {why}" for one, why in sorted(mapping.left, key=lambda left: left[0].line)
    ]
    return [*lines, *(f"OTHER THAN THE SCRIPT: {one}" for one in mapping.differs)]


def comparison_lines(found: Comparison) -> list[str]:
    """The comparison for people: a line a difference."""
    unexplained = [one for one in found.differences if not one.why]
    lines = [
        f"Megatron's namespaces: {found.same} values are the same, {len(found.differences)} differ, "
        f"{len(unexplained)} of them unexplained"
    ]
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"{one}: this Megatron has no such argument" for one in found.unknown]
    return lines + [
        f"{one.name}: script {one.script!s:.60}, run file {one.ours!s:.60}: {one.why or 'unexplained'}"
        for one in sorted(found.differences, key=lambda one: bool(one.why))
    ]
