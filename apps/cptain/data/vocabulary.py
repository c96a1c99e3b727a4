"""[model.vocabulary]: the tokenizer of a run that adds tokens to the model's own, and which of its ids are new.

<run>/tokenizer holds the extended tokenizer, and vocabulary.json with the pieces of every new token; whichever stage
comes first makes it, from the base's files alone, so that every run and every node makes the same bytes. The ids of the
base stay what they are and the new ones follow: so an id's row of the embedding is new or the base's, and never both.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cptain.atomic import atomic_folder
from cptain.data.extended_tokenizer import pieces_of_new, read_tokens, tokenizer_files, with_tokens
from cptain.data.tokenizer import tokenizer_facts, tokenizer_hash
from cptain.errors import bad_usage
from cptain.history import read_history
from cptain.lock import lock
from cptain.model.architecture import Architecture, model_folder, read_architecture
from cptain.model.vocabulary import Over, check_vocabulary
from cptain.run_file import RunFile

RECORD = "vocabulary.json"
_OF_TOKENIZERS = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]  # of a hub id; no weights


@dataclass(frozen=True)
class Extension:
    """Which ids a tokenizer adds to another's, and what their rows begin as.

    Attributes:
        made_of: SHA-256 over all that decides the rest but `initialise`.
        base: hash of the model's own tokenizer (`cptain.data.tokenizer.tokenizer_hash`).
        tokenizer: hash of the extended one.
        first: the first new id: the base's highest and one more.
        pieces: the base's ids that each new token consists of, in the order of the new ids, which have no holes.
        initialise: see `cptain.run_model.Vocabulary`.
    """

    made_of: str
    base: str
    tokenizer: str
    first: int
    pieces: list[list[int]]
    initialise: str

    @property
    def size(self) -> int:
        """Ids of the extended tokenizer: the highest and one more."""
        return self.first + len(self.pieces)

    def rows(self, base_rows: int) -> int:
        """Rows of the extended embedding. Where the base's has rows to spare, new tokens take those first."""
        return max(base_rows, self.size)

    def described(self) -> dict[str, Any]:
        """What decides the rows: the pieces follow from the two tokenizers."""
        return {"base": self.base, "tokenizer": self.tokenizer, "size": self.size, "initialise": self.initialise}


def read_extension(folder: Path) -> Extension | None:
    """The extension that is recorded in a folder; None where there is none that can be read."""
    try:
        return Extension(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_extension(folder: Path, extension: Extension) -> None:
    """Record an extension in a folder that is not yet under its final name."""
    (folder / RECORD).write_text(json.dumps(asdict(extension), separators=(",", ":")), encoding="utf-8")


def extension_of(run: RunFile) -> Extension | None:
    """What [model.vocabulary] adds, whether it is made or not; None where the run file has no such table.

    Raises:
        CptainError: the tokenizer does not begin with the base's ids, or adds none; a token that the base has already;
            a base that has no tokenizer.json, or more ids than its model has rows.
    """
    if run.model.vocabulary is None:
        return None
    known = read_extension(run.folder / "tokenizer")
    if known is None or known.made_of != _made_of(run):
        known, _ = _extend(run)
    return replace(known, initialise=run.model.vocabulary.initialise)


def tokenizer_folder(run: RunFile) -> Path:
    """The folder of the tokenizer that the run trains with; an extended one is made where it is not there.

    Raises:
        CptainError: see `extension_of`; or, with exit status 2, the run was trained with another vocabulary.
    """
    _refuse_another(run)
    if run.model.vocabulary is None:
        return model_folder(run.tokenizer)
    folder, made_of = run.folder / "tokenizer", _made_of(run)
    if not _is_made(folder, made_of):
        extension, files = _extend(run)
        # An array's tasks come here together, and none may find the folder gone while another replaces it.
        with lock(run.folder / ".tokenizer.lock", f"{folder}"):
            if not _is_made(folder, made_of):
                with atomic_folder(folder) as partial:
                    _write(partial, files)
                    write_extension(partial, extension)
    return folder


def check_size(run: RunFile, size: int, count: Callable[[int], Over | None]) -> None:
    """Refuse a tokenizer of `size` ids that is larger than the model. An extended one never is: its ids get rows.

    Args and errors are those of `check_vocabulary`.
    """
    if run.model.vocabulary is None:
        check_vocabulary(tokenizer_folder(run), size, run.model.hf, count)


def run_architecture(run: RunFile, only: list[str] | None = None) -> Architecture:
    """The architecture that a run trains: the base model's, with rows for the tokens of [model.vocabulary].

    Args:
        run: the run.
        only: files that are needed of a hub id; None: all of it.

    Raises:
        CptainError: see `read_architecture` and `extension_of`.
    """
    return extended(read_architecture(model_folder(run.model.hf, only)), extension_of(run))


def extended(architecture: Architecture, extension: Extension | None) -> Architecture:
    """An architecture with rows for new tokens, where there are any."""
    if extension is None:
        return architecture
    return replace(architecture, vocab_size=extension.rows(architecture.vocab_size))


def _refuse_another(run: RunFile) -> None:
    """Refuse a vocabulary that is not the one that the run, or the one that it branches off, was trained with: before
    anything is made of it."""
    branch = run.train.from_
    trained = any(run.checkpoints_folder.glob("iter_*"))
    folder = run.folder if trained or branch is None else branch.run
    for last in read_history(folder)[-1:] if trained or branch else ():
        had, extension = last.run["model"].get("vocabulary"), extension_of(run)
        if had is None and extension is None:
            return
        if had is None or extension is None or last.data.get("tokenizer") != extension.tokenizer:
            bad_usage(
                f"model.vocabulary: not what {folder} was trained with: its rows would be those of other tokens: set "
                "it back, or export that run and begin another with the export as model.hf"
            )


def _made_of(run: RunFile) -> str:
    vocabulary = run.model.vocabulary
    assert vocabulary is not None
    digest = hashlib.sha256()
    for name in (run.base_tokenizer, vocabulary.tokenizer):
        for file, content in tokenizer_files(model_folder(name, _OF_TOKENIZERS)).items() if name else ():
            digest.update(f"{file}\0{len(content)}\0".encode() + content)
        digest.update(b"\0")
    if vocabulary.add:
        digest.update("\n".join(read_tokens(vocabulary.add)).encode())
    return digest.hexdigest()


def _is_made(folder: Path, made_of: str) -> bool:
    known = read_extension(folder)
    return known is not None and known.made_of == made_of and tokenizer_hash(folder) == known.tokenizer


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _extend(run: RunFile) -> tuple[Extension, dict[str, bytes]]:
    """What the run adds, and the files of the extended tokenizer."""
    vocabulary = run.model.vocabulary
    assert vocabulary is not None
    folder = model_folder(run.base_tokenizer, _OF_TOKENIZERS)
    kept = run.tokenizers_folder
    base = tokenizer_facts(str(folder), kept)
    check_vocabulary(folder, base.size, run.model.hf, lambda limit: None)
    if vocabulary.add:
        files = with_tokens(folder, vocabulary.add, base)
        with tempfile.TemporaryDirectory() as made:
            _write(Path(made), files)
            larger, name = tokenizer_facts(made, kept), f"{folder} with {vocabulary.add}"
    else:
        source = model_folder(str(vocabulary.tokenizer), _OF_TOKENIZERS)
        files, larger, name = tokenizer_files(source), tokenizer_facts(str(source), kept), str(source)
    pieces = pieces_of_new(folder, base, name, larger)
    extension = Extension(_made_of(run), base.hash, larger.hash, base.size, pieces, vocabulary.initialise)
    return extension, files
