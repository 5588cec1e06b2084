"""Knapsack: the solver against every subset, both answers, the dial."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.tasks import knapsack
from rlm_jax.tasks.base import Gold

items_lists = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=9)


@settings(max_examples=200, deadline=None)
@given(items_lists, st.integers(0, 120))
def test_solver_against_every_subset(items, limit):
    subsets = itertools.chain.from_iterable(
        itertools.combinations(items, size) for size in range(len(items) + 1)
    )
    fitting = (subset for subset in subsets if sum(weight for weight, _ in subset) <= limit)
    best = max(sum(value for _, value in subset) for subset in fitting)
    value, chosen = knapsack.solve(items, limit)
    assert value == best == sum(items[i][1] for i in chosen)
    assert sum(items[i][0] for i in chosen) <= limit
    assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize(("difficulty", "num_items"), [(0.0, 3), (0.5, 16), (1.0, 30)])
def test_the_gold_is_right_and_the_gap_follows_the_dial(difficulty, num_items):
    examples = knapsack.generate(1, 60, difficulty)
    for problem, gold in examples:
        limit, target, *items = problem.data
        assert len(items) == num_items
        assert all(1 <= size <= 20 for item in items for size in item)
        assert num_items * 5 <= limit <= num_items * 15
        optimum, _ = knapsack.solve(items, limit)
        assert gold.answer == str(optimum >= target)
        widest = max(1, optimum * (0.5 - 0.45 * difficulty))
        assert optimum - widest < target <= optimum + 1 + widest
        assert f"most {limit} in total and be worth at least {target}?" in problem.question
    share = sum(gold.answer == "True" for _, gold in examples) / len(examples)
    assert 0.3 < share < 0.7


def test_levels():
    ((problem, gold),) = knapsack.generate(0, 1, 0.2)
    wrong = {"True": "False", "False": "True"}[str(gold.answer)]
    assert knapsack.TASK.verify(problem, gold, f"#### {gold.answer}").level == 2
    assert knapsack.TASK.verify(problem, gold, f"#### {wrong}").level == 0
    assert knapsack.TASK.verify(problem, gold, "#### 42").level == -1
    assert knapsack.TASK.verify(problem, Gold(), "#### True").level is None


def test_weights_below_one_are_refused():
    with pytest.raises(ValueError, match=r"weights.*0"):
        knapsack.solve([(0, 1)], 5)


def test_the_example_is_right():
    assert knapsack.solve([(3, 4), (5, 7), (2, 3)], 7) == (10, (1, 2))
    assert knapsack.TASK.extract(knapsack.EXAMPLE[1]) == "True"
