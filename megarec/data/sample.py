"""A training sample: inputs, labels and document numbers cut from a stream of tokens."""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""The label of a position that is not predicted."""

Bos = Literal["none", "eod"]


class Sample(NamedTuple):
    """One row of a batch.

    ``input_ids`` int64 (T,); ``labels`` int64 (T,), the next token or -100; ``doc_ids`` int32
    (T,), non-decreasing from 0, a new number where a document starts.
    """

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    doc_ids: npt.NDArray[np.int32]


def make_sample(tokens: npt.NDArray[np.int64], ends: npt.NDArray[np.bool_], bos: Bos) -> Sample:
    """Make a sample of T tokens out of T + 1 and the mask of documents' last tokens, (T + 1,).

    With ``bos="none"`` nothing predicts across a document's end: the label there is -100, and the
    next document starts after it. With ``bos="eod"`` the end is the next document's first input.
    """
    input_ids, labels, ends = tokens[:-1], tokens[1:].copy(), ends[:-1]
    if bos == "none":
        labels[ends] = IGNORED
        starts = np.concatenate([[False], ends[:-1]])
    else:
        starts = ends.copy()
        starts[0] = False
    return Sample(input_ids, labels, np.cumsum(starts, dtype=np.int32))
