"""Loaders: the batches of a training step for one rank, and whole passes over validation data."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from megarec.data.sample import IGNORED, Sample
from megarec.data.sources import Source
from megarec.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Rows of a batch: ``input_ids`` int64, ``labels`` int64, ``doc_ids`` int32, all (B, T).

    In training ``first`` is the number of the first row in the stream of samples.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    doc_ids: torch.Tensor
    first: int = 0

    @property
    def num_tokens(self) -> int:
        """The number of predicted positions."""
        return int((self.labels != IGNORED).sum())


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one length to a batch."""
    input_ids, labels, doc_ids = (
        torch.from_numpy(np.stack(column)) for column in zip(*samples, strict=True)
    )
    return Batch(input_ids, labels, doc_ids)


def accumulation_steps(global_batch_size: int, micro_batch_size: int, data_ranks: int) -> int:
    """Return the micro-batches of a rank in one step; UserError, with the arithmetic, if uneven."""
    at_once = micro_batch_size * data_ranks
    if global_batch_size % at_once:
        raise UserError(
            f"train.global_batch_size={global_batch_size} is not divisible by micro_batch_size * "
            f"data ranks = {micro_batch_size} * {data_ranks} = {at_once}; change one of them"
        )
    return global_batch_size // at_once


class TrainLoader:
    """The micro-batches of a rank, step by step; the next step is read in the background.

    A step that begins at sample i reads samples [i, i + G) of the dataset, whatever the number of
    ranks; a rank takes a contiguous slice of them. Raises UserError as ``accumulation_steps``.
    """

    def __init__(
        self,
        dataset: Source,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_ranks: int,
    ) -> None:
        steps = accumulation_steps(global_batch_size, micro_batch_size, data_ranks)
        self._dataset = dataset
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rows = steps * micro_batch_size
        self._offset = data_rank * self._rows
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def micro_batches(self, first: int) -> list[Batch]:
        """Return this rank's micro-batches of the step whose first sample is `first`.

        Any step may be asked for. An error in the background is raised here.
        """
        if self._next is None or self._next[0] != first:
            self._next = first, self._executor.submit(self._read, first)
        batches = self._next[1].result()
        following = first + self._global_batch_size
        self._next = following, self._executor.submit(self._read, following)
        return batches

    def close(self) -> None:
        """Stop the background thread."""
        self._executor.shutdown(cancel_futures=True)

    def _read(self, first: int) -> list[Batch]:
        begin = first + self._offset
        starts = range(begin, begin + self._rows, self._micro_batch_size)
        return [self._collate(start) for start in starts]

    def _collate(self, start: int) -> Batch:
        indices = range(start, start + self._micro_batch_size)
        batch = collate([self._dataset.sample(index) for index in indices])
        return replace(batch, first=start)


class FiniteSource(Protocol):
    """A validation source: so many samples, under a name.

    ``bytes_per_token`` turns a loss in nats per token to bits per byte; None where there is no
    text.
    """

    @property
    def name(self) -> str:
        """The name to report."""

    @property
    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes of text per token."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def sample(self, index: int) -> Sample:
        """Return one sample."""


class EvalLoader:
    """All samples of all validation sources, in order; iterating gives (source name, batch).

    Every rank gets the same number of batches: rows beyond a source's end have no labels.
    ``max_samples`` limits each source to its first samples.
    """

    def __init__(
        self,
        sources: Sequence[FiniteSource],
        *,
        micro_batch_size: int,
        data_rank: int,
        data_ranks: int,
        max_samples: int | None = None,
    ) -> None:
        self.sources = sources
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_ranks = data_ranks
        self._max_samples = max_samples

    def __iter__(self) -> Iterator[tuple[str, Batch]]:
        """Yield the batches of this rank, source after source."""
        for source in self.sources:
            total = min(len(source), self._max_samples or len(source))
            stride = self._micro_batch_size * self._data_ranks
            for first in range(0, total, stride):
                start = first + self._data_rank * self._micro_batch_size
                indices = range(start, start + self._micro_batch_size)
                yield source.name, collate([_row(source, index, total) for index in indices])


def _row(source: FiniteSource, index: int, total: int) -> Sample:
    if index < total:
        return source.sample(index)
    last = source.sample(total - 1)
    return last._replace(labels=np.full_like(last.labels, IGNORED))
