"""Blocks of a file to token ids: here, or in processes of their own where a file has more than one core.

Processes rather than threads: parsing JSON and making Python's strings hold the interpreter's lock, so that threads
stop gaining at about five cores. Blocks and ids travel in memory that the processes share, and lie there until they are
written.
"""

import mmap
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import cast

import numpy as np

from cptain.data import reader
from cptain.data.hashed_file import HashedFile
from cptain.data.indexed_dataset import EncodedDocuments, Ids, token_dtype, with_eod
from cptain.data.processes import process_pool
from cptain.data.recipe import Recipe
from cptain.data.tokenizer import Tokenizer
from cptain.errors import CptainError

_SLOT = 32 << 20  # bytes of address; only what is used takes memory
_SPARE = 4  # slots that are filled or emptied while each process has one
_LONGEST_CHECKED = 1 << 20  # characters: Hugging Face's library takes a hundred bytes of memory for one of text


@dataclass(frozen=True)
class Encoded:
    """A block's documents.

    Attributes:
        documents: their ids.
        lines: of the block.
        bad: those of them that are no document.
        blank: those of white space.
        text_bytes: of all texts, in UTF-8.
    """

    documents: EncodedDocuments
    lines: int
    bad: list[reader.BadLine]
    blank: int
    text_bytes: int


@dataclass(frozen=True)
class Encoding:
    """How the blocks of one file are encoded.

    Attributes:
        file: the file.
        recipe: the options.
        check_fraction: of the documents, how many are compared with Hugging Face's own ids.
    """

    file: str
    recipe: Recipe
    check_fraction: float

    def blocks(self, source: HashedFile | None = None) -> Iterator[reader.Block]:
        """The file's blocks; whoever asks for its hash gives it as `source`."""
        return reader.blocks(source or HashedFile(Path(self.file)), self.recipe.key, self.recipe.max_document_bytes)

    def parse(self, block: reader.Block) -> reader.Documents:
        """The documents of a block."""
        return reader.parse(block, self.recipe.key, self.recipe.max_document_bytes, self.recipe.strip)

    def encode(self, tokenizer: Tokenizer, block: reader.Block) -> Encoded:
        """Parse and encode a block, and compare a sample of it with Hugging Face's own ids.

        Raises:
            CptainError: a bad line where `on_error` is "fail", or other ids than Hugging Face's.
        """
        documents = self.parse(block)
        if documents.bad and self.recipe.on_error == "fail":
            bad = documents.bad[0]
            raise CptainError(f'{self.file}:{bad.line}: {bad.reason} (data.on_error = "skip" goes on without)')
        texts = documents.texts
        ids, lengths = tokenizer.encode(texts)
        checked = [place for place, text in enumerate(texts) if len(text) <= _LONGEST_CHECKED]
        sample = random.Random(block.first_line)  # the same documents at every run
        for place in sample.sample(checked, min(len(checked), ceil(len(checked) * self.check_fraction))):
            end = int(lengths[: place + 1].sum())
            if not tokenizer.check(texts[place], ids[end - int(lengths[place]) : end]):
                line = documents.line(documents.of_text(place))
                raise CptainError(
                    f"{self.file}:{line}: {tokenizer.backend} gives other ids than Hugging Face here "
                    "(--backend hf is slower and exact; please tell us of it)"
                )
        dtype = token_dtype(tokenizer.vocab_size)
        encoded = with_eod(ids, lengths, documents.sequences, tokenizer.eod, dtype)
        text_bytes = sum(len(text.encode()) for text in texts)
        return Encoded(encoded, block.count, documents.bad, documents.blank, text_bytes)


def encoded(
    blocks: Iterator[reader.Block], encoding: Encoding, tokenizer: Tokenizer, cores: int
) -> Iterator[tuple[int, Encoded]]:
    """The blocks in their order, each with the bytes of its file that were read for it.

    The ids are good until the next block is asked for.
    """
    encode = partial(encoding.encode, tokenizer)
    if cores == 1:
        for block in blocks:
            yield block.read, encode(block)
        return
    slots = [mmap.mmap(-1, _SLOT) for _ in range(cores + _SPARE)]
    free, sent, stop = SimpleQueue[int](), SimpleQueue[tuple[int, int, Future[_Answer]] | None](), Event()
    for number in range(len(slots)):
        free.put(number)

    def feed() -> None:
        """Read, and send every block to the pool, which this thread's peer empties meanwhile."""
        try:
            for block in blocks:
                number = free.get()
                if stop.is_set():
                    return
                sent.put((block.read, number, pool.submit(_encode_in, number, *_put(block, slots[number]))))
        finally:
            sent.put(None)

    with process_pool(cores, _begin, encode, slots) as pool, ThreadPoolExecutor(1) as beside:
        feeding = beside.submit(feed)
        try:
            while item := sent.get():
                read, number, future = item
                yield read, _fetch(future.result(), slots[number])
                free.put(number)
            feeding.result()  # what reading ended with, if anything
        finally:
            stop.set()
            free.put(-1)


# What comes back: a block's documents, and how many ids lie in the slot instead of in them.
_Answer = tuple[Encoded, int | None]
# Of a worker process: what encodes a block, and the memory that it shares with its parent.
_encode: Callable[[reader.Block], Encoded]
_slots: list[mmap.mmap]


def _begin(encode: Callable[[reader.Block], Encoded], slots: list[mmap.mmap]) -> None:
    global _encode, _slots
    _encode, _slots = encode, slots


def _put(block: reader.Block, slot: mmap.mmap) -> tuple[reader.Block, int | None]:
    """Lay a block into a slot: the block without what lies there, and how many bytes that is. Rows are sent."""
    if isinstance(block.content, list):
        return block, None
    size = len(block.content)
    if size > _SLOT:
        return replace(block, content=bytes(block.content)), None
    slot[:size] = block.content
    return replace(block, content=b""), size


def _encode_in(number: int, block: reader.Block, size: int | None) -> _Answer:
    slot = _slots[number]
    encoded = _encode(block if size is None else replace(block, content=slot[:size]))
    ids = encoded.documents.ids
    if ids.nbytes > _SLOT:
        return encoded, None
    slot.seek(0)
    slot.write(ids.data)
    return replace(encoded, documents=replace(encoded.documents, ids=ids[:0])), len(ids)


def _fetch(answer: _Answer, slot: mmap.mmap) -> Encoded:
    encoded, count = answer
    if count is None:
        return encoded
    ids = cast(Ids, np.frombuffer(slot, encoded.documents.ids.dtype, count))
    return replace(encoded, documents=replace(encoded.documents, ids=ids))
