"""States and all that they make, as batches by number."""

import itertools

import numpy as np
import pytest

from rlm_jax.data.countdown_states import (
    StateBatch,
    StateMix,
    draw_asked,
    list_problems,
    make_asked,
    make_states,
)
from rlm_jax.data.generated import make_ahead
from rlm_jax.tasks.countdown import NUM_GOALS
from rlm_jax.tasks.countdown_split import HARD_24, is_held_out_input, is_held_out_target
from rlm_jax.tasks.countdown_walks import label_goals

MIX = StateMix(seed=3, num_states=400)


def _make(numbers: list[int]) -> set[int]:
    """All that numbers make, by trying everything."""
    if len(numbers) == 1:
        return set(numbers)
    made: set[int] = set()
    for i, j in itertools.combinations(range(len(numbers)), 2):
        low, high = sorted((numbers[i], numbers[j]))
        rest = [numbers[k] for k in range(len(numbers)) if k not in (i, j)]
        results = [low + high, high - low, low * high]
        if low and high % low == 0:
            results.append(high // low)
        for result in results:
            made |= _make([*rest, result])
    return made


def test_labels_are_what_trying_everything_finds():
    batch = make_states(MIX, 0)
    assert batch.items.shape == (400, 5)
    assert batch.goals.shape == (400, NUM_GOALS)
    told = np.arange(NUM_GOALS) % 10 != 3
    sizes = set()
    for items, goals in list(zip(batch.items.tolist(), batch.goals, strict=True))[:120]:
        numbers = [number for number in items if number >= 0]
        sizes.add(len(numbers))
        made = _make(numbers)
        expected = np.array([1 if goal in made else -1 for goal in range(NUM_GOALS)])
        known = told & (goals != 0)
        np.testing.assert_array_equal(goals[known], expected[known])
        assert not goals[~told].any()
        # But for the hard puzzles with target 24, states of a test set teach nothing at all.
        held_out = len(numbers) > 3 and is_held_out_input(np.array([numbers]))[0]
        unknown = 0 if held_out else known.sum()
        assert unknown in (told.sum(), told.sum() - 1, 0)
        assert bool(known.any()) != held_out
    assert sizes == {2, 3, 4, 5}


def test_what_is_held_out_teaches_nothing():
    rng = np.random.default_rng(0)
    states = np.sort(rng.integers(1, 100, (4000, 4)), axis=1)
    held_out = states[is_held_out_input(states)][:5]
    assert len(held_out) == 5
    assert not label_goals(held_out, NUM_GOALS).any()
    puzzles = np.array(sorted(HARD_24))
    hard = label_goals(puzzles[~is_held_out_input(puzzles)], NUM_GOALS)
    assert len(hard) > 90
    assert not hard[:, 24].any()
    assert hard[:, 25].all()
    targets = np.arange(NUM_GOALS)
    taught = list_problems(
        StateBatch(np.array([[-1, 9, 2, -1]]), label_goals(np.array([[2, 9]]), NUM_GOALS))
    )
    assert (11, 2, 9) in taught
    assert (12, 2, 9) in taught
    assert len(taught) == NUM_GOALS - is_held_out_target(targets).sum()
    assert not label_goals(np.array([[3, 4, 5]]), NUM_GOALS)[0, is_held_out_target(targets)].any()


def test_a_batch_is_a_function_of_its_number():
    first, again, other = make_states(MIX, 7), make_states(MIX, 7), make_states(MIX, 8)
    for here, there in zip(first, again, strict=True):
        np.testing.assert_array_equal(here, there)
    assert (first.items != other.items).any()
    assert first.items.dtype == np.int32
    assert first.goals.dtype == np.int8
    counts = (first.items >= 0).sum(axis=1)
    assert abs((counts == 3).mean() - 0.62) < 0.08
    assert (first.items.max(axis=1) > 99).any()


def test_quotients_lead_on():
    """A share of the states are large products that divide evenly, or numbers on the way there."""
    mix = StateMix(seed=0, num_states=300, sizes=((2, 0.4), (3, 0.4), (4, 0.2)), quotient_share=1.0)
    rest = StateMix(seed=0, num_states=300, sizes=mix.sizes)
    for number in range(2):
        items, goals = make_states(mix, number)
        for state in items[(items >= 0).sum(axis=1) == 2].tolist():
            high, low = sorted(state, reverse=True)[:2]
            assert high % low == 0
            assert high // low <= 200
            assert (high > 99) & (2 <= low <= 99)
        assert (items.max(axis=1) > 2048).mean() > 0.2
        assert (goals[items.max(axis=1) > 2048] > 0).any(axis=1).mean() > 0.5
        ordinary = make_states(rest, number)
        large = ordinary.items.max(axis=1) > 2048
        assert large.mean() < 0.05


def test_another_process_makes_the_same_batches():
    with make_ahead(_number_states, 2, num_ahead=2) as batches:
        for number, batch in zip(range(2, 5), batches, strict=False):
            np.testing.assert_array_equal(batch.items, _number_states(number).items)


def _number_states(number):
    return make_states(StateMix(seed=1, num_states=6), number)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": ((3, 0.5),)}, "accepted are shares from 0 to 1 that sum to 1"),
        ({"sizes": ((6, 1.0),)}, r"sizes=\(\(6, 1.0\),\): accepted are 2 to 5 numbers"),
        ({"num_states": 0}, "num_states must be >= 1, got 0"),
        ({"small_share": 1.5}, r"small_share must lie in \[0, 1\], got 1.5"),
        ({"quotient_share": -0.1}, r"quotient_share must lie in \[0, 1\], got -0.1"),
        ({"deep_share": 0.7, "whole_share": 0.6}, "their sum is at most 1"),
    ],
)
def test_mixes_that_are_none(fields, message):
    with pytest.raises(ValueError, match=message):
        StateMix(seed=0, **fields)


def test_goals_that_are_asked_about_stand_for_all():
    batch, asked = make_states(MIX, 2), make_asked(MIX, 7, 2)
    np.testing.assert_array_equal(asked.items, batch.items)
    assert asked.goals.shape == asked.labels.shape == asked.weights.shape == (400, 7)
    rows = zip(batch.goals, asked.goals, asked.labels, asked.weights, strict=True)
    for signs, goals, labels, weights in rows:
        drawn = goals[weights > 0]
        assert len(set(drawn.tolist())) == len(drawn)
        np.testing.assert_array_equal(signs[drawn], np.where(labels[weights > 0] > 0, 1, -1))
        for label, sign, most in ((1, 1, 3), (0, -1, 4)):
            there = (signs == sign).sum()
            assert (weights[labels == label] > 0).sum() == min(there, most)
            assert weights[labels == label].sum() == pytest.approx(there)
    again, other = make_asked(MIX, 7, 2), make_asked(MIX, 7, 3)
    np.testing.assert_array_equal(again.goals, asked.goals)
    assert (other.goals != asked.goals).any()


def test_every_goal_is_asked_about_as_often_as_others():
    """Of those with one label, in one state: no goal is drawn more often."""
    states = np.tile([[2, 5, 9]], (3000, 1))
    goals = label_goals(states[:1], NUM_GOALS)
    order = np.random.default_rng(0).random((len(states), NUM_GOALS))
    drawn, _, weights = draw_asked(np.repeat(goals, len(states), axis=0), order, 1, 4)
    there = np.flatnonzero(goals[0] > 0)
    counts = np.bincount(drawn[weights > 0], minlength=NUM_GOALS)
    assert counts[there].sum() == counts.sum() == 4 * len(states)
    expected = 4 * len(states) / len(there)
    assert np.abs(counts[there] - expected).max() < 5 * expected**0.5
