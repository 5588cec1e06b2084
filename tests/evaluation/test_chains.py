"""Chains read off records written by hand, and prices against worked examples."""

import math

import pytest
from record_trees import make_tree_record

from rlm_jax.evaluation.chains import (
    Chain,
    Price,
    count_tokens_in_turn,
    price_accuracy,
    read_chains,
)

# Three chains side by side: one dies of an illegal step, one is right, one is cut off.
SIDE_BY_SIDE = [
    (0, "aaa", False, True),
    (0, "bb", False, True),
    (0, "c", False, True),
    (1, "xx", False, False),
    (2, "right", True, True),
    (3, "cc", False, True),
]


def test_chains_keep_their_order_and_what_they_cost():
    assert read_chains(make_tree_record(SIDE_BY_SIDE)) == [
        Chain(5, "aaaxx", False),
        Chain(7, "bbright", True),
        Chain(3, "ccc", False),
    ]
    assert read_chains(make_tree_record([])) == []
    refused_twice = [(0, "a", False, True), (1, "xx", False, False), (1, "b", True, True)]
    refused_twice += [(0, "yyy", False, False)]
    assert read_chains(make_tree_record(refused_twice)) == [
        Chain(4, "ab", True),
        Chain(3, "yyy", False),
    ]
    with pytest.raises(ValueError, match="node 1 has 2 children"):
        read_chains(
            make_tree_record([(0, "a", False, True), (1, "b", False, True), (1, "c", False, True)])
        )


def test_drawing_in_turn_stops_at_the_first_that_is_right():
    chains = read_chains(make_tree_record(SIDE_BY_SIDE))
    assert count_tokens_in_turn(chains, lambda text: text.endswith("right")) == 12
    assert count_tokens_in_turn(chains[::-1], lambda text: text.endswith("right")) == 10
    # Only what is finished can be proven.
    assert count_tokens_in_turn(chains, lambda text: text.startswith("a")) == 15
    assert count_tokens_in_turn([], bool) == 0


def test_prices_lie_between_measurements():
    measured = [(400.0, 0.8), (100.0, 0.6), (1600.0, 0.9)]
    assert price_accuracy(measured, 0.7).tokens == pytest.approx(200)
    assert price_accuracy(measured, 0.8).tokens == pytest.approx(400)
    assert price_accuracy(measured, 0.85).tokens == pytest.approx(800)
    assert price_accuracy(measured, 0.6) == Price(100.0)
    assert price_accuracy(measured, 0.5) == Price(100.0, "<")
    assert price_accuracy(measured, 0.95) == Price(1600.0, ">")
    with pytest.raises(ValueError, match="no measurements"):
        price_accuracy([], 0.5)


def test_more_tokens_are_never_worth_less():
    """A measurement below an earlier one is noise, but what lies beyond it was tried."""
    measured = [(100.0, 0.6), (200.0, 0.55), (400.0, 0.7), (800.0, 0.7)]
    price = price_accuracy(measured, 0.65)
    assert price.bound == ""
    assert price.tokens == pytest.approx(math.sqrt(100 * 400))
    assert price_accuracy(measured, 0.71) == Price(800.0, ">")
