"""Decoding without replacement against every step there is: a table of all of them, in numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.inference.tried import follow_tried, make_tried, take_away

NUM_TOKENS, END, LONGEST = 4, 3, 3
MOST_TRIED = 12


@functools.cache
def tables():
    """Log-probabilities of the next token behind every prefix, and of every step."""
    rng = np.random.default_rng(0)
    prefixes = [
        prefix
        for length in range(LONGEST)
        for prefix in itertools.product(range(END), repeat=length)
    ]
    logits = {prefix: rng.normal(size=NUM_TOKENS) for prefix in prefixes}
    logs = {prefix: row - np.log(np.exp(row).sum()) for prefix, row in logits.items()}
    steps = {}
    for prefix in prefixes:
        for token in range(NUM_TOKENS):
            step = (*prefix, token)
            if token == END or len(step) == LONGEST:
                steps[step] = [logs[step[:i]][step[i]] for i in range(len(step))]
    assert sum(np.exp(sum(each)) for each in steps.values()) == pytest.approx(1)
    return logs, steps


def as_tried(steps):
    """One row's tried steps, padded."""
    _, known = tables()
    tokens = np.zeros((1, MOST_TRIED, LONGEST), np.int32)
    logprobs = np.full(tokens.shape, 7.0, np.float32)  # Behind a step's end nothing is read.
    length = np.zeros((1, MOST_TRIED), np.int32)
    for place, step in enumerate(steps):
        tokens[0, place, : len(step)] = step
        logprobs[0, place, : len(step)] = known[step]
        length[0, place] = len(step)
    return _make(*map(jnp.asarray, (tokens, length, logprobs)))


_make, _take_away, _follow = map(jax.jit, (make_tried, take_away, follow_tried))


@given(st.sets(st.sampled_from(sorted(tables()[1])), max_size=MOST_TRIED), st.randoms())
@settings(max_examples=60, deadline=None)
def test_what_is_left_is_the_model_without_the_tried_steps(tried_steps, random):
    """Along any step that is left, each token's chance is that of the remaining steps it leads to,
    over that of all remaining steps behind the tokens before it."""
    logs, steps = tables()
    left = {step: np.exp(sum(each)) for step, each in steps.items() if step not in tried_steps}
    step = random.choice(sorted(left))
    tried = as_tried(sorted(tried_steps))
    for index, token in enumerate(step):
        prefix = step[:index]

        def mass(prefix):
            return sum(p for other, p in left.items() if other[: len(prefix)] == prefix)

        logits = jnp.asarray(logs[prefix], jnp.float32)[None]
        found = np.asarray(jax.nn.softmax(_take_away(logits, tried, jnp.int32(index)), -1))[0]
        wanted = [mass((*prefix, each)) / mass(prefix) for each in range(NUM_TOKENS)]
        np.testing.assert_allclose(found, wanted, atol=2e-5)
        tried = _follow(tried, jnp.int32(index), jnp.asarray([token], jnp.int32))


def test_greedy_choices_without_replacement_take_every_step_once():
    """Each is the likeliest token of what is left, and no step comes twice until all were there."""
    logs, steps = tables()
    written = []
    for _ in range(MOST_TRIED):
        tried, step = as_tried(written), ()
        while step not in steps:
            index = jnp.int32(len(step))
            logits = jnp.asarray(logs[step], jnp.float32)[None]
            token = int(_take_away(logits, tried, index)[0].argmax())
            tried = _follow(tried, index, jnp.asarray([token], jnp.int32))
            step = (*step, token)
        assert step not in written
        written.append(step)
    # The first is the greedy one.
    assert written[0][0] == logs[()].argmax()


def test_what_two_siblings_wrote_is_taken_away_once():
    step = np.array([[[5, 1], [5, 1], [5, 2]]], np.int32)
    logprobs = np.log(np.array([[[0.9, 0.5], [0.9, 0.5], [0.9, 0.25]]], np.float32))
    logits = jnp.log(jnp.full((1, 8), 1e-6).at[0, 5].set(0.9).at[0, 6].set(0.1))
    found = []
    for kept in ([0, 2], [0, 1, 2], [1, 2, 0]):
        tried = _make(step[:, kept], np.full((1, len(kept)), 2, np.int32), logprobs[:, kept])
        found.append(jax.nn.softmax(_take_away(logits, tried, jnp.int32(0)))[0])
    # Of token 5 a quarter is left.
    np.testing.assert_allclose(found[0][5] / found[0][6], 0.225 / 0.1, rtol=1e-4)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6)


def test_nothing_is_taken_away_where_nothing_was_tried():
    logits = jnp.asarray([[0.1, 0.2, -3.0, 0.0]])
    np.testing.assert_array_equal(_take_away(logits, as_tried([]), jnp.int32(0)), logits)


@pytest.mark.parametrize("method", ["beam", "stochastic_beam", "diverse_beam"])
def test_beams_are_refused(method):
    with pytest.raises(ValueError, match="sampling no_repeats=True: accepted is false, or method"):
        SamplingConfig(method, no_repeats=True)
