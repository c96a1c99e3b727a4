"""What of each file is to train on, to validate and to test with: data.split, as Megatron cuts by it.

Megatron cuts every file by itself, at whole sequences, and rounds: of a file of 10 documents at 970,30,0 all 10 are to
train on and none is left to validate with. Tokens of a part are therefore counted, and not taken for a share of all.
"""

import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cptain.data.manifest import Record
from cptain.errors import CptainError, one_line

HEADER = "<9sQBQQ"  # of an .idx file: see cptain.data.indexed_dataset
HEADER_BYTES = struct.calcsize(HEADER)
DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint16), 4: np.dtype(np.int32)}


def cut(bounds: tuple[float, float], sequences: int) -> range:
    """The sequences between two fractions of a file, rounded as Megatron rounds --split."""
    return range(round(bounds[0] * sequences), round(bounds[1] * sequences))


def read_lengths(prefix: str) -> tuple[np.dtype[Any], npt.NDArray[np.int32]]:
    """The dtype of a pair's ids, and how many each of its sequences has."""
    with open(f"{prefix}.idx", "rb") as file:
        _, _, code, sequences, _ = struct.unpack(HEADER, file.read(HEADER_BYTES))
        return DTYPES[code], np.fromfile(file, dtype="<i4", count=sequences)


@cache
def tokens_of_parts(data_folder: Path, record: Record, split: str) -> tuple[int, int, int]:
    """Tokens of a file to train on, to validate and to test with.

    Raises:
        CptainError: its .idx file cannot be read.
    """
    weights = [float(weight) for weight in split.split(",")]
    ends = [sum(weights[:count]) / sum(weights) for count in range(4)]
    try:
        _, lengths = read_lengths(str(data_folder / record.prefix))
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise CptainError(f"{data_folder / record.prefix}.idx: cannot be read: {one_line(error)}") from error
    parts = (cut((ends[part], ends[part + 1]), len(lengths)) for part in range(3))
    train, validation, test = (int(lengths[part.start : part.stop].sum(dtype=np.int64)) for part in parts)
    return train, validation, test


def training_tokens(data_folder: Path, records: list[Record], split: str) -> int:
    """Tokens of files to train on. Errors are those of `tokens_of_parts`."""
    return sum(tokens_of_parts(data_folder, record, split)[0] for record in records if record.tokens)


def lacks_validation(data_folder: Path, records: list[Record], split: str) -> bool:
    """Whether data.split asks for a validation part and no file has a document in it."""
    wanted = float(split.split(",")[1]) > 0
    return wanted and not any(tokens_of_parts(data_folder, record, split)[1] for record in records if record.tokens)
