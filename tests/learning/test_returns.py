"""Returns along trajectories: golden numbers, and loops in plain Python over padded batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.learning.returns import (
    monte_carlo_q,
    n_step_returns,
    state_value,
    step_gae,
    td_lambda_returns,
)

gae = jax.jit(step_gae, static_argnames=("discount", "trace"))
td_lambda = jax.jit(td_lambda_returns, static_argnames=("discount", "trace"))
n_step = jax.jit(n_step_returns, static_argnames=("discount", "num_steps"))


def test_monte_carlo_equals_goldens_g08_and_g52(golden):
    rewards = jnp.asarray([1.0, -1.0, 1.0, 9.0])
    steps = jnp.asarray([2, 3, 1, 1])
    mask = jnp.asarray([True, True, True, False])
    q = monte_carlo_q(rewards, steps, mask, discount=0.95)
    assert float(q.count) == 3.0
    assert float(q.mean()) == pytest.approx(golden["G08_Q"], abs=1e-5)
    assert float(state_value(q.mean(), 0.95)) == pytest.approx(golden["G08_V_next"], abs=1e-5)
    binary = monte_carlo_q(jnp.maximum(rewards, 0.0), steps, mask)
    assert float(binary.mean()) == pytest.approx(golden["G08_binary"], abs=1e-5)
    g52 = golden["G52_qv"]
    assert float(state_value(jnp.asarray(g52["Q"]), 0.96)) == pytest.approx(g52["V=Q/g"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "discount", "trace"),
    [
        ("G10_g1_l.95", 1.0, 0.95),
        ("G10_g.98_l.95", 0.98, 0.95),
        ("G10_l1", 1.0, 1.0),
        ("G10_l0", 1.0, 0.0),
    ],
)
def test_gae_equals_golden_g10(golden, name, discount, trace):
    rewards, values = jnp.asarray([[0.0, 0.0, 1.0]]), jnp.asarray([[0.5, 0.6, 0.8]])
    found = gae(
        rewards, values, jnp.ones((1, 3), bool), jnp.zeros(1), discount=discount, trace=trace
    )
    np.testing.assert_allclose(found[0], golden[name], atol=1e-5)


def advantages_by_hand(rewards, values, bootstrap, discount, trace):
    """The definition: sum over l of (g lambda)^l delta_{t+l}."""
    after = [*values, bootstrap][1:]
    deltas = [r + discount * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [
        sum((discount * trace) ** i * d for i, d in enumerate(deltas[t:]))
        for t in range(len(rewards))
    ]


def returns_by_hand(rewards, values, bootstrap, discount, num_steps):
    after = [*values, bootstrap]
    found = []
    for t in range(len(rewards)):
        end = min(t + num_steps, len(rewards))
        total = sum(discount ** (i - t) * rewards[i] for i in range(t, end))
        found.append(total + discount ** (end - t) * after[end])
    return found


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    lengths=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    num_steps=st.sampled_from([1, 2, 9]),
)
def test_padded_batches_equal_each_row_alone(seed, lengths, num_steps):
    rng = np.random.default_rng(seed)
    shape = (3, 6)
    rewards, values = rng.normal(size=shape), rng.normal(size=shape)
    bootstrap = rng.normal(size=3)
    mask = np.arange(6)[None] < np.asarray(lengths)[:, None]
    dirty = [jnp.asarray(np.where(mask, a, np.nan), jnp.float32) for a in (rewards, values)]
    batch = (*dirty, jnp.asarray(mask), jnp.asarray(bootstrap, jnp.float32))
    found = gae(*batch, discount=0.9, trace=0.7)
    mixed = td_lambda(*batch, discount=0.9, trace=0.7)
    n_steps = n_step(*batch, discount=0.9, num_steps=num_steps)
    for row, length in enumerate(lengths):
        own = (rewards[row, :length], values[row, :length], bootstrap[row])
        wanted = advantages_by_hand(*own, 0.9, 0.7)
        np.testing.assert_allclose(found[row, :length], wanted, atol=1e-4)
        np.testing.assert_allclose(mixed[row, :length], wanted + own[1], atol=1e-4)
        wanted = returns_by_hand(*own, 0.9, num_steps)
        np.testing.assert_allclose(n_steps[row, :length], wanted, atol=1e-4)
        for array in (found, mixed, n_steps):
            assert not np.asarray(array[row, length:]).any()


def test_the_ends_of_lambda_are_the_ends_of_n_steps():
    rng = np.random.default_rng(3)
    batch = (
        jnp.asarray(rng.normal(size=(2, 5)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 5)), jnp.float32),
        jnp.asarray([[True] * 5, [True] * 2 + [False] * 3]),
        jnp.asarray([0.3, 0.0]),
    )
    for trace, num_steps in ((0.0, 1), (1.0, 5)):
        mixed = td_lambda(*batch, discount=0.9, trace=trace)
        n_steps = n_step(*batch, discount=0.9, num_steps=num_steps)
        np.testing.assert_allclose(mixed, n_steps, atol=1e-5)


def test_zero_steps_are_refused():
    zeros = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="num_steps"):
        n_step_returns(zeros, zeros, zeros == 0, jnp.zeros(1), num_steps=0)
