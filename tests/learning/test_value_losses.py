"""Value losses against numpy: golden numbers, histograms, extremes and masks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.learning.values import encode_value, value_bce, value_hl_gauss, value_mse
from rlm_jax.models.heads import squash_value
from rlm_jax.models.histogram import Histogram, bin_centres, read_out

RNG = np.random.default_rng(1)
RAW = RNG.normal(size=(5, 7)).astype(np.float32)
TARGETS = RNG.random((5, 7)).astype(np.float32)
WEIGHTS = (RNG.random((5, 7)) * (RNG.random((5, 7)) < 0.7)).astype(np.float32)
HISTOGRAM = Histogram(-1.0, 1.0, 31, 0.75)
BINS = RNG.normal(size=(5, 7, 31)).astype(np.float32)

LOSSES = {
    "mse": (jax.jit(value_mse), RAW),
    "bce": (jax.jit(value_bce), RAW),
    "hl_gauss": (jax.jit(value_hl_gauss, static_argnums=3), BINS),
}


def run(name, predictions, targets, weights):
    extra = (HISTOGRAM,) if name == "hl_gauss" else ()
    return LOSSES[name][0](*(jnp.asarray(a) for a in (predictions, targets, weights)), *extra)


GRADIENTS = {
    name: jax.jit(jax.grad(lambda x, t, w, name=name: run(name, x, t, w).total)) for name in LOSSES
}


def encode_by_hand(value, histogram):
    """Truncated Gaussian masses out of math.erf, in float64."""
    width = (histogram.high - histogram.low) / (histogram.num_bins - 2 * histogram.margin_bins)
    start = histogram.low - histogram.margin_bins * width
    sigma = histogram.sigma_bins * width

    def below(place):
        return 0.5 * (1 + math.erf((start + place * width - value) / (sigma * math.sqrt(2))))

    mass = [below(i + 1) - below(i) for i in range(histogram.num_bins)]
    return np.asarray(mass) / (below(histogram.num_bins) - below(0))


def test_the_bounded_head_equals_golden_g43(golden):
    values = squash_value(jnp.asarray([0.0, 1.0, -2.0]), "signed_sigmoid")
    np.testing.assert_allclose(values, golden["G43"], atol=1e-5)
    extremes = squash_value(jnp.asarray([-200.0, 0.0, 200.0]), "signed_sigmoid")
    np.testing.assert_allclose(extremes, [-1.0, 0.0, 1.0], atol=1e-5)


def test_bce_with_a_soft_label_equals_golden_g20(golden):
    logit = jnp.log(jnp.asarray([0.4 / 0.6]))
    loss = value_bce(logit, jnp.asarray([golden["G20"]["SE"]]), jnp.ones(1))
    assert float(loss.total) == pytest.approx(golden["G20_bce_soft_p0.4"], abs=1e-5)


def test_losses_equal_numpy():
    raw, weights = RAW.astype(np.float64), WEIGHTS.astype(np.float64)
    by_hand = {
        "mse": (raw - TARGETS) ** 2,
        "bce": np.maximum(raw, 0) - raw * TARGETS + np.log1p(np.exp(-np.abs(raw))),
    }
    logs = BINS - np.log(np.exp(BINS.astype(np.float64)).sum(-1, keepdims=True))
    encoded = np.vectorize(lambda v: encode_by_hand(v, HISTOGRAM), signature="()->(m)")(TARGETS)
    by_hand["hl_gauss"] = -(encoded * logs).sum(-1)
    for name, (_, predictions) in LOSSES.items():
        found = run(name, predictions, TARGETS, WEIGHTS)
        np.testing.assert_allclose(found.total, (weights * by_hand[name]).sum(), rtol=1e-5)
        np.testing.assert_allclose(found.count, weights.sum(), rtol=1e-5)


@pytest.mark.parametrize("sigma_bins", [0.4, 0.75, 2.0])
def test_encoded_values_read_out_as_themselves_up_to_the_ends(sigma_bins):
    histogram = Histogram(-1.0, 1.0, 41, sigma_bins)
    values = np.asarray([-1.0, -0.99, 0.0, 0.37, 1.0], np.float32)
    probs = encode_value(jnp.asarray(values), histogram)
    wanted = [encode_by_hand(float(value), histogram) for value in values]
    np.testing.assert_allclose(probs, wanted, atol=1e-5)
    np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-5)
    found = read_out(jnp.log(jnp.maximum(probs, 1e-30)), histogram)
    np.testing.assert_allclose(found, values, atol=0.02 * histogram.bin_width)


def test_a_histogram_knows_its_range():
    centres = np.asarray(bin_centres(HISTOGRAM))
    inside = centres[HISTOGRAM.margin_bins : -HISTOGRAM.margin_bins]
    assert len(centres) == 31
    assert inside[0] == pytest.approx(-1 + HISTOGRAM.bin_width / 2, abs=1e-6)
    assert inside[-1] == pytest.approx(1 - HISTOGRAM.bin_width / 2, abs=1e-6)
    far = jnp.zeros((2, 31)).at[0, 0].set(100.0).at[1, -1].set(100.0)
    np.testing.assert_allclose(read_out(far, HISTOGRAM), [-1.0, 1.0])
    outside = encode_value(jnp.asarray([9.0]), HISTOGRAM)
    np.testing.assert_allclose(outside, encode_value(jnp.asarray([1.0]), HISTOGRAM))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low": 1.0, "high": 1.0}, "low < high"),
        ({"high": math.nan}, "low < high"),
        ({"sigma_bins": 0.0}, "sigma_bins"),
        ({"num_bins": 6}, "at least 7"),
        ({"num_bins": 0}, "num_bins"),
    ],
)
def test_bad_histograms_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Histogram(**fields)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), cut=st.integers(1, 4))
def test_padding_never_matters_and_microbatches_add_up(name, seed, cut):
    rng = np.random.default_rng(seed)
    weights = (rng.random((5, 7)) * (rng.random((5, 7)) < 0.5)).astype(np.float32)
    _, predictions = LOSSES[name]
    out = weights == 0
    dirty = np.where(out.reshape(out.shape + (1,) * (predictions.ndim - 2)), np.nan, predictions)
    targets = np.where(out, np.nan, TARGETS)
    whole = run(name, predictions, TARGETS, weights)
    first = run(name, dirty, targets, np.where(np.arange(5)[:, None] < cut, weights, 0))
    second = run(name, dirty, targets, np.where(np.arange(5)[:, None] < cut, 0, weights))
    np.testing.assert_allclose(first.total + second.total, whole.total, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first.count + second.count, whole.count, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1e4, 1e15])
def test_gradients_are_finite_at_extremes_and_next_to_nan_padding(name, scale):
    _, predictions = LOSSES[name]
    weights = np.where(WEIGHTS > 0, 1.0, 0.0).astype(np.float32)
    far = np.sign(predictions) * scale
    far[0, 0], weights[0, 0] = np.nan, 0.0
    grad = GRADIENTS[name](jnp.asarray(far, jnp.float32), TARGETS, weights)
    assert np.isfinite(grad).all()
    assert not np.asarray(grad)[weights == 0].any()
