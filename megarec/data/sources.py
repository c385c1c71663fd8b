"""Token sources: sample i of the seeded stream of a shard folder, and its windows in order."""

from bisect import bisect_right
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from megarec.data.rng import generator
from megarec.data.sample import IGNORED, Bos, Sample, make_sample
from megarec.data.shards import ShardFolder
from megarec.errors import UserError

Shuffle = Literal["documents", "samples"]


class Source(Protocol):
    """An endless sequence of samples of one length; sample i depends on i alone."""

    def sample(self, index: int) -> Sample:
        """Return one sample."""


class Concatenation:
    """The documents of a folder in a given order, addressed by token position."""

    def __init__(self, folder: ShardFolder, order: npt.NDArray[np.integer]) -> None:
        self.folder = folder
        self.order = order
        self.stops = np.cumsum(folder.lengths[order])

    def read(
        self, position: int, count: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return up to ``count`` tokens from a position, and the mask of documents' last tokens.

        Both are (n,); n is smaller at the end. Raises UserError for an id that the manifest rules
        out: the shards are damaged.
        """
        stop = min(position + count, int(self.stops[-1]))
        tokens = np.empty(stop - position, dtype=np.int64)
        ends = np.zeros(stop - position, dtype=np.bool_)
        place = int(np.searchsorted(self.stops, position, side="right"))
        done = position
        while done < stop:
            document = int(self.order[place])
            doc_stop = int(self.stops[place])
            doc_start = doc_stop - int(self.folder.lengths[document])
            until = min(doc_stop, stop)
            tokens[done - position : until - position] = self.folder.read(
                document, done - doc_start, until - doc_start
            )
            if until == doc_stop:
                ends[until - position - 1] = True
            done = until
            place += 1
        largest = int(tokens.max(initial=0))
        if largest > self.folder.manifest.max_id:
            raise UserError(
                f"{self.folder.path}: found token id {largest}, the manifest's largest is "
                f"{self.folder.manifest.max_id}: damaged; run data_prep/verify.py on it"
            )
        return tokens, ends


class Epoch(Concatenation):
    """One pass over the documents in a seeded order, and over its windows of T + 1 tokens.

    ``offset`` moves the borders of the windows from epoch to epoch; at least one window fits.
    """

    def __init__(self, folder: ShardFolder, seq_len: int, key: tuple[int, str, int]) -> None:
        super().__init__(folder, generator(*key, "documents").permutation(len(folder.lengths)))
        self.seq_len = seq_len
        self._key = key

    @cached_property
    def windows(self) -> npt.NDArray[np.int64]:
        """The position of each window, int64, in the seeded order of the visit."""
        offset, count = window_grid(self.folder.manifest.tokens, self.seq_len, self._key)
        return offset + self.seq_len * generator(*self._key, "windows").permutation(count)


def window_grid(num_tokens: int, seq_len: int, key: tuple[int, str, int]) -> tuple[int, int]:
    """Return an epoch's first window position, seeded in [0, T), and how many windows fit."""
    offset = int(generator(*key, "offset").integers(min(seq_len, num_tokens - seq_len)))
    return offset, (num_tokens - 1 - offset) // seq_len


class TokenSource:
    """Training samples from a shard folder; see DataConfig for ``shuffle`` and ``bos``.

    Documents are permuted anew in each epoch by (seed, name, epoch). The folder must hold at least
    seq_len + 1 tokens.
    """

    def __init__(
        self, folder: ShardFolder, name: str, *, seq_len: int, seed: int, shuffle: Shuffle, bos: Bos
    ) -> None:
        self.folder = folder
        self.name = name
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self.bos: Bos = bos
        self._epochs: dict[int, Epoch] = {}
        self._first_window = [0]  # of each epoch, extended as far as was asked for

    def sample(self, index: int) -> Sample:
        """Return one sample of seq_len tokens."""
        if self.shuffle == "documents":
            tokens, ends = self._read_stream(index * self.seq_len)
        else:
            epoch, window = self._locate(index)
            position = int(self._epoch(epoch).windows[window])
            tokens, ends = self._epoch(epoch).read(position, self.seq_len + 1)
        return make_sample(tokens, ends, self.bos)

    def _read_stream(self, position: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Read T + 1 tokens; all epochs have the same number of tokens."""
        epoch, position = divmod(position, self.folder.manifest.tokens)
        tokens, ends = self._epoch(epoch).read(position, self.seq_len + 1)
        missing = self.seq_len + 1 - len(tokens)
        if missing:
            more_tokens, more_ends = self._epoch(epoch + 1).read(0, missing)
            tokens, ends = np.append(tokens, more_tokens), np.append(ends, more_ends)
        return tokens, ends

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the epoch of a sample and its rank among the epoch's windows."""
        while self._first_window[-1] <= index:
            key = (self.seed, self.name, len(self._first_window) - 1)
            _, count = window_grid(self.folder.manifest.tokens, self.seq_len, key)
            self._first_window.append(self._first_window[-1] + count)
        epoch = bisect_right(self._first_window, index) - 1
        return epoch, index - self._first_window[epoch]

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            # Samples are read in order: this epoch and the one before are all that is needed.
            self._epochs = {n: epoch for n, epoch in self._epochs.items() if n == number - 1}
            key = (self.seed, self.name, number)
            self._epochs[number] = Epoch(self.folder, self.seq_len, key)
        return self._epochs[number]


class EvalSource:
    """The windows of a shard folder in order: each token but the first is a label exactly once.

    With ``bos="none"`` a document's first token is not predicted. The last window is padded.
    """

    def __init__(self, folder: ShardFolder, name: str, *, seq_len: int, bos: Bos) -> None:
        self.name = name
        self.seq_len = seq_len
        self.bos: Bos = bos
        self.bytes_per_token = folder.manifest.text_bytes / folder.manifest.tokens
        self._stream = Concatenation(folder, np.arange(len(folder.lengths)))
        self._num_tokens = folder.manifest.tokens

    def __len__(self) -> int:
        """Return the number of windows."""
        return -(-(self._num_tokens - 1) // self.seq_len)

    def sample(self, index: int) -> Sample:
        """Return one window; padding repeats the last input and has label -100."""
        tokens, ends = self._stream.read(index * self.seq_len, self.seq_len + 1)
        sample = make_sample(tokens, ends, self.bos)
        pad = (0, self.seq_len - len(sample.labels))
        return Sample(
            np.pad(sample.input_ids, pad, mode="edge"),
            np.pad(sample.labels, pad, constant_values=IGNORED),
            np.pad(sample.doc_ids, pad, mode="edge"),
        )
