"""Blind search: its moves are the solver's, and it finds what there is to find."""

import jax
import numpy as np
import pytest

from rlm_jax.data.splits import load_split
from rlm_jax.evaluation.blind import MAX_NUMBERS, _compile, _list_moves, search_blindly
from rlm_jax.evaluation.intervals import wilson_interval
from rlm_jax.reasoning.strategies.best_first import make_best_first
from rlm_jax.reasoning.strategies.puct import make_puct
from rlm_jax.tasks.countdown_solver import list_moves


@pytest.mark.parametrize("size", [2, 3, 4])
def test_moves_are_those_of_the_solver(size):
    rng = np.random.default_rng(size)
    states = np.sort(rng.integers(1, 12, (30, size)), axis=1)
    padded = np.full((30, MAX_NUMBERS), -1, np.int32)
    padded[:, :size] = states[:, ::-1]
    found, legal = map(np.asarray, jax.jit(jax.vmap(_list_moves))(padded))
    moves = list_moves(states)
    for row in range(30):
        expected = sorted(tuple(s) for s in moves.states[row][moves.legal[row]].tolist())
        mine = [tuple(x for x in s[::-1] if x >= 0) for s in found[row][legal[row]].tolist()]
        assert sorted(mine) == expected


@pytest.mark.parametrize("make", [make_best_first, make_puct])
def test_a_search_of_everything_solves_all(make):
    problems = [problem.data for problem, _ in load_split("countdown4-inputs").examples[:16]]
    problems = [(numbers, target) for numbers, target in problems]
    strategy = make(num_children=24, num_lanes=4, max_depth=3)
    few = search_blindly(strategy, problems, num_nodes=1 + 24 * 12, max_expansions=8, seed=0)
    assert np.asarray(few.expansions).max() <= 8
    assert np.asarray(few.solved).mean() < 0.7
    # The limit is an argument of what is compiled.
    before = _compile.cache_info().currsize
    one = search_blindly(strategy, problems, num_nodes=1 + 24 * 12, max_expansions=1, seed=0)
    assert np.asarray(one.expansions).tolist() == [1] * 16
    assert _compile.cache_info().currsize == before
    # A four-number tree has at most 24 states of three and 288 of two numbers.
    all_of_it = search_blindly(
        strategy, problems, num_nodes=1 + 24 * 340, max_expansions=320, seed=0
    )
    assert np.asarray(all_of_it.solved).all()


def test_too_many_numbers_are_named():
    strategy = make_puct(num_children=2, max_depth=3)
    with pytest.raises(ValueError, match="7 numbers"):
        search_blindly(strategy, [((1,) * 7, 24)], num_nodes=9, max_expansions=2, seed=0)


def test_wilson_intervals():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(1, 48)
    assert (round(100 * low, 1), round(100 * high, 1)) == (0.4, 10.9)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="11 right of 10"):
        wilson_interval(11, 10)
