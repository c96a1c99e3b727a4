"""checksums.json: what the files of a torch_dist checkpoint were when it was saved whole, kept in its folder.

A checkpoint of 70B is 1 TB, of which no process reads a hash beside a training. But a .distcp file is a run of archives
that carry the CRC-32 of all they hold, written with them; so the record has the hash of their directories alone, some
hundred bytes an archive. A file whose directories are those that were saved, and whose archives are what their
directories say (`check_archives`), is the file that was saved. Every other file is small, and is hashed whole.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cptain import __version__, atomic
from cptain.checkpoint.chunks import Place
from cptain.checkpoint.streaming import Buffers, in_threads
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.errors import CptainError, one_line

RECORD = "checksums.json"
_THREADS = 16  # a disk has no more to give


def write_record(folder: Path) -> None:
    """Record what the files of a whole checkpoint are.

    Raises:
        CptainError: see `TorchDistReader`, or a file that cannot be read.
        FileNotFoundError: the checkpoint was removed meanwhile, and stays so.
    """
    with TorchDistReader(folder) as reader:
        names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != RECORD)
        record = {"cptain": __version__, "files": checksums_of(reader, names)}
        atomic.write_json(folder / RECORD, record, make_folder=False)


def compare_record(stage: str, reader: object) -> None:
    """`check_record`, with what is to be said on stderr; checkpoints in another format have no record."""
    for line in check_record(reader) if isinstance(reader, TorchDistReader) else ():
        print(f"{stage}: {line}", file=sys.stderr)


def check_record(reader: TorchDistReader, part: tuple[int, int] = (0, 1)) -> list[str]:
    """Compare a checkpoint's files with their record.

    Args:
        reader: of the checkpoint.
        part: (i, n): of the .distcp files, the i-th (from 0) of n parts alone.

    Returns:
        A line to say where there is no record: the checkpoint is of another tool, or was killed before it was recorded.

    Raises:
        CptainError: a file is missing, or not as it was saved.
    """
    folder = reader.folder
    try:
        recorded: dict[str, dict[str, Any]] = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        names = sorted(recorded)
    except FileNotFoundError:
        return [f"{folder}: it has no {RECORD}: whether all of its files are of this save cannot be known"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CptainError(f"{folder / RECORD}: cannot be read: {one_line(error)}") from error
    archives = {place.file for place in reader.archives}
    wanted = [name for name in names if name not in archives] + _part(
        [name for name in names if name in archives], part
    )
    for name, found in checksums_of(reader, wanted).items():
        if found != recorded[name]:
            raise CptainError(
                f"{folder / name}: not as it was saved ({RECORD}): damaged, or of another iteration: bring the file "
                "again from where it was written, or take another checkpoint"
            )
    return []


def forget_later(root: Path, iteration: int) -> None:
    """Remove the records of iterations that a training will write again.

    Args:
        root: of the checkpoints.
        iteration: with which the training begins.
    """
    for record in root.glob(f"iter_*/{RECORD}"):
        number = record.parent.name.removeprefix("iter_")
        if number.isdigit() and int(number) > iteration:
            record.unlink(missing_ok=True)


def bytes_to_check(reader: TorchDistReader, part: tuple[int, int]) -> int:
    """Bytes that `check_archives` will read."""
    return sum(place.length for place, _ in _archives_of(reader, part))


def check_archives(
    reader: TorchDistReader, part: tuple[int, int], workers: int, advance: Callable[[int], None]
) -> None:
    """Read all that a checkpoint's archives hold, of the model and of the optimizer, and compare it with their CRC-32:
    Megatron loads them without asking for it.

    Args:
        reader: of the checkpoint.
        part: see `check_record`.
        workers: threads.
        advance: told the bytes that were read since it was last called.

    Raises:
        CptainError: a file and a tensor in it that is not what was written.
    """

    def check(place: Place, name: str, buffers: Buffers) -> int:
        for member in reader.directory(place)[1]:
            reader.check_member(place.file, member, name, buffers)
        return place.length

    tasks = [partial(check, place, name) for place, name in _archives_of(reader, part)]
    with in_threads(tasks, workers, buffers=1) as checked:
        for count in checked:
            advance(count)


def _part(names: Iterable[str], part: tuple[int, int]) -> list[str]:
    number, count = part
    return sorted(names)[number::count]


def _archives_of(reader: TorchDistReader, part: tuple[int, int]) -> list[tuple[Place, str]]:
    """The archives in a part of the files, in the order in which they lie there."""
    files = set(_part({place.file for place in reader.archives}, part))
    found = [(place, name) for place, name in reader.archives.items() if place.file in files]
    return sorted(found, key=lambda one: (one[0].file, one[0].offset))


def checksums_of(reader: TorchDistReader, names: list[str]) -> dict[str, dict[str, Any]]:
    """What a record says of files, by name."""
    archives: dict[str, list[Place]] = {}
    for place, _ in _archives_of(reader, (0, 1)):
        archives.setdefault(place.file, []).append(place)

    def checksum(name: str) -> dict[str, Any]:
        file = reader.folder / name
        try:
            size = os.stat(file).st_size
            if name not in archives:
                return {"bytes": size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            digest = hashlib.sha256()
            for place in archives[name]:
                digest.update(reader.directory(place)[0])
            return {"bytes": size, "directories_sha256": digest.hexdigest()}
        except OSError as error:
            raise CptainError(f"{file}: cannot be read: {one_line(error)}") from error

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(checksum, names), strict=True))
