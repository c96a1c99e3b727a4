"""What train and export ask before they begin: is the data what the run file says, whole, and of the model?"""

from pathlib import Path

from cptain.data.indexed_dataset import ids_over
from cptain.data.manifest import Record, read_manifest
from cptain.data.many_files import answers
from cptain.data.tokenized import changed_pair
from cptain.data.tokenizer import has_tokenizer, tokenizer_facts, tokenizer_hash
from cptain.data.vocabulary import check_size, tokenizer_folder
from cptain.errors import CptainError
from cptain.model.vocabulary import Over
from cptain.run_file import RunFile

_LOOKED_AT = 1 << 30  # bytes of ids that show how much of the data a model too small cannot hold


def check_data(run: RunFile) -> list[Record]:
    """The records of the data that the run trains on.

    Raises:
        CptainError: no manifest, data made of other files or by another recipe than the run file's, a pair that is
            missing or of another size, or a tokenizer that is larger than the model.
    """
    records = read_manifest(run.data_folder, run.data.sources)
    made = records[0].recipe
    folder = tokenizer_folder(run)
    if differences := made.differences(run, tokenizer_hash(folder)):
        raise CptainError(f"{run.data_folder}: made with {'; with '.join(differences)}: run preprocess again")
    for record in records:
        if wrong := record.missing_output(run.data_folder):
            raise CptainError(f"{wrong}: run preprocess again")
    for wrong in answers(changed_pair, [record for record in records if record.is_tokenized]):
        if wrong:
            raise CptainError(f"{wrong}: run preprocess again")
    check_size(run, made.tokenizer_size, lambda limit: _tokens_over(run, records, limit))
    return records


def check_tokenizer(run: RunFile) -> Path:
    """The folder of the run's tokenizer, which is no larger than the model; the data may be gone or of another.

    Raises:
        CptainError: see `check_size`; or model.tokenizer names a folder without one.
    """
    folder = tokenizer_folder(run)
    if not has_tokenizer(folder) and run.model.tokenizer is None:
        return folder  # a model alone
    try:
        records = read_manifest(run.data_folder, run.data.sources)
    except CptainError:
        records = []
    if records and records[0].recipe.tokenizer == tokenizer_hash(folder):
        size = records[0].recipe.tokenizer_size
    else:
        records, size = [], tokenizer_facts(run.tokenizer, run.tokenizers_folder).size
    check_size(run, size, lambda limit: _tokens_over(run, records, limit))
    return folder


def _tokens_over(run: RunFile, records: list[Record], limit: int) -> Over | None:
    pairs = [run.data_folder / record.prefix for record in records if not record.missing_output(run.data_folder)]
    over, looked = ids_over(pairs, limit, _LOOKED_AT)
    return Over(over, looked, f"of {run.data_folder}") if looked else None
