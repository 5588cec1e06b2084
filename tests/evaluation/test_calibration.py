"""AUC and ECE against plain counting, and their intervals on data made for it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.evaluation.calibration import (
    Judged,
    area_under_roc,
    calibration_error,
    summarize,
)

# Few different values: ties and borders of bins are common.
ITEMS = st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=40)


def count_pairs(items):
    """The chance that a true item beats a false one, pair by pair."""
    wins = [
        (true > false) + (true == false) / 2
        for true, is_true in items
        for false, is_false in items
        if is_true and not is_false
    ]
    return sum(wins) / len(wins) if wins else math.nan


def walk_bins(items, num_bins):
    """The calibration error as its definition reads."""
    error = 0.0
    for place in range(num_bins):
        inside = [
            (value, label)
            for value, label in items
            if place / num_bins <= value < (place + 1) / num_bins
            or (value == 1 and place == num_bins - 1)
        ]
        if inside:
            mean_value = sum(value for value, _ in inside) / len(inside)
            share = sum(label for _, label in inside) / len(inside)
            error += len(inside) / len(items) * abs(mean_value - share)
    return error


@settings(max_examples=40, deadline=None)
@given(ITEMS)
def test_the_area_is_a_share_of_pairs(items):
    values, labels = np.array([v for v, _ in items]), np.array([label for _, label in items])
    assert float(area_under_roc(values, labels)) == pytest.approx(count_pairs(items), nan_ok=True)
    flipped = area_under_roc(-values, labels)
    assert float(flipped) == pytest.approx(1 - count_pairs(items), nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(ITEMS)
def test_the_error_is_the_definition(items):
    """In quarters, which floats hold exactly, so that borders are no matter of rounding."""
    items = [(value % 17 / 16, label) for value, label in items]
    values, labels = np.array([v for v, _ in items]), np.array([label for _, label in items])
    found = calibration_error(values, labels, num_bins=4)
    assert float(found) == pytest.approx(walk_bins(items, 4))


@settings(max_examples=40, deadline=None)
@given(ITEMS, st.data())
def test_weights_count_items_several_times(items, data):
    times = data.draw(st.lists(st.integers(0, 3), min_size=len(items), max_size=len(items)))
    times[0] += 1
    items = [(value / 20, label) for value, label in items]
    values, labels = np.array([v for v, _ in items]), np.array([label for _, label in items])
    weights = np.array([times, [1] * len(items)], float)
    repeated = np.repeat(np.arange(len(items)), times)
    for statistic in (area_under_roc, calibration_error):
        rows = statistic(values, labels, weights)
        assert rows.shape == (2,)
        alone = statistic(values[repeated], labels[repeated])
        assert rows[0] == pytest.approx(float(alone), nan_ok=True)
        assert rows[1] == pytest.approx(float(statistic(values, labels)), nan_ok=True)


def draw(num_problems, states, rng, noise):
    """States whose values say what they are, but for noise that a whole problem shares."""
    for number in range(num_problems):
        shift = rng.normal() * noise
        for _ in range(states):
            solvable = bool(rng.random() < 0.4)
            value = 1 / (1 + math.exp(-(2 * solvable - 1 + shift + rng.normal())))
            yield Judged(f"p{number}", 1 + int(rng.integers(2)), value, solvable)


def test_depths_are_summed_up_apart_and_together():
    judged = list(draw(50, 12, np.random.default_rng(0), 0.5))
    one, two, both = summarize(judged)
    assert [one.depth, two.depth, both.depth] == [1, 2, None]
    assert one.num_states + two.num_states == both.num_states == 600
    assert one.num_solvable + two.num_solvable == sum(state.solvable for state in judged)
    assert both.num_problems == 50
    pairs = [(state.value, state.solvable) for state in judged]
    assert both.auc.value == pytest.approx(count_pairs(pairs))
    assert both.ece.value == pytest.approx(walk_bins(pairs, 10))
    for part in (one, two, both):
        for estimate in (part.auc, part.ece):
            assert 0 <= estimate.low <= estimate.value + 0.05
            assert estimate.value - 0.05 <= estimate.high <= 1
            assert estimate.high > estimate.low
    assert summarize(judged) == [one, two, both]


def test_states_that_stand_together_say_less():
    """600 states in 20 problems of one mind are worth less than 600 on their own."""
    rng = np.random.default_rng(1)
    apart, together = (list(draw(n, 600 // n, rng, 3.0)) for n in (600, 20))
    widths = [summarize(states)[-1].ece for states in (apart, together)]
    assert widths[1].high - widths[1].low > 2 * (widths[0].high - widths[0].low)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 12 draws the true AUC, known from many states, lies inside of nearly all intervals."""
    truth = summarize(draw(500, 5, np.random.default_rng(2), 1.0))[-1].auc.value
    found = [summarize(draw(40, 5, np.random.default_rng(s), 1.0))[-1].auc for s in range(10, 22)]
    assert sum(one.low <= truth <= one.high for one in found) >= 9


def test_what_is_not_defined_is_nan():
    (one, _) = summarize([Judged("a", 0, 0.75, True), Judged("b", 0, 0.5, True)])
    assert math.isnan(one.auc.value)
    assert one.ece.value == pytest.approx(0.375)
    assert summarize([]) == []


def test_values_are_chances():
    with pytest.raises(ValueError, match=r"1\.5: accepted are 0 to 1"):
        calibration_error(np.array([0.5, 1.5]), np.array([True, False]))
