"""Loaders: one global order for any ranks and micro-batches, errors, validation passes."""

import threading

import numpy as np
import pytest
import torch

from megarec.data.loader import Batch, EvalLoader, TrainLoader
from megarec.data.sample import IGNORED, Sample
from megarec.errors import UserError

T = 4


class Counting:
    """Sample i holds i everywhere; sample `bad` raises."""

    name = "counting"
    bytes_per_token = 1.0

    def __init__(self, length: int = 0, bad: int = -1) -> None:
        self.length = length
        self.bad = bad
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int) -> Sample:
        self.threads.add(threading.current_thread().name)
        if index == self.bad:
            raise UserError(f"sample {index} is damaged")
        ids = np.full(T, index)
        return Sample(ids, ids + 1, np.zeros(T, np.int32))


def rows(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.input_ids[:, 0].tolist()]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_order_is_the_same_for_any_ranks_and_micro_batches(ranks: int, micro: int) -> None:
    loaders = [
        TrainLoader(
            Counting(), global_batch_size=8, micro_batch_size=micro, data_rank=r, data_ranks=ranks
        )
        for r in range(ranks)
    ]
    for step in (0, 1, 2, 7, 3):
        parts = [loader.micro_batches(8 * step) for loader in loaders]
        assert sum((rows(part) for part in parts), []) == list(range(8 * step, 8 * step + 8))
        assert all(len(part) == 8 // ranks // micro for part in parts)
        assert parts[0][0].input_ids.shape == (micro, T)
    for loader in loaders:
        loader.close()


def test_batch() -> None:
    loader = TrainLoader(
        Counting(), global_batch_size=2, micro_batch_size=2, data_rank=0, data_ranks=1
    )
    (batch,) = loader.micro_batches(0)
    loader.close()
    tensors = (batch.input_ids, batch.labels, batch.doc_ids)
    assert [t.dtype for t in tensors] == [torch.int64, torch.int64, torch.int32]
    assert batch.labels.tolist() == [[1] * T, [2] * T] and batch.num_tokens == 8
    batch.labels[0, :3] = IGNORED
    assert batch.num_tokens == 5


def test_reads_in_one_background_thread_and_stops() -> None:
    source = Counting()
    loader = TrainLoader(source, global_batch_size=1, micro_batch_size=1, data_rank=0, data_ranks=1)
    for step in range(3):
        loader.micro_batches(step)
    loader.close()
    assert source.threads == {"loader_0"}
    assert "loader_0" not in {thread.name for thread in threading.enumerate()}


def test_background_error_is_raised_at_its_step() -> None:
    loader = TrainLoader(
        Counting(bad=5), global_batch_size=2, micro_batch_size=1, data_rank=0, data_ranks=1
    )
    assert rows(loader.micro_batches(0)) + rows(loader.micro_batches(2)) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="sample 5 is damaged"):
        loader.micro_batches(4)
    assert rows(loader.micro_batches(6)) == [6, 7]
    loader.close()


def test_indivisible_batch_shows_the_arithmetic() -> None:
    with pytest.raises(UserError, match=r"=12 is not divisible .* 5 \* 2 = 10"):
        TrainLoader(Counting(), global_batch_size=12, micro_batch_size=5, data_rank=0, data_ranks=2)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("max_samples", "expected"), [(None, 7), (5, 5), (100, 7)])
def test_eval_covers_each_sample_once(ranks: int, max_samples: int | None, expected: int) -> None:
    sources = [Counting(7), Counting(1)]
    sources[1].name = "other"
    passes = [
        list(
            EvalLoader(
                sources,
                micro_batch_size=2,
                data_rank=rank,
                data_ranks=ranks,
                max_samples=max_samples,
            )
        )
        for rank in range(ranks)
    ]
    names = [[name for name, _ in one] for one in passes]
    assert all(one == names[0] for one in names)
    found = [
        (name, row[0].item())
        for batches in zip(*passes, strict=True)
        for name, batch in batches
        for row, labels in zip(batch.input_ids, batch.labels, strict=True)
        if (labels != IGNORED).any()
    ]
    assert found == [("counting", i) for i in range(expected)] + [("other", 0)]
