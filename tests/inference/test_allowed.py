"""Steps held to a list: every step that is written is on it, and which one, the model says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from holding import write_steps

from rlm_jax.inference.allowed import follow_allowed, hold_to_allowed, make_allowed

NUM_TOKENS, BACK, END = 8, 6, 7
STEPS = [(3, 4), (3, 4, 5), (3, 5), (4,)]
_make, _hold, _follow = map(jax.jit, (make_allowed, hold_to_allowed, follow_allowed))


def allowed_of(rows):
    """The list of each row."""
    tokens = np.full((len(rows), len(STEPS), 4), END, np.int32)
    length = np.zeros((len(rows), len(STEPS)), np.int32)
    for row, steps in enumerate(rows):
        for place, step in enumerate(steps):
            tokens[row, place, : len(step)], length[row, place] = step, len(step)
    ids = jnp.arange(NUM_TOKENS)
    return _make(jnp.asarray(tokens), jnp.asarray(length), ids == END, ids == BACK)


def test_every_step_is_on_the_list_and_all_are_written():
    allowed = allowed_of([STEPS, []] * 50)
    seen, free, back = set(), set(), set()
    for seed in range(10):
        for row, step in enumerate(write_steps(_hold, _follow, allowed, seed, NUM_TOKENS, END)):
            step = step[:-1] if step[-1] == END else step
            if row % 2:
                free.add(tuple(step))
            elif step[:1] == [BACK]:
                back.add(tuple(step))
            else:
                seen.add(tuple(step))
    assert seen == set(STEPS)
    # Where nothing is listed, and behind a first token that the list says nothing of.
    assert len(free) > 100
    assert len(back) > 50


def test_a_step_gains_its_bonus_and_no_more():
    """Over all its tokens, beside the best step, whatever is shared with others on the way."""
    bonus = jnp.array([[-1.0, -3.0, 0.5, -2.0]])
    logits = jnp.linspace(0.0, 1.0, NUM_TOKENS)[None]
    for place, step in enumerate(STEPS):
        plain, gained = allowed_of([STEPS]), 0.0
        weighed = dataclasses.replace(plain, bonus=bonus)
        for index, token in enumerate((*step, END)):
            ours, theirs = _hold(logits, weighed, index)[0], _hold(logits, plain, index)[0]
            gained += float(ours[token] - theirs[token])
            assert float(ours[BACK]) == float(theirs[BACK])
            chosen = jnp.array([token])
            plain, weighed = _follow(plain, index, chosen), _follow(weighed, index, chosen)
        assert gained == pytest.approx(float(bonus[0, place]) - 0.5, abs=1e-5)


def test_odds_are_those_of_the_logits():
    logits = jnp.log(jnp.asarray([[0.1, 0.1, 0.1, 0.2, 0.1, 0.2, 0.1, 0.1]]))
    allowed = allowed_of([STEPS])
    chance = jax.nn.softmax(_hold(logits, allowed, 0))[0]
    np.testing.assert_allclose(chance[jnp.array([3, 4, BACK])], [0.5, 0.25, 0.25], rtol=1e-5)
    allowed = _follow(_follow(allowed, 0, jnp.array([3])), 1, jnp.array([4]))
    # One step ends here, and another goes on.
    chance = jax.nn.softmax(_hold(logits, allowed, 2))[0]
    np.testing.assert_allclose(chance[jnp.array([5, END])], [2 / 3, 1 / 3], rtol=1e-5)
    assert float(chance.sum()) == pytest.approx(1.0)
