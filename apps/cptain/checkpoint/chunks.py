"""The chunks that a tensor on disk is cut into: boxes of it, each in an archive of its own."""

from dataclasses import dataclass
from math import prod

from cptain.checkpoint.mapping import Shape


@dataclass(frozen=True)
class Place:
    """Where an archive lies: a file of the folder, and the bytes of it."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the archive that holds it."""

    offset: Shape
    shape: Shape
    place: Place


def overlap(chunks: list[Chunk], axis: int = 0) -> bool:
    """Whether two boxes share a value: a sweep along the first dimension along which not each is one thick, as layers
    and experts are; those are looked at apart."""
    chunks = [chunk for chunk in chunks if prod(chunk.shape)]
    if any(len(chunk.shape) <= axis for chunk in chunks):
        return len(chunks) > 1
    if all(chunk.shape[axis] == 1 for chunk in chunks):
        apart: dict[int, list[Chunk]] = {}
        for chunk in chunks:
            apart.setdefault(chunk.offset[axis], []).append(chunk)
        return any(overlap(group, axis + 1) for group in apart.values() if len(group) > 1)
    under_way: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset[axis:]):
        under_way = [one for one in under_way if one.offset[axis] + one.shape[axis] > chunk.offset[axis]]
        for one in under_way:
            if all(
                a < b + extent_b and b < a + extent_a
                for a, extent_a, b, extent_b in zip(one.offset, one.shape, chunk.offset, chunk.shape, strict=True)
            ):
                return True
        under_way.append(chunk)
    return False
