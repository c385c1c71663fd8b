"""Synthetic tasks as data sources: endless for training, a fixed set for validation."""

import numpy as np

from megarec.data.sample import Sample
from megarec.data.synthetic.task import Split, Task

EVAL_SAMPLES = 256
"""Sequences in a synthetic validation source."""

SEEDS_PER_RUN = 1 << 48


class SyntheticSource:
    """Training sequences of a task: one document each; a run's seed makes them its own."""

    def __init__(self, task: Task, *, seq_len: int, seed: int) -> None:
        self.task = task
        self.seq_len = seq_len
        self.seed = seed

    def sample(self, index: int) -> Sample:
        """Return one sequence."""
        return draw_sample(self.task, self.seed * SEEDS_PER_RUN + index, "train", self.seq_len)


class SyntheticEvalSource:
    """The same validation sequences of a task for every run."""

    bytes_per_token = None

    def __init__(self, task: Task, name: str, *, seq_len: int) -> None:
        self.task = task
        self.name = name
        self.seq_len = seq_len

    def __len__(self) -> int:
        """Return the number of sequences."""
        return EVAL_SAMPLES

    def sample(self, index: int) -> Sample:
        """Return one sequence."""
        return draw_sample(self.task, index, "valid", self.seq_len)


def draw_sample(task: Task, seed: int, split: Split, seq_len: int) -> Sample:
    """Return a sequence of a task as one document."""
    drawn = task(seed, split, seq_len)
    return Sample(drawn["input_ids"], drawn["labels"], np.zeros(seq_len, dtype=np.int32))
