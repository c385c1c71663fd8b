"""Packing, labels and document numbers by hand and against a plain concatenation."""

import numpy as np
import pytest

from megarec.data.manifest import read_manifest, write_manifest
from megarec.data.rng import generator
from megarec.data.shards import ShardFolder
from megarec.data.sources import Concatenation, EvalSource, TokenSource, make_sample, window_grid
from megarec.errors import UserError

E = 256
NONE = -100
DOCUMENTS = [[1, 2, 3], [4], [5, 6]]
NUM_TOKENS = 9


def window(folder: ShardFolder, position: int, seq_len: int, bos: str) -> list[list[int]]:
    tokens, ends = Concatenation(folder, np.array([2, 0, 1])).read(position, seq_len + 1)
    sample = make_sample(tokens, ends, bos)
    assert [a.dtype for a in sample] == [np.int64, np.int64, np.int32]
    return [array.tolist() for array in sample]


def test_labels_by_hand_without_bos(make_shards) -> None:
    folder = make_shards(DOCUMENTS)
    assert window(folder, 0, 8, "none") == [
        [5, 6, E, 1, 2, 3, E, 4],
        [6, E, NONE, 2, 3, E, NONE, E],
        [0, 0, 0, 1, 1, 1, 1, 2],
    ]
    # A window that starts on a document's last token.
    assert window(folder, 2, 3, "none") == [[E, 1, 2], [NONE, 2, 3], [0, 1, 1]]


def test_labels_by_hand_with_eod_as_bos(make_shards) -> None:
    folder = make_shards(DOCUMENTS)
    assert window(folder, 0, 8, "eod") == [
        [5, 6, E, 1, 2, 3, E, 4],
        [6, E, 1, 2, 3, E, 4, E],
        [0, 0, 1, 1, 1, 1, 2, 2],
    ]
    assert window(folder, 2, 3, "eod") == [[E, 1, 2], [1, 2, 3], [0, 0, 0]]


def test_boundaries_come_from_lengths_not_from_ids(make_shards) -> None:
    folder = make_shards([[1, E, 2]])
    tokens, ends = Concatenation(folder, np.array([0])).read(0, 4)
    assert make_sample(tokens, ends, "none").labels.tolist() == [E, 2, E]


def epoch_stream(folder: ShardFolder, epoch: int) -> tuple[list[int], list[bool]]:
    """Return an epoch's tokens and last-token mask, by plain concatenation."""
    order = generator(7, "src", epoch, "documents").permutation(len(folder.lengths))
    documents = [folder.read(d, 0, int(folder.lengths[d])).tolist() for d in order]
    ends = [i == len(doc) - 1 for doc in documents for i in range(len(doc))]
    return sum(documents, []), ends


@pytest.mark.parametrize("bos", ["none", "eod"])
@pytest.mark.parametrize("seq_len", [1, 3, 4, 8])
def test_document_shuffle_is_one_endless_stream(make_shards, bos: str, seq_len: int) -> None:
    folder = make_shards(DOCUMENTS, shard_tokens=4)
    source = TokenSource(folder, "src", seq_len=seq_len, seed=7, shuffle="documents", bos=bos)
    parts = [epoch_stream(folder, epoch) for epoch in range(6)]
    tokens = np.array(sum((part[0] for part in parts), []))
    ends = np.array(sum((part[1] for part in parts), []))
    for i in range((len(tokens) - 1) // seq_len):
        cut = slice(i * seq_len, (i + 1) * seq_len + 1)
        expected = make_sample(tokens[cut], ends[cut], bos)
        for got, wanted in zip(source.sample(i), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_sample_shuffle_visits_each_window_of_an_epoch_once(make_shards) -> None:
    folder = make_shards([list(range(1, 40)), list(range(40, 60))])
    num_tokens, seq_len = 61, 4
    source = TokenSource(folder, "src", seq_len=seq_len, seed=7, shuffle="samples", bos="eod")
    index = 0
    offsets, orders = set(), []
    for epoch in range(6):
        tokens, _ = epoch_stream(folder, epoch)
        offset, count = window_grid(num_tokens, seq_len, (7, "src", epoch))
        wanted = [tokens[p : p + seq_len] for p in range(offset, offset + count * seq_len, seq_len)]
        assert 0 <= offset < seq_len and offset + (count + 1) * seq_len > num_tokens - 1
        got = [source.sample(index + i).input_ids.tolist() for i in range(count)]
        assert got != wanted and sorted(got) == sorted(wanted)
        orders.append([wanted.index(row) for row in got])
        offsets.add(offset)
        index += count
    assert len(offsets) > 1 and orders[0] != orders[1]


def test_samples_depend_on_index_alone(make_shards) -> None:
    folder = make_shards(DOCUMENTS)
    for shuffle in ("documents", "samples"):
        one, other = (
            TokenSource(folder, "src", seq_len=4, seed=1, shuffle=shuffle, bos="none")
            for _ in range(2)
        )
        forward = [one.sample(i).input_ids.tolist() for i in range(12)]
        assert [other.sample(i).input_ids.tolist() for i in reversed(range(12))] == forward[::-1]


def test_smallest_folder_for_one_sample(make_shards) -> None:
    source = TokenSource(
        make_shards([[1, 2, 3]]), "src", seq_len=3, seed=0, shuffle="samples", bos="none"
    )
    assert [source.sample(i).input_ids.tolist() for i in range(3)] == [[1, 2, 3]] * 3


def test_document_longer_than_context_keeps_all_labels(make_shards) -> None:
    source = TokenSource(
        make_shards([list(range(50))]), "s", seq_len=8, seed=0, shuffle="documents", bos="none"
    )
    labels = np.concatenate([source.sample(i).labels for i in range(6)])
    assert labels.tolist() == list(range(1, 49))


@pytest.mark.parametrize(("bos", "first"), [("none", {0, 4, 6}), ("eod", {0})])
@pytest.mark.parametrize("seq_len", [1, 2, 4, 8, 50])
def test_eval_predicts_each_token_once(make_shards, bos: str, first: set, seq_len: int) -> None:
    folder = make_shards(DOCUMENTS)
    source = EvalSource(folder, "v", seq_len=seq_len, bos=bos)
    samples = [source.sample(i) for i in range(len(source))]
    assert all(len(array) == seq_len for sample in samples for array in sample)
    labels = np.concatenate([sample.labels for sample in samples])
    predicted = {1 + i: int(label) for i, label in enumerate(labels) if label != NONE}
    stream = [1, 2, 3, E, 4, E, 5, 6, E]
    assert predicted == {i: token for i, token in enumerate(stream) if i not in first}
    assert source.bytes_per_token == 6 / NUM_TOKENS


def test_ids_beyond_the_manifest_are_refused(make_shards) -> None:
    folder = make_shards(DOCUMENTS)
    write_manifest(folder.path, read_manifest(folder.path).model_copy(update={"max_id": 5}))
    source = EvalSource(ShardFolder(folder.path), "v", seq_len=4, bos="none")
    with pytest.raises(UserError, match="token id 256, the manifest's largest is 5: damaged"):
        source.sample(0)
