"""Demonstrations as token examples: soft labels against plain counting, shards, prefetching."""

import contextlib
import dataclasses
import functools

import numpy as np
import pytest

from rlm_jax.data.countdown import (
    CountdownMix,
    draw_problems,
    make_shard,
    make_shards,
    passes_held_out,
    problem_key,
)
from rlm_jax.data.demonstrations import label_tokens, tokenize_demonstration
from rlm_jax.data.examples import TokenTable, make_example
from rlm_jax.data.generated import GeneratedSource, mix_shards
from rlm_jax.data.iterators import make_batches
from rlm_jax.data.packing import Packed
from rlm_jax.tasks.countdown_split import is_held_out
from rlm_jax.tasks.demonstrations import Demonstration, Step
from rlm_jax.text.train_tokenizer import train_puzzle_tokenizer

pytest.importorskip("sentencepiece")


def _encode(text):
    return [ord(letter) for letter in text]


def test_labels_share_what_agrees_so_far():
    labels = label_tokens(_encode("abd"), [(_encode("abc"), 0.5), (_encode("axy"), 0.25)])
    assert labels[0] == {ord("a"): 1.0}
    assert labels[1] == pytest.approx({ord("b"): 2 / 3, ord("x"): 1 / 3})
    assert labels[2] == {ord("c"): 1.0}
    assert label_tokens(_encode("zz"), [(_encode("ab"), 1.0)]) == [{ord("a"): 1.0}, {}]
    assert label_tokens(_encode("ab"), []) == [{}, {}]


def test_a_wrong_step_teaches_the_right_ones_until_it_leaves_them():
    steps = (
        Step("ab\n", (("ab\n", 0.5), ("ac\n", 0.5)), 1.0),
        Step("pq\n", (("pr\n", 1.0),), 0.0, weight=0.5),
    )
    example = tokenize_demonstration(Demonstration("P\n", steps, False, None), _encode, 2, 1)
    text = [1, *_encode("P\nab\npq\n")]
    assert example.tokens.tolist() == text
    assert example.loss_weight.tolist() == [0, 0, 0, 1, 1, 1, 0.5, 1, 0]
    assert sorted(zip(example.soft_ids[4], example.soft_weights[4], strict=True)) == [
        (ord("b"), 0.5),
        (ord("c"), 0.5),
    ]
    # The wrong token stands in the text; its label is the right one.
    assert example.soft_ids[7][example.soft_weights[7] > 0].tolist() == [ord("r")]
    assert np.flatnonzero(example.value_weight).tolist() == [5, 8]
    assert example.value_target[[5, 8]].tolist() == [1, 0]
    assert example.goals.shape == (9, 0)
    finished = tokenize_demonstration(Demonstration("P\n", steps[:1], True, 0.5), _encode, 2, None)
    assert finished.tokens.tolist() == [*_encode("P\nab\n"), 2]
    assert finished.loss_weight[-1] == 1
    assert finished.value_target[[1, 5]].tolist() == [0.5, 1.0]


def test_goals_stand_one_token_before_values():
    signs = np.array([[1, -1], [0, 1]], np.int8)
    steps = (
        Step("ab\n", (("ab\n", 1.0),), 1.0),
        Step("cd\n", (("cd\n", 1.0),), 1.0, goals=signs[1]),
    )
    shown = Demonstration("P\n", steps, False, None, signs[0])
    goals = tokenize_demonstration(shown, _encode, 2, 1).goals
    assert {at: goals[at].tolist() for at in range(9) if goals[at].any()} == {1: [1, -1], 7: [0, 1]}


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_puzzle_tokenizer(path, bare_numbers=False)
    return CountdownMix(str(path), 3, shard_examples=48, sizes=((3, 0.5), (4, 0.5)))


def test_shards_are_functions_of_their_number(mix):
    first, again, other = make_shard(mix, 0), make_shard(mix, 0), make_shard(mix, 1)
    assert len(first) == len(other) == 48
    for one, two in zip(first, again, strict=True):
        for left, right in zip(one, two, strict=True):
            np.testing.assert_array_equal(left, right)
    assert any(len(a.tokens) != len(b.tokens) for a, b in zip(first, other, strict=True))


def test_states_alone_are_short_and_carry_goals(mix):
    richer = dataclasses.replace(mix, state_share=0.5, num_goals=101)
    shard = make_shard(richer, 0)
    assert len(shard) == 48
    alone = [example for example in shard if not example.loss_weight.any()]
    assert 4 <= len(alone) <= 24
    for example in shard:
        assert example.goals.shape[1] == 101
        assert (example.goals != 0).any()
    for example in alone:
        # The state behind its first token, and what it is worth at its last.
        assert len(example.tokens) == 7
        assert np.flatnonzero(example.value_weight).tolist() == [6]
        assert np.flatnonzero(example.goals.any(-1)).tolist() == [5]


def test_lines_take_their_share(mix):
    shard = make_shard(dataclasses.replace(mix, line_share=0.5, num_goals=101), 0)
    assert len(shard) == 48
    # Of lines alone nothing is known but how they end.
    alone = [example for example in shard if not example.goals.any()]
    assert 12 <= len(alone) <= 36
    for example in alone:
        assert example.loss_weight.any()
        assert not example.value_weight.any()


def test_tries_take_their_share(mix):
    shard = make_shard(dataclasses.replace(mix, try_share=0.5), 0)
    assert len(shard) == 48
    # Where no line is right for long, values are those of lost states alone.
    tries = [
        example
        for example in shard
        if example.value_weight.sum() > 1 and not example.value_target.any()
    ]
    assert 12 <= len(tries) <= 36
    assert all(example.soft_weights.any() for example in tries)


def test_stored_examples_take_their_share_of_every_shard(mix):
    stored = TokenTable([make_example([1, 2, 3]), make_example([4, 5])])
    mixed = mix_shards(make_shards(mix), stored, share=0.25, seed=3)
    pure = make_shard(mix, 1)
    first, again, other = mixed(1), mixed(1), mixed(2)
    assert len(first) == len(pure) == 48
    taken = [one.tokens.tolist() in ([1, 2, 3], [4, 5]) for one in first]
    assert 3 <= sum(taken) <= 24
    for one, two, of_old, was_taken in zip(first, again, pure, taken, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        assert was_taken or one.tokens.tolist() == of_old.tokens.tolist()
    assert [one.tokens.tolist() in ([1, 2, 3], [4, 5]) for one in other] != taken
    with contextlib.closing(GeneratedSource(mixed, num_shards=3, shard_examples=48)) as source:
        source[0]
        # Made in another process.
        np.testing.assert_array_equal(source[48 + 5].tokens, first[5].tokens)
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 1\.5"):
        mix_shards(make_shards(mix), stored, share=1.5, seed=0)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_generated_source_resumes(mix, prefetch):
    def open_source():
        return GeneratedSource(make_shards(mix), num_shards=4, shard_examples=48, prefetch=prefetch)

    def batches(source):
        return make_batches(source, Packed(8, 128, 8), seed=0, shuffle=False)

    with contextlib.closing(open_source()) as source:
        stream = batches(source)
        whole = [next(stream) for _ in range(5)]
        assert stream.counts.examples > 48
    with contextlib.closing(open_source()) as source:
        stream = batches(source)
        for _ in range(2):
            next(stream)
        state = stream.get_state()
    with contextlib.closing(open_source()) as source:
        stream = batches(source)
        stream.set_state(state)
        for batch in whole[2:]:
            np.testing.assert_array_equal(next(stream).tokens, batch.tokens)


def _bad_shard(shard):
    return [make_example([1, 2])] * 3


def test_a_shard_of_another_size_is_refused():
    source = GeneratedSource(_bad_shard, num_shards=2, shard_examples=4, prefetch=False)
    assert len(source) == 8
    with pytest.raises(ValueError, match="shard 0 holds 3 examples, expected 4"):
        source[0]
    with pytest.raises(IndexError):
        source[8]
    with pytest.raises(ValueError, match="num_shards=0"):
        GeneratedSource(_bad_shard, num_shards=0, shard_examples=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": ((4, 0.5),)}, "accepted are shares from 0 to 1 that sum to 1"),
        ({"sizes": ((3, -0.5), (4, 1.5))}, "accepted are shares from 0 to 1 that sum to 1"),
        ({"sizes": ((3, float("nan")),)}, "accepted are shares from 0 to 1 that sum to 1"),
        # Seven numbers take the solver seconds, nine for ever.
        ({"sizes": ((7, 1.0),)}, r"sizes=\(\(7, 1.0\),\): accepted are 2 to 6 numbers"),
        ({"sizes": ((1, 1.0),)}, "accepted are 2 to 6 numbers"),
        ({"wrong_share": 1.5}, "wrong_share"),
        ({"shard_examples": 0}, "shard_examples"),
        ({"state_share": -0.5}, "state_share"),
        ({"line_share": 2.0}, "line_share"),
        ({"try_share": 1.5}, "try_share"),
    ],
)
def test_wrong_mixes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CountdownMix("tokenizer.model", 0, **fields)


def test_drawn_problems_are_not_held_out():
    problems = draw_problems(np.random.default_rng(0), 40, ((3, 0.5), (4, 0.5)))
    assert len(problems) == 40
    for problem in problems:
        numbers, target = problem.data
        assert not is_held_out(np.array([numbers]), np.array([target]))[0]
    assert problem_key("24 : 4 4 7 10") == (24, 4, 4, 7, 10)
    assert functools.reduce(max, (len(p.data[0]) for p in problems)) == 4


def test_a_solution_may_pass_what_is_held_out():
    """`24 : 1 3 9 9` is a hard puzzle of Game of 24; those of three numbers are free."""
    passing = "10 - 7 = 3 ; 1 3 9 9\n9 - 1 = 8 ; 3 8 9\n9 / 3 = 3 ; 3 8\n8 * 3 = 24"
    beside = "9 - 1 = 8 ; 7 8 9 10\n10 - 7 = 3 ; 3 8 9\n9 / 3 = 3 ; 3 8\n8 * 3 = 24"
    question = "Make 24 out of 7 1 9 10 9."
    assert passes_held_out(question, passing)
    assert not passes_held_out(question, beside)
    # Taken back, it was passed all the same.
    assert passes_held_out("24 : 1 7 9 9 10", f"10 - 7 = 3 ; 1 3 9 9\n: 1 7 9 9 10\n{beside}")
    # With another target it is no puzzle; and what is no line says nothing.
    assert not passes_held_out("25 : 1 7 9 9 10", passing)
    assert not passes_held_out(question, "#### (9 - 1) * 9 / (10 - 7)")
