import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.data.overlap import (
    exact_text,
    find_overlap,
    permuted_text,
    require_disjoint,
    split_words,
)
from rlm_jax.tasks import gsm8k
from rlm_jax.tasks.base import Problem

STORY = "Ann has 12 red pens and 3 blue ones , buys 1,000 more and sells half of them to Ben ."


def kinds_of(overlap):
    return [(match.kind, match.train, match.test) for match in overlap.matches]


def test_texts_are_compared_without_case_spacing_and_punctuation():
    assert split_words("Ann's 1,000 PENS cost $2.50!") == [
        "ann",
        "s",
        "1000",
        "pens",
        "cost",
        "2.50",
    ]
    assert exact_text("How many  pens?\n") == exact_text("how many pens")
    assert exact_text("Compute 3 + 4.") != exact_text("Compute 3 - 4.")
    assert exact_text("1, 2, 3") == "1 2 3" != exact_text("1,234")
    assert permuted_text("4 4 7 10") == permuted_text("10, 7 4 4") == "10 4 4 7"
    assert exact_text("\uff12 kg") == exact_text("2 KG")  # the full-width digit


def test_a_match_is_of_the_strictest_kind():
    words = STORY.split()
    shuffled = " ".join(random.Random(0).sample(words, len(words)))
    train = ["something else", STORY.upper(), shuffled, "Now: " + STORY + " How many has she left?"]
    assert kinds_of(find_overlap(train, [STORY])) == [("exact", 1, 0)]
    assert kinds_of(find_overlap(train[2:], ["x", STORY])) == [("permuted", 0, 1)]
    overlap = find_overlap(train[3:], [STORY, "x"])
    assert kinds_of(overlap) == [("ngram", 0, 0)]
    assert overlap.ngram_share.tolist() == [1.0, 0.0]
    assert (overlap.num_train, overlap.num_test) == (1, 2)
    assert not find_overlap(train[:1], [STORY]).matches
    assert not find_overlap(train[2:], [STORY], permuted_key=None, ngram_words=None).matches


def test_the_share_of_ngrams_is_counted_over_all_training_texts():
    words = [f"w{chr(97 + i)}" for i in range(20)]
    test, head, tail = " ".join(words), " ".join(words[:14]), " ".join(words[6:20])
    assert find_overlap([head], [test]).ngram_share[0] == pytest.approx(2 / 8)
    assert find_overlap([head, tail], [test]).ngram_share[0] == pytest.approx(4 / 8)
    assert kinds_of(find_overlap(["x", tail], [test], max_ngram_share=0.2)) == [("ngram", 1, 0)]
    short = " ".join(words[:10])
    assert find_overlap([head], [short]).ngram_share[0] == 1.0  # by runs of 8
    assert find_overlap([head], [" ".join(words[:7])]).ngram_share[0] == 0.0
    assert find_overlap(["a b c d"], ["c d e"], ngram_words=2).ngram_share[0] == 0.5


@settings(max_examples=60, deadline=None)
@given(
    train=st.lists(st.text("ab1 ", min_size=1, max_size=8), max_size=12),
    test=st.lists(st.text("ab1 ", min_size=1, max_size=8), max_size=8),
)
def test_matches_are_those_of_a_double_loop(train, test):
    expected = []
    for j, problem in enumerate(test):
        for kind, key in (("exact", split_words), ("permuted", lambda t: sorted(split_words(t)))):
            places = [i for i, text in enumerate(train) if key(text) == key(problem)]
            if places:
                expected.append((kind, places[0], j))
                break
    assert kinds_of(find_overlap(iter(train), iter(test), ngram_words=None)) == expected


def countdown(numbers, target):
    return Problem(f"{numbers} -> {target}", (tuple(numbers), target))


def test_puzzles_are_compared_by_their_own_keys():
    options = {
        "exact_key": lambda problem: problem.data,
        "permuted_key": lambda problem: (tuple(sorted(problem.data[0])), problem.data[1]),
        "ngram_words": None,
    }
    test = [countdown((4, 4, 7, 10), 24), countdown((1, 2, 3, 4), 10)]
    train = [countdown((10, 4, 7, 4), 24), countdown((1, 2, 3, 4), 11)]
    assert kinds_of(find_overlap(train, test, **options)) == [("permuted", 0, 0)]
    assert not require_disjoint(train[1:], test, **options).matches
    rng = np.random.default_rng(0)
    many = [countdown(row.tolist(), 25) for row in rng.integers(1, 100, (2000, 4))]
    assert not require_disjoint(many, test, **options).matches
    assert kinds_of(find_overlap([*many, test[1]], test, **options)) == [("exact", 2000, 1)]


def test_a_run_is_refused_with_the_first_pair_and_the_counts():
    train = ["one two", "three four", "five six"]
    test = ["two one", "seven", "Five, six!", "four three"]
    message = (
        r"3 of 4 test problems .* \(1 exact, 2 permuted, 0 ngram\).*"
        r"problem 2 'Five, six!' and training example 2 'five six' \(exact\)"
    )
    with pytest.raises(ValueError, match=message):
        require_disjoint(iter(train), iter(test))
    overlap = require_disjoint(train, test[1:2])
    assert (overlap.num_train, overlap.num_test, overlap.matches) == (3, 1, [])


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="at least 2, not 1"):
        find_overlap([], [], ngram_words=1)
    with pytest.raises(ValueError, match=r"\[0, 1\), not 1.0"):
        find_overlap([], [], max_ngram_share=1.0)


def test_the_published_split_of_gsm8k_is_disjoint_and_a_leak_is_found(shared_data):
    train = [problem for problem, _ in gsm8k.load(shared_data / "gsm8k/train.jsonl")]
    test = [problem for problem, _ in gsm8k.load(shared_data / "gsm8k/test.jsonl")]
    overlap = require_disjoint(train, test)
    assert overlap.ngram_share.argmax() == 602
    assert 0.5 < overlap.ngram_share.max() < 0.6
    assert (overlap.ngram_share > 0).sum() < 10
    leaked = [*train[:50], test[7]]
    with pytest.raises(ValueError, match=r"1 of 1319 .* problem 7 .* example 50 .*\(exact\)"):
        require_disjoint(leaked, test)
