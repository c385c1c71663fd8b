"""The depth tasks: their layout, exact hops and depths, balance of the answers."""

from collections import Counter

import numpy as np
import pytest

from megarec.data.synthetic import make_task
from megarec.data.synthetic.task import Ids, Task

OPERANDS = {2: 1, 3: 2, 4: 2}


def rows(task: Task, length: int, count: int) -> list[tuple[Ids, Ids]]:
    samples = [task(seed, "test", length) for seed in range(count)]
    return [(sample["input_ids"], sample["labels"]) for sample in samples]


def test_khop_layout() -> None:
    task = make_task("khop", num_entities=5, num_relations=3, num_queries=2)
    sizes = {"num_entities": 5, "num_relations": 3, "num_queries": 2}
    three = make_task("khop", min_hops=3, max_hops=3, **sizes)
    for ids, labels in rows(three, 10, 50):
        assert (ids[[0, 4]] < 5).all() and ids.tolist()[8:] == [8, 8]
        assert all(5 <= id < 8 for id in ids[[1, 2, 3, 5, 6, 7]])
        assert np.flatnonzero(labels != -100).tolist() == [3, 7]
    hops = Counter(
        int(np.flatnonzero(labels != -100)[0]) for _, labels in rows(task, 10, 4000)
    )  # the first query's last relation lies as far in as it has hops
    assert set(hops) == {1, 2, 3, 4} and min(hops.values()) > 880


def test_khop_answers_compose_one_hop_answers() -> None:
    one = make_task("khop", max_hops=1, num_queries=16)
    facts = {
        split: {
            (int(e), int(r)): int(labels[t])
            for seed in range(200)
            for sample in [one(seed, split, 32)]
            for ids, labels in [(sample["input_ids"], sample["labels"])]
            for t in range(1, 32, 2)
            for e, r in [ids[t - 1 : t + 1]]
        }
        for split in ("train", "test")
    }
    assert facts["train"] == facts["test"] and len(facts["train"]) == 16 * 8
    assert one.functions.tolist() != make_task("khop", function_seed=1).functions.tolist()
    five = make_task("khop", min_hops=5, max_hops=5, num_queries=1)
    for ids, labels in rows(five, 6, 200):
        place = int(ids[0])
        for relation in ids[1:]:
            place = facts["train"][place, int(relation)]
        assert labels[5] == place


@pytest.mark.parametrize("hops", [1, 3, 5])
def test_khop_in_context_goes_exactly_so_far(hops: int) -> None:
    task = make_task(
        "khop", num_entities=6, num_relations=1, min_hops=hops, max_hops=hops, in_context=True
    )
    answers, cycles, orders = Counter(), set(), set()
    for ids, labels in rows(task, 18 + 8 * (hops + 1), 300):
        facts = ids[:18].reshape(6, 3)
        assert sorted(facts[:, 0]) == list(range(6)) and (facts[:, 1] == 6).all()
        assert (labels[:18] == -100).all()
        function = dict(zip(*facts[:, [0, 2]].T.tolist(), strict=True))
        cycle = [0]
        while function[cycle[-1]] != 0:
            cycle.append(function[cycle[-1]])
        assert len(cycle) == 6
        cycles.add(tuple(cycle))
        orders.add(tuple(facts[:, 0]))
        for start, answer in zip(ids[18 :: hops + 1], labels[18 + hops :: hops + 1], strict=True):
            assert answer == cycle[(cycle.index(start) + hops) % 6] != start
            answers[int(answer)] += 1
    assert len(cycles) > 100 and len(orders) > 200  # of 120 and 720
    assert set(answers) == set(range(6)) and min(answers.values()) > 320  # of 2400 / 6


def parse(tokens: list[int]) -> tuple[int, int, list[int]]:
    """Read one expression from the front: its depth, its value and what follows."""
    first, rest = tokens[0], tokens[1:]
    depths, values = [-1], []
    for _ in range(OPERANDS.get(first, 0)):
        depth, value, rest = parse(rest)
        depths.append(depth)
        values.append(value)
    value = {0: 0, 1: 1, 2: 1 - sum(values), 3: int(sum(values) == 2), 4: int(sum(values) > 0)}
    return max(depths) + 1, value[first], rest


@pytest.mark.parametrize(("depth", "mean_length"), [(1, 3.67), (4, 12.5), (8, 39.4)])
def test_nested_logic_depth_value_and_lengths(depth: int, mean_length: float) -> None:
    # Half of the values are 1: with 0 for 1 and & for |, a tree is as likely and has not its value.
    task = make_task("nested_logic", min_depth=depth, max_depth=depth)
    lengths, values = [], []
    for ids, labels in rows(task, 2000, 10 * depth):
        rest, place = ids.tolist(), 0
        while rest and rest[0] != 6:
            found, value, after = parse(rest)
            place += len(rest) - len(after)
            assert found == depth and after[0] == 5 and labels[place] == value
            lengths.append(len(rest) - len(after) + 1)
            values.append(value)
            rest, place = after[1:], place + 1
        assert set(rest) <= {6} and (labels != -100).sum() == (ids == 5).sum()
    assert np.mean(lengths) == pytest.approx(mean_length, rel=0.03)
    assert np.mean(values) == pytest.approx(0.5, abs=0.02)


def test_nested_logic_draws_depths_and_sides() -> None:
    depths, longer = Counter(), Counter()
    for ids, _ in rows(make_task("nested_logic", min_depth=2, max_depth=4), 1000, 40):
        rest = ids.tolist()
        while rest and rest[0] != 6:
            depth, _, after = parse(rest)
            depths[depth] += 1
            if rest[0] in (3, 4):
                left, _, right = parse(rest[1:])
                longer[left - parse(right)[0] > 0] += left != parse(right)[0]
            rest = after[1:]
    total = sum(depths.values())
    assert set(depths) == {2, 3, 4} and min(depths.values()) > 0.3 * total
    assert longer[True] == pytest.approx(sum(longer.values()) / 2, rel=0.1)


def test_nested_logic_always_asks() -> None:
    task = make_task("nested_logic", min_depth=8, max_depth=8)
    assert task.problems(78) and not task.problems(79)
    assert all((labels != -100).any() for _, labels in rows(task, 79, 200))
