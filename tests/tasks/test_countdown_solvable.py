"""Solvable or not: against the solver that counts, and against a plain search in fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.tasks.countdown_solvable import is_solvable
from rlm_jax.tasks.countdown_solver import MAX_NUMBER, count_solutions


def search(numbers, target):
    """Every order of moves, written for being plain."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i in range(len(numbers)):
        for j in range(i):
            low, high = sorted((numbers[i], numbers[j]))
            results = {Fraction(low + high), Fraction(high - low), Fraction(low * high)}
            if low:
                results.add(Fraction(high) / low)
            rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
            for result in results:
                if result.denominator == 1 and search([*rest, int(result)], target):
                    return True
    return False


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=5, max_size=5), st.integers(0, 1500))
def test_five_numbers_against_counting(numbers, target):
    states, targets = np.sort(np.array([numbers])), np.array([target])
    assert is_solvable(states, targets)[0] == (count_solutions(states, targets)[0] > 0)


def test_four_and_fewer_against_a_plain_search():
    rng, num_found = np.random.default_rng(0), 0
    for size in (1, 2, 3, 4):
        states = np.sort(rng.integers(0, 10, (40, size)), axis=1)
        targets = rng.integers(0, 40, 40)
        found = is_solvable(states, targets)
        expected = [search(row, t) for row, t in zip(states.tolist(), targets, strict=True)]
        assert found.tolist() == expected
        num_found += found.sum()
    assert 20 < num_found < 140


def test_five_numbers_against_a_plain_search():
    rng = np.random.default_rng(1)
    states = np.sort(rng.integers(0, 6, (3, 5)), axis=1)
    targets = np.array([7, 4999, 0])
    expected = [search(row, t) for row, t in zip(states.tolist(), targets, strict=True)]
    assert is_solvable(states, targets).tolist() == expected


def test_six_numbers_against_counting():
    """Small numbers and far targets: half of these cannot be solved, and counting is quick."""
    states = np.array([[1, 1, 1, 1, 1, 2], [1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 2, 3]])
    states, targets = np.repeat(states, 4, axis=0), np.tile([0, 6, 47, 1801], 3)
    found = is_solvable(states, targets)
    assert found.tolist() == (count_solutions(states, targets) > 0).tolist()
    assert 0 < found.sum() < len(found)


def test_numbers_beyond_the_limit_are_not_made():
    most = [1000, 1000, 1000, 1, 1]
    assert is_solvable(np.array([sorted(most)]), np.array([MAX_NUMBER]))[0]
    assert not is_solvable(np.array([sorted(most)]), np.array([MAX_NUMBER + 1]))[0]
    # The only way there is over 10^10 / 10^5.
    states = np.sort(np.array([[10**5, 10**5, 10**5, 1, 1]]), axis=1)
    assert is_solvable(states, np.array([10**5]))[0] == (
        count_solutions(states, np.array([10**5]))[0] > 0
    )


def test_no_rows_give_no_answers():
    assert is_solvable(np.zeros((0, 6), np.int64), np.zeros(0, np.int64)).shape == (0,)


@pytest.mark.parametrize("size", [5, 6])
def test_equal_rows_are_asked_once_and_answered_all(size):
    states = np.sort(np.tile(np.arange(3, 3 + size), (3, 1)), axis=1)
    assert is_solvable(states, np.array([24, 24, 25])).shape == (3,)
