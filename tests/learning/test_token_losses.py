"""Token losses and step sums against numpy in float64, and against their own parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.core.metrics import add_metrics
from rlm_jax.learning.losses import (
    cross_entropy,
    label_entropy,
    soft_cross_entropy,
    token_accuracy,
    token_logprobs,
    weighted_sum,
    z_penalty,
)
from rlm_jax.learning.steps import spread_over_tokens, sum_by_step

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(4, 6, 11))).astype(np.float32)
TARGETS = RNG.integers(0, 11, (4, 6)).astype(np.int32)
MASK = RNG.random((4, 6)) < 0.6
IDS = RNG.integers(0, 11, (4, 6, 3)).astype(np.int32)
LABELS = (RNG.dirichlet(np.ones(3), (4, 6)) * MASK[..., None]).astype(np.float32)

# Compiled once for all rows of examples.
hard = jax.jit(cross_entropy)
soft = jax.jit(soft_cross_entropy)
hard_gradient = jax.jit(jax.value_and_grad(lambda *a: cross_entropy(*a).total))
soft_gradient = jax.jit(jax.value_and_grad(lambda *a: soft_cross_entropy(*a).total))


def log_softmax(logits):
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def test_cross_entropy_equals_numpy_and_the_golden_number():
    logs = log_softmax(LOGITS)
    picked = np.take_along_axis(logs, TARGETS[..., None], -1)[..., 0]
    found = hard(jnp.asarray(LOGITS), jnp.asarray(TARGETS), jnp.asarray(MASK))
    np.testing.assert_allclose(found.total, -picked[MASK].sum(), rtol=1e-5)
    assert float(found.count) == MASK.sum()
    np.testing.assert_allclose(
        token_logprobs(jnp.asarray(LOGITS), jnp.asarray(TARGETS)), picked, atol=1e-5
    )
    # Spec D.8: target probabilities .5 and .8.
    logits = jnp.log(jnp.asarray([[0.5, 0.5], [0.8, 0.2]]))
    pair = cross_entropy(logits, jnp.zeros(2, jnp.int32), jnp.ones(2))
    assert float(pair.total) == pytest.approx(0.916291, abs=1e-6)


def test_metrics_of_the_same_logits_equal_numpy():
    logits, mask = jnp.asarray(LOGITS), jnp.asarray(MASK)
    sizes = np.log(np.exp(LOGITS.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(z_penalty(logits, mask).total, (sizes[MASK] ** 2).sum(), rtol=1e-5)
    right = (LOGITS.argmax(-1) == TARGETS)[MASK]
    found = token_accuracy(logits, jnp.asarray(TARGETS), mask)
    assert (float(found.total), float(found.count)) == (right.sum(), MASK.sum())


def test_soft_cross_entropy_is_the_expectation_of_the_hard_one():
    found = soft(jnp.asarray(LOGITS), jnp.asarray(IDS), jnp.asarray(LABELS))
    expected = sum(
        float(
            hard(jnp.asarray(LOGITS), jnp.asarray(IDS[..., m]), jnp.asarray(LABELS[..., m])).total
        )
        for m in range(3)
    )
    np.testing.assert_allclose(found.total, expected, rtol=1e-5)
    np.testing.assert_allclose(found.count, MASK.sum(), rtol=1e-6)
    one_hot = np.zeros((4, 6, 3), np.float32)
    one_hot[..., 1] = MASK
    same = soft(jnp.asarray(LOGITS), jnp.asarray(IDS), jnp.asarray(one_hot))
    alone = hard(jnp.asarray(LOGITS), jnp.asarray(IDS[..., 1]), jnp.asarray(MASK))
    np.testing.assert_allclose(same.total, alone.total, rtol=1e-6)


def test_soft_cross_entropy_is_least_at_its_labels():
    weights = np.asarray([[0.2, 0.5, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    ids = jnp.asarray([[3, 1, 2, 0], [0, 0, 0, 0]])
    logits = np.full((2, 5), -40.0, np.float32)
    logits[0, [3, 1, 2]] = np.log([0.2, 0.5, 0.3])
    floor = label_entropy(jnp.asarray(weights))
    expected = -(weights[0, :3] * np.log(weights[0, :3])).sum()
    assert float(floor.total) == pytest.approx(expected, rel=1e-5)
    assert float(floor.count) == pytest.approx(1.0)

    value, grad = soft_gradient(jnp.asarray(logits), ids, jnp.asarray(weights))
    assert float(value) == pytest.approx(float(floor.total), rel=1e-5)
    np.testing.assert_allclose(grad, 0.0, atol=1e-6)


def test_gradients_are_those_of_softmax_regression():
    probs = np.exp(log_softmax(LOGITS))
    wanted = np.zeros_like(probs)
    for m in range(3):
        np.add.at(
            wanted,
            (*np.indices((4, 6)), IDS[..., m]),
            -LABELS[..., m].astype(np.float64),
        )
    wanted += LABELS.sum(-1, keepdims=True) * probs
    _, grad = soft_gradient(jnp.asarray(LOGITS), jnp.asarray(IDS), jnp.asarray(LABELS))
    np.testing.assert_allclose(grad, wanted, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e4, 1e30])
def test_extreme_logits_give_finite_losses_and_gradients(scale):
    logits = jnp.asarray(np.sign(LOGITS) * scale, jnp.float32)
    for found in (
        hard_gradient(logits, jnp.asarray(TARGETS), jnp.asarray(MASK)),
        soft_gradient(logits, jnp.asarray(IDS), jnp.asarray(LABELS)),
    ):
        for number in found:
            assert np.isfinite(number).all()


def test_half_precision_logits_are_summed_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    found = cross_entropy(logits, jnp.asarray(TARGETS), jnp.asarray(MASK))
    wide = hard(logits.astype(jnp.float32), jnp.asarray(TARGETS), jnp.asarray(MASK))
    assert found.total.dtype == jnp.float32
    np.testing.assert_allclose(found.total, wide.total, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), cut=st.integers(1, 3))
def test_padding_never_matters_and_microbatches_add_up(seed, cut):
    rng = np.random.default_rng(seed)
    mask = rng.random((4, 6)) < rng.random()
    weights = np.where(mask, rng.random((4, 6)), 0).astype(np.float32)
    dirty = np.where(mask[..., None], LOGITS, rng.normal(size=LOGITS.shape) * 100)
    dirty = dirty.astype(np.float32)
    targets = np.where(mask, TARGETS, rng.integers(0, 11, (4, 6))).astype(np.int32)

    def run(logits, targets, weights):
        pad = 4 - len(weights)
        arrays = [
            np.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)) for a in (logits, targets, weights)
        ]
        return {"loss": hard(*(jnp.asarray(a) for a in arrays))}

    whole = run(LOGITS, TARGETS, weights)["loss"]
    for found in (
        run(dirty, targets, weights),
        add_metrics(
            run(dirty[:cut], targets[:cut], weights[:cut]),
            run(dirty[cut:], targets[cut:], weights[cut:]),
        ),
    ):
        np.testing.assert_allclose(found["loss"].total, whole.total, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["loss"].count, whole.count, rtol=1e-5, atol=1e-6)


def test_weighted_sums_leave_out_nan_where_the_weight_is_zero():
    values = jnp.asarray([1.0, jnp.nan, 3.0])
    found = weighted_sum(values, jnp.asarray([0.5, 0.0, 2.0]))
    assert (float(found.total), float(found.count)) == (6.5, 2.5)
    wide = weighted_sum(jnp.ones((2, 3)), jnp.asarray([[True], [False]]))
    assert (float(wide.total), float(wide.count)) == (3.0, 3.0)


def test_sums_over_steps_equal_a_loop_and_spread_back():
    values = RNG.normal(size=(3, 9)).astype(np.float32)
    ids = RNG.integers(-1, 5, (3, 9)).astype(np.int32)
    sums = np.zeros((3, 4))
    for row, at in np.ndindex(3, 9):
        if 0 <= ids[row, at] < 4:
            sums[row, ids[row, at]] += values[row, at]
    found = jax.jit(functools.partial(sum_by_step, num_steps=4))(
        jnp.asarray(values), jnp.asarray(ids)
    )
    np.testing.assert_allclose(found, sums, atol=1e-5)
    spread = spread_over_tokens(found, jnp.asarray(ids))
    wanted = [[sums[r, i] if 0 <= i < 4 else 0 for i in ids[r]] for r in range(3)]
    np.testing.assert_allclose(spread, wanted, atol=1e-5)


def test_a_nan_outside_of_all_steps_stays_there():
    values = jnp.asarray([1.0, 2.0, jnp.nan])
    np.testing.assert_allclose(sum_by_step(values, jnp.asarray([0, 0, -1]), 1), [3.0])
