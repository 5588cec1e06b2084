"""The loss of a state value network, and that it learns by it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.core.mesh import make_mesh
from rlm_jax.data.countdown_states import StateBatch, StateMix, make_asked, make_states
from rlm_jax.learning.state_values import (
    asked_value_loss,
    count_asked,
    count_goals,
    state_value_loss,
)
from rlm_jax.learning.update import OptimizerConfig, init_state, make_optimizer, update_state
from rlm_jax.models.state_value import (
    StateValueConfig,
    asked_goal_logits,
    init_state_value,
    state_goal_logits,
)
from rlm_jax.reasoning.sharding import place_batch
from rlm_jax.tasks.countdown import NUM_GOALS

CFG = StateValueConfig(num_goals=NUM_GOALS, num_layers=2, model_dim=32, num_heads=2, ffn_dim=48)
MIX = StateMix(seed=0, num_states=64, sizes=((2, 0.5), (3, 0.5)))


@pytest.fixture(scope="module")
def network():
    return init_state_value(jax.random.key(1), CFG)


@pytest.fixture(scope="module")
def asked():
    return init_state_value(jax.random.key(2), dataclasses.replace(CFG, readout="asked"))


@pytest.fixture(scope="module")
def measure():
    """Loss, metrics and gradients."""
    grad = jax.value_and_grad(state_value_loss, has_aux=True)
    return jax.jit(lambda network, batch: grad(network, batch, count_goals(batch)))


def test_the_loss_is_the_mean_over_known_labels(network, measure):
    batch = make_states(MIX, 0)
    logits = np.asarray(jax.jit(state_goal_logits)(network, batch.items), np.float64)
    (loss, metrics), _ = measure(network, batch)
    chance = 1 / (1 + np.exp(-logits))
    losses = -np.where(batch.goals > 0, np.log(chance), np.log(1 - chance))
    known = batch.goals != 0
    assert 0 < known.sum() < known.size
    assert float(loss) == pytest.approx(losses[known].mean(), rel=1e-5)
    assert float(metrics["goal_loss"].mean()) == pytest.approx(losses[known].mean(), rel=1e-5)
    right = ((logits > 0) == (batch.goals > 0))[known].mean()
    assert float(metrics["goal_accuracy"].mean()) == pytest.approx(right, rel=1e-5)
    nothing = StateBatch(batch.items, np.zeros_like(batch.goals))
    (loss, _), gradients = measure(network, nothing)
    assert float(loss) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


@pytest.fixture(scope="module")
def measure_asked():
    """The same of what is asked."""
    grad = jax.value_and_grad(asked_value_loss, has_aux=True)
    return jax.jit(lambda network, batch: grad(network, batch, count_asked(batch)))


def test_the_loss_of_what_is_asked(asked, measure_asked):
    batch = make_asked(MIX, 6, 0)
    assert (batch.weights == 0).any()
    logits = np.asarray(jax.jit(asked_goal_logits)(asked, batch.items, batch.goals), np.float64)
    (loss, metrics), _ = measure_asked(asked, batch)
    chance = 1 / (1 + np.exp(-logits))
    losses = -np.where(batch.labels > 0, np.log(chance), np.log(1 - chance))
    expected = np.average(losses, weights=batch.weights)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["goal_loss"].mean()) == pytest.approx(expected, rel=1e-5)
    right = np.average((logits > 0) == (batch.labels > 0), weights=batch.weights)
    assert float(metrics["goal_accuracy"].mean()) == pytest.approx(right, rel=1e-5)


def test_what_is_asked_stands_for_all_goals(asked, measure, measure_asked):
    """Asked about every goal, a network has the loss that one has which reads all at once."""
    (whole, _), _ = measure(asked, make_states(MIX, 0))
    (every, _), _ = measure_asked(asked, make_asked(MIX, 2 * NUM_GOALS, 0))
    assert float(every) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("readout", ["factors", "asked"])
def test_eight_devices_learn_what_one_does(request, readout):
    if readout == "factors":
        network, measure, batch = "network", "measure", make_states(MIX, 1)
    else:
        network, measure, batch = "asked", "measure_asked", make_asked(MIX, 6, 1)
    network, measure = map(request.getfixturevalue, (network, measure))
    (loss, metrics), gradients = measure(network, batch)
    (spread, others), there = measure(network, place_batch(make_mesh(), batch))
    assert float(spread) == pytest.approx(float(loss), abs=1e-5)
    for name, each in metrics.items():
        np.testing.assert_allclose(others[name].total, each.total, rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), there, gradients
    )


def test_updates_teach_what_states_make(network):
    """Goals that a state makes are told from those that it does not, by the state, and not by how
    often a goal is made."""
    schedule = OptimizerConfig(num_steps=100, warmup_steps=5, learning_rate=2e-2)
    optimizer = make_optimizer(schedule, network)
    update = jax.jit(
        functools.partial(
            update_state, loss=state_value_loss, optimizer=optimizer, totals_fn=count_goals
        )
    )
    two = {"sizes": ((2, 1.0),), "small_share": 1.0, "deep_share": 0.0, "whole_share": 1.0}
    mix = StateMix(seed=0, num_states=64, **two)
    state = init_state(network, optimizer)
    for number in range(100):
        state, _ = update(state, make_states(mix, number))
    items, goals = make_states(mix, 1000)
    logits = np.asarray(jax.jit(state_goal_logits)(state.params, jnp.asarray(items)))
    often = (goals > 0).sum(axis=0) / np.maximum((goals != 0).sum(axis=0), 1)
    by_rate = _rank(np.broadcast_to(often, logits.shape), goals)
    assert by_rate < 0.9
    assert _rank(logits, goals) > by_rate + 0.05


def _rank(scores, goals):
    """The chance that a goal which is made is put above one that is not."""
    pairs = [
        (row[signs > 0][:, None] > row[signs < 0]).mean()
        for row, signs in zip(scores, goals, strict=True)
        if (signs > 0).any()
    ]
    return np.mean(pairs)
