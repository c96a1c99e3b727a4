"""The input files of a run, and what each is called in the data folder."""

import glob
import hashlib
import os
from pathlib import Path

from cptain.data import reader
from cptain.errors import CptainError

_WILDCARD = ("*", "?", "[")


def _fixed_part(pattern: str) -> Path:
    """The folder of a glob before its first wildcard."""
    parts = Path(pattern).parts
    wild = next((place for place, part in enumerate(parts) if any(sign in part for sign in _WILDCARD)), len(parts) - 1)
    return Path(*parts[:wild])


def every_folder_opens(pattern: str) -> None:
    """Raise what glob says nothing of: a folder below a ** that cannot be listed."""

    def refuse(error: OSError) -> None:
        raise error

    before, recursive, _ = pattern.partition("**")
    for folder in glob.glob(before) if recursive else ():
        for _ in os.walk(folder, onerror=refuse):
            pass


def _is_a_file_with_a_name(file: Path) -> None:
    if not file.is_file():
        raise CptainError(f"data.input: {file}: no regular file, or a link to nothing: repair it, or take it away")
    if not reader.stem(file):
        raise CptainError(f"data.input: {file}: has no name before its suffix: rename it")
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise CptainError(f"data.input: {os.fsencode(file)!r}: a name that is not UTF-8: rename it") from None


def _are_different(files: list[Path]) -> None:
    """Refuse one file under two names, as a folder that is reached through two links has them: it would count twice."""
    folders: dict[Path, str] = {}
    seen: dict[str, Path] = {}
    for file in files:
        if file.parent not in folders:
            folders[file.parent] = os.path.realpath(file.parent)
        real = os.path.realpath(file) if file.is_symlink() else f"{folders[file.parent]}/{file.name}"
        if (other := seen.setdefault(real, file)) != file:
            raise CptainError(f"data.input: {other} and {file} are one file, {real}: take one name away")


def input_files(patterns: list[str]) -> dict[str, Path]:
    """The files that the globs match, by name: the path below the globs' common folder, suffix cut.

    Raises:
        CptainError: a glob that matches nothing, a match that is no file, or two files with one name for their pairs.
        OSError: a folder that cannot be listed.
    """
    if not patterns:
        return {}
    matched: dict[Path, None] = {}
    for pattern in patterns:
        every_folder_opens(pattern)
        files = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
        wanted = [file for file in files if file.name.endswith(reader.SUFFIXES) and not file.is_dir()]
        for file in wanted:
            _is_a_file_with_a_name(file)
        if not wanted:
            other = f" ({len(files)} other files)" if files else ""
            if Path(pattern).is_dir():
                other = f": it is a folder: write {pattern}/**/*"
            raise CptainError(f"data.input: {pattern} matches no {', '.join(reader.SUFFIXES)} file{other}")
        matched.update(dict.fromkeys(wanted))
    _are_different(sorted(matched))
    root = Path(os.path.commonpath([_fixed_part(pattern) for pattern in patterns]))
    by_name: dict[str, Path] = {}
    for file in sorted(matched):
        name = str(file.relative_to(root).with_name(reader.stem(file)))
        if name in by_name:
            raise CptainError(f"data.input: {by_name[name]} and {file} would both become {name}: rename one")
        by_name[name] = file
    return by_name


def named(files: dict[str, Path], known: dict[str, str]) -> dict[str, Path]:
    """Files by the name that each has in a data folder.

    A file that the folder has a record of keeps its name, whatever the globs' common folder is now; a new one gets its
    own, with a piece of its path's hash where another file has that, even one that no glob matches any more. Processes
    that share the work agree on it, though the records of some of it appear meanwhile: those are of these names.

    Args:
        files: see `input_files`.
        known: the name of every file that the folder has a record of, by the file's path.
    """
    taken, found = set(known.values()), {}
    for name, file in files.items():
        if str(file) in known:
            name = known[str(file)]
        elif name in taken:
            name = f"{name}-{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
        found[name] = file
    return found
