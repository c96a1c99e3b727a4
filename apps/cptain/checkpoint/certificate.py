"""verify.json of a model that cptain wrote: the hash of each of its files, and of what it was made of.

It is written with the model, before that gets its name, and is asked by `cptain verify EXPORT`, which needs nothing but
the files. Its paths are relative to the model's folder, and it may be published: what it was made of is looked at where
it is still there. `cptain verify A B` adds what it compared, and leaves the certificate as it is.
"""

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import click

from cptain import __version__, atomic
from cptain.checkpoint.legacy import LegacyReader, open_megatron
from cptain.checkpoint.model_card import MODEL_CARD
from cptain.checkpoint.saved_files import RECORD, checksums_of, compare_record
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.errors import CptainError, bad_usage
from cptain.progress import Progress
from cptain.summary import tell

FILE = "verify.json"
_KEY = "certificate"
_OF_A_MODEL = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")  # what a base is read for
_MAY_CHANGE = ("data", "begun with")  # are worked with further: said, and no failure

Checksums = dict[str, dict[str, Any]]


@cache
def _hash(file: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file; of one that is the same at each export of a process, such as the base's, read once."""
    with open(file, "rb", buffering=0) as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()


def hashes(folder: Path, names: list[str], workers: int, label: str) -> Checksums:
    """Size and SHA-256 of files of a folder, a thread a file: 1 to 2 GB a second and core."""
    stats = {name: (folder / name).stat() for name in names}
    with (
        Progress(label, sum(stat.st_size for stat in stats.values()), "B") as progress,
        ThreadPoolExecutor(workers) as pool,
    ):

        def checksum(name: str) -> dict[str, Any]:
            stat = stats[name]
            found = {"bytes": stat.st_size, "sha256": _hash(folder / name, stat.st_size, stat.st_mtime_ns)}
            progress.advance(stat.st_size, name)
            return found

        return dict(zip(names, pool.map(checksum, names), strict=True))


def _files(folder: Path) -> list[str]:
    """The files below a model's folder, but for its certificate, and for hidden ones, which downloads leave."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(name) for name in names if str(name) != FILE and not name.parts[0].startswith("."))


def model_source(what: str, folder: Path, workers: int) -> dict[str, Any]:
    """A Hugging Face model that another is made of: the files that are read of it."""
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(_OF_A_MODEL) and file.name != FILE)
    return {"what": what, "folder": str(folder), "files": hashes(folder, names, workers, f"hash {what}")}


def checkpoint_source(what: str, reader: TorchDistReader | LegacyReader, workers: int) -> dict[str, Any]:
    """A Megatron checkpoint that a model is made of: one hash over the size and checksum of all of its files, as
    checksums.json has them."""
    return {"what": what, "folder": str(reader.folder), "checksums_sha256": _of_checkpoint(reader, workers)}


def file_source(what: str, file: Path) -> dict[str, Any]:
    """A single file that a model is made with."""
    return {"what": what, "folder": str(file.parent), "files": hashes(file.parent, [file.name], 1, f"hash {what}")}


def _of_checkpoint(reader: TorchDistReader | LegacyReader, workers: int) -> str:
    folder = reader.folder
    if isinstance(reader, TorchDistReader):
        names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != RECORD)
        found: Checksums = checksums_of(reader, names)
    else:
        names = sorted(str(path.relative_to(folder)) for path in folder.glob("mp_rank_*/*.pt"))
        found = hashes(folder, names, workers, "hash checkpoint")
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def digest_of(source: dict[str, Any]) -> str:
    """One hash of what a model is made of, for people."""
    if "checksums_sha256" in source:
        return str(source["checksums_sha256"])
    return hashlib.sha256(json.dumps(source["files"], sort_keys=True).encode()).hexdigest()


def write_certificate(
    partial: Path, target: Path, by: str, checked: str, sources: list[dict[str, Any]], workers: int
) -> None:
    """Write the certificate of a model whose files are complete. It has no date: an export is the same bytes each time.

    Args:
        partial: the folder that they are in.
        target: the name that it will get.
        by: the command.
        checked: what it compared, in words.
        sources: of what the model was made.
        workers: threads.
    """
    certificate = {
        "cptain": __version__,
        "by": by,
        "checked": checked,
        "made_of": [{**one, "folder": os.path.relpath(one["folder"], target)} for one in sources],
        "files": hashes(partial, _files(partial), workers, "hash"),
    }
    atomic.write_json(partial / FILE, {**_read(partial), _KEY: certificate})


def has_certificate(folder: Path) -> bool:
    """Whether a model has one."""
    return _KEY in _read(folder)


def _read(folder: Path) -> dict[str, Any]:
    """What verify.json holds; nothing where it is missing or damaged."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (FileNotFoundError, ValueError, RecursionError):
        return {}


def record_comparison(folder: Path, record: dict[str, Any]) -> None:
    """Add to an export's certificate how it compares with its checkpoint. A quick look replaces no full comparison."""
    there = _read(folder)
    if not (record["sample"] and "tensors" in there):
        kept = {_KEY: there[_KEY]} if _KEY in there else {}
        atomic.write_json(folder / FILE, {**record, **kept})


def verify_certificate(folder: Path, workers: int) -> None:
    """Check a model against its certificate, and what it was made of where that is still there.

    Args:
        folder: of the model.
        workers: threads.

    Raises:
        CptainError: a file that was changed, added or taken away, each of which is printed; a folder without a
            certificate.
    """
    if not folder.is_dir():
        bad_usage(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    folder = folder.absolute()
    try:
        certificate = _read(folder)[_KEY]
        files, sources = dict(certificate["files"]), list(certificate["made_of"])
        wrong, said = _wrong_files(folder, files, workers), dict[str, str]()
        for source in sources:
            name = f"{source['what']} ({source['folder']})"
            found = _wrong_source(folder, source, workers)
            if found is None:
                said[name] = "not here: not checked"
            elif not found:
                said[name] = "unchanged"
            elif source["what"] in _MAY_CHANGE:
                said[name] = f"changed since: {'; '.join(found)}"
            else:
                wrong += [f"{name}: {line}" for line in found]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CptainError(
            f"{folder / FILE}: no certificate of a model that cptain exported or merged, or a damaged one"
        ) from error
    tell(folder=folder, files=len(files), wrong=wrong, made_of=said)
    for line in [*(f"{name}: {what}" for name, what in said.items()), *wrong]:
        click.echo(line)
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CptainError(f"verify: {folder}: not what was written: {wrong[0]}{more}")
    print(f"verify: {len(files)} files are what {certificate['by']} wrote", file=sys.stderr)


def _wrong_files(folder: Path, files: Checksums, workers: int) -> list[str]:
    """A line for each file of a model that is not as recorded. The card may be edited; that is said."""
    there = _files(folder)
    wrong = [f"{name}: missing" for name in files if name not in there]
    wrong += [f"{name}: added: the certificate has no such file" for name in there if name not in files]
    found = hashes(folder, [name for name in there if name in files], workers, "verify")
    changed = [name for name in found if found[name] != files[name]]
    if MODEL_CARD in changed:
        print(f"verify: {MODEL_CARD} was edited, as it may be", file=sys.stderr)
    return wrong + [f"{name}: changed" for name in changed if name != MODEL_CARD]


def _wrong_source(model: Path, source: dict[str, Any], workers: int) -> list[str] | None:
    """What of a source is not as recorded; None where it is not there."""
    folder = Path(os.path.normpath(model / source["folder"]))
    if not folder.is_dir():
        return None
    if "checksums_sha256" in source:
        try:
            with open_megatron(folder) as reader:
                compare_record("verify", reader)
                same = _of_checkpoint(reader, workers) == source["checksums_sha256"]
        except CptainError as error:
            return [str(error)]
        return [] if same else ["its files are not those that were read"]
    there = [name for name in source["files"] if (folder / name).is_file()]
    found = hashes(folder, there, workers, f"verify {source['what']}")
    wrong = [f"{name}: changed" for name in there if found[name] != source["files"][name]]
    return wrong + [f"{name}: missing" for name in source["files"] if name not in there]
