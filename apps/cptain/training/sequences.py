"""What cptain tells of the tokens of a sample, in the tensors that Megatron's samples have anyway.

A token's loss mask is the number of its domain (1 where the mix names none; 0 counts for nothing), and negative where
the token is not trained on. With `data.documents = "masked"` its position is that in its document, and the last token
of a document is not trained on: what follows it is another document's first. All of it comes from the data set's index,
which knows where documents end, and not from a token that may be missing at an end, or be in a text.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from cptain.training.documents import Documents


def _pieces(data_set: Any, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The documents that a sample of a GPTDataset is cut from, in order, and how many of its tokens each has; the last
    has none where its first token is the sample's last label alone."""
    place = data_set.shuffle_index[index]
    (first, begin), (last, end) = data_set.sample_index[place], data_set.sample_index[place + 1]
    documents = data_set.document_index[first : last + 1]
    lengths = data_set.dataset.sequence_lengths[documents].astype(np.int64)
    lengths[-1] = end
    lengths[0] -= begin
    return documents, lengths


def _numbered(data_set: Any, index: int, sample: dict[str, Any]) -> dict[str, Any]:
    """With the number of each token's domain."""
    import torch

    low_level: Documents = data_set.dataset
    documents, lengths = _pieces(data_set, index)
    return {
        **sample,
        "loss_mask": sample["loss_mask"] * torch.from_numpy(low_level.numbers_of(documents).repeat(lengths)),
    }


def _masked(data_set: Any, index: int, sample: dict[str, Any]) -> dict[str, Any]:
    """With positions that begin anew in each document, whose last token is not trained on."""
    import torch

    lengths = _pieces(data_set, index)[1]
    ends = lengths.cumsum()
    positions = np.arange(ends[-1]) - (ends - lengths).repeat(lengths)
    trains = np.ones(ends[-1], dtype=np.int64)
    trains[ends[:-1][ends[:-1] > 0] - 1] = -1
    return {
        **sample,
        "position_ids": torch.from_numpy(positions),
        "loss_mask": sample["loss_mask"] * torch.from_numpy(trains),
    }


def data_set_class(content: dict[str, Any]) -> Any:
    """Megatron's GPTDataset over `Documents`, whose samples say what is to be told by blend.json.

    Args:
        content: of blend.json.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset

    tells = [_numbered] if content.get("parts") else []
    tells += [_masked] if content["documents"] == "masked" else []

    class Sequences(GPTDataset):  # type: ignore[misc]
        def __getitem__(self, idx: int | None) -> dict[str, Any]:
            sample: dict[str, Any] = super().__getitem__(idx)
            if idx is not None:  # Megatron's filling of a batch, which counts for nothing
                for tell in tells:
                    sample = tell(self, idx, sample)
            return sample

    return Sequences
