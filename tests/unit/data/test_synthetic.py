"""Synthetic tasks: determinism, splits, masks, exact oracles, chance, bad sizes."""

from itertools import pairwise

import numpy as np
import pytest

from megarec.data.synthetic import Task, make_task
from megarec.data.synthetic.group import elements
from megarec.data.synthetic.source import SyntheticEvalSource, SyntheticSource
from megarec.errors import UserError

LENGTH = 48
TASKS = {
    "copy": make_task("copy"),
    "selective_copy": make_task("selective_copy"),
    "induction": make_task("induction"),
    "mqar": make_task("mqar"),
    "mqar_fill": make_task("mqar", random_fill=True, vocab_size=64),
    "mqar_dense": make_task("mqar", dense=True, num_pairs=3),
    "parity": make_task("parity"),
    "z7": make_task("group", group="z7"),
    "s3": make_task("group", group="s3"),
    "a5": make_task("group", group="a5"),
    "s5": make_task("group", group="s5"),
    "s5_generators": make_task("group", group="s5", generators=True),
    "khop": make_task("khop"),
    "khop_context": make_task(
        "khop", in_context=True, num_entities=6, num_relations=1, num_queries=5
    ),
    "nested_logic": make_task("nested_logic"),
    "hmm": make_task("hmm"),
}
EXACT = [name for name in TASKS if name != "hmm"]


def test_all_registered_tasks_are_here() -> None:
    Task.discover()
    assert set(Task.members) == {task.type for task in TASKS.values()}


@pytest.mark.parametrize("name", TASKS)
def test_shapes_ids_and_determinism(name: str) -> None:
    task = TASKS[name]
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    for length in (LENGTH, LENGTH + 16):
        assert task.problems(length) == []
        for seed in range(20):
            one, again = task(seed, "train", length), task(seed, "train", length)
            for key in ("input_ids", "labels"):
                assert one[key].shape == (length,) and one[key].dtype == np.int64
                np.testing.assert_array_equal(one[key], again[key])
            labels = one["labels"][one["labels"] != -100]
            assert one["input_ids"].min() >= 0 and one["input_ids"].max() < task.num_ids
            assert len(labels) and labels.min() >= 0 and labels.max() < task.num_ids
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize("name", TASKS)
def test_splits_and_seeds_are_disjoint(name: str) -> None:
    sets = {
        split: {TASKS[name](seed, split, 64)["input_ids"].tobytes() for seed in range(100)}
        for split in ("train", "valid", "test")
    }
    assert len(set.union(*sets.values())) == 300


@pytest.mark.parametrize("name", EXACT)
def test_oracle_is_exact(name: str) -> None:
    task = TASKS[name]
    for seed in range(1000):
        sample = task(seed, "test", LENGTH)
        np.testing.assert_array_equal(task.oracle(sample["meta"]), sample["labels"])


# With two generators only, the first few products are few: repeats are likelier than chance.
@pytest.mark.parametrize("name", [name for name in EXACT if name != "s5_generators"])
def test_answers_of_other_sequences_score_chance(name: str) -> None:
    task = TASKS[name]
    labels = np.stack([task(seed, "test", LENGTH)["labels"] for seed in range(1000)])
    asked = labels != -100
    hits = (labels == np.roll(labels, 1, axis=0))[asked & np.roll(asked, 1, axis=0)]
    spread = np.sqrt(task.chance / len(hits))
    assert hits.mean() == pytest.approx(task.chance, abs=6 * spread)


def test_copy_by_hand() -> None:
    sample = make_task("copy", num_symbols=4)(0, "train", 8)
    a, b, c = sample["input_ids"][1:4]
    assert sample["input_ids"].tolist() == [4, a, b, c, 5, a, b, 4]
    assert sample["labels"].tolist() == [-100] * 4 + [a, b, c, -100]


def test_mqar_layout() -> None:
    sample = TASKS["mqar"](3, "train", LENGTH)
    ids, labels = sample["input_ids"], sample["labels"]
    keys, values = ids[0:16:2], ids[1:16:2]
    assert len(set(keys)) == len(set(values)) == 8
    assert keys.min() >= 1 and keys.max() < 128 <= values.min() and values.max() < 256
    queries = np.flatnonzero(labels != -100)
    assert (queries >= 16).all() and (queries % 2 == 0).all()
    assert sorted(ids[queries]) == sorted(keys)
    assert ids[16:].astype(bool).sum() == 8
    near = [np.flatnonzero(TASKS["mqar"](s, "train", 256)["labels"] != -100) for s in range(200)]
    assert np.median(np.concatenate(near)) < 16 + 240 / 4  # the power law favours near queries


def test_group_axioms_and_orders() -> None:
    orders = {"z2": 2, "z60": 60, "s3": 6, "a4": 12, "a5": 60, "s5": 120}
    assert {group: len(elements(group)) for group in orders} == orders
    assert make_task("parity").oracle({"input_ids": [1, 0, 1, 1], "group": "z2"}).tolist() == [
        1, 1, 0, 1,
    ]  # fmt: skip
    reached = {
        int(label)
        for seed in range(50)
        for label in TASKS["s5_generators"](seed, "train", 64)["labels"]
    }
    assert len(reached) == 120
    assert len(set(TASKS["s5_generators"](0, "train", 64)["input_ids"])) == 2


def test_hmm_oracle_is_the_known_entropy_and_beats_the_bigram() -> None:
    losses = []
    for matrix_seed in range(3):
        task = make_task("hmm", matrix_seed=matrix_seed)
        samples = [task(seed, "valid", 1000) for seed in range(8)]
        total = 0.0
        counts = np.ones((8, 8))
        for sample in samples:
            log_probs = task.oracle(sample["meta"])
            np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1)
            total -= log_probs[np.arange(1000), sample["labels"]].mean() / len(samples)
            np.add.at(counts, (sample["input_ids"], sample["labels"]), 1)
        joint = counts / counts.sum()
        bigram = -(joint * np.log(joint / joint.sum(axis=1, keepdims=True))).sum()
        assert total < bigram - 0.3
        losses.append(total)
    assert min(losses) > 0.8 and max(losses) < 1.1  # 0.93 to 1.02 over three published seeds


def test_hmm_oracle_equals_enumeration() -> None:
    task = make_task("hmm", num_states=3, vocab_size=4)
    transitions, emissions, stationary = task.matrices
    np.testing.assert_allclose(stationary @ transitions, stationary, atol=1e-12)
    np.testing.assert_allclose(transitions.sum(axis=1), 1)
    ids = [2, 0, 3]
    probs = np.zeros(4)
    for path in np.ndindex(3, 3, 3, 3):
        p = stationary[path[0]] * np.prod([transitions[a, b] for a, b in pairwise(path)])
        probs += (
            p
            * np.prod([emissions[s, x] for s, x in zip(path, ids, strict=False)])
            * (emissions[path[-1]])
        )
    expected = np.log(probs / probs.sum())
    np.testing.assert_allclose(task.oracle({"input_ids": ids})[-1], expected)


def test_sources() -> None:
    task = make_task("mqar")
    one, other = (SyntheticSource(task, seq_len=LENGTH, seed=seed) for seed in (0, 1))
    valid = SyntheticEvalSource(task, "v", seq_len=LENGTH)
    sample = one.sample(5)
    assert sample.doc_ids.tolist() == [0] * LENGTH and sample.doc_ids.dtype == np.int32
    np.testing.assert_array_equal(sample.input_ids, one.sample(5).input_ids)
    rows = [source.sample(i).input_ids.tobytes() for source in (one, other, valid) for i in (0, 1)]
    assert len(set(rows)) == 6 and len(valid) == 256


@pytest.mark.parametrize(
    ("name", "sizes", "length"),
    [
        ("copy", {}, 2),
        ("selective_copy", {}, 15),
        ("induction", {}, 2),
        ("mqar", {}, 49),
        ("mqar", {}, 30),
        ("mqar", {"vocab_size": 16}, 48),
        ("group", {"group": "z5", "generators": True}, 8),
        ("khop", {}, 39),
        ("khop", {"min_hops": 5}, 48),
        ("khop", {"in_context": True}, 423),
        ("khop", {"num_relations": 1, "num_entities": 4}, 48),
        ("nested_logic", {}, 24),
        ("nested_logic", {"min_depth": 5}, 48),
        ("hmm", {"num_states": 2}, 8),
        ("hmm", {"support": 9}, 8),
    ],
)
def test_sizes_that_do_not_fit_are_named(name: str, sizes: dict, length: int) -> None:
    assert len(make_task(name, **sizes).problems(length)) == 1


def test_unknown_names_and_sizes() -> None:
    with pytest.raises(UserError, match="unknown synthetic task type 'mqra'; expected one of"):
        make_task("mqra")
    with pytest.raises(UserError) as caught:
        make_task("mqar", pairs=3, num_pairs=True)
    assert len(caught.value.lines) == 2
    with pytest.raises(UserError, match="synthetic.group: .*got 's9'"):
        make_task("group", group="s9")
