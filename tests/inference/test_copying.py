"""Steps that go back, held to texts: against every text there is, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from holding import write_steps

from rlm_jax.inference.copying import follow_copies, hold_to_copies, make_copies
from rlm_jax.inference.sampling import SamplingConfig

NUM_TOKENS, BACK, MARK, END = 8, 0, 1, 7
_make, _hold, _follow = map(jax.jit, (make_copies, hold_to_copies, follow_copies))


def copies_of(rows):
    """Copies from the steps of each row, padded by what would be a mark if it were read."""
    most = max(max(map(len, rows)), 1)
    tokens = np.full((len(rows), most, 6), MARK, np.int32)
    length = np.zeros((len(rows), most), np.int32)
    for row, steps in enumerate(rows):
        for place, step in enumerate(steps):
            tokens[row, place, : len(step)], length[row, place] = step, len(step)
    ids = jnp.arange(NUM_TOKENS)
    return _make(ids == BACK, ids == MARK, jnp.asarray(tokens), jnp.asarray(length))


def test_what_goes_back_spells_a_text_and_nothing_else_is_held():
    texts = {(4, 5, END), (4, 6, END), (5, END)}
    steps = [[3, 2, MARK, 4, 5, END], [MARK, MARK, 4, 6, END], [BACK, MARK, 5, END], [2, 4, END]]
    copies = copies_of([steps, []] * 50)
    seen, free = set(), set()
    for seed in range(20):
        for row, step in enumerate(write_steps(_hold, _follow, copies, seed, NUM_TOKENS, END)):
            if row % 2:
                # Nothing to go back to: no step does.
                assert step[0] != BACK
            elif step[0] == BACK:
                assert tuple(step[1:]) in texts
                seen.add(tuple(step[1:]))
            else:
                free.add(tuple(step))
    assert seen == texts
    assert len(free) > 100


def test_which_text_it_is_the_model_says():
    """Where texts part, the odds are those of the logits; before a text's end nothing else can be,
    and of equal texts each counts once."""
    copies = copies_of([[[MARK, 4, 5, END], [MARK, 4, 5, END], [MARK, 6, END]]])
    copies = _follow(copies, 0, jnp.array([BACK]))
    logits = jnp.log(jnp.asarray([[0.1, 0.1, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1]]))
    chance = jax.nn.softmax(_hold(logits, copies, 1))[0]
    np.testing.assert_allclose(chance[jnp.array([4, 6])], [0.75, 0.25], rtol=1e-5)
    assert float(chance.sum()) == pytest.approx(1.0)
    copies = _follow(copies, 1, jnp.array([4]))
    chance = jax.nn.softmax(_hold(logits, copies, 2))[0]
    assert float(chance[5]) == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["beam", "stochastic_beam", "diverse_beam"])
def test_beams_are_not_held(method):
    with pytest.raises(ValueError, match="sampling copy_returns=True: accepted is false, or meth"):
        SamplingConfig(method, copy_returns=True)
