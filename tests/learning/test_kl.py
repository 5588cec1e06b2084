"""KL estimators: golden numbers, their expectations over a whole vocabulary, and extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.learning.kl import ESTIMATORS, estimate_kl, exact_kl, kl_penalty

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=6)
REFERENCE = RNG.normal(size=6)


def log_softmax(x):
    return x - np.log(np.exp(x).sum())


def kl(p, q):
    return (np.exp(p) * (p - q)).sum()


def test_estimators_equal_goldens(golden):
    for name, d in (("d=+0.1", 0.1), ("d=-0.2", -0.2), ("d=0", 0.0)):
        logprob = jnp.asarray([-1.0])
        k1, k2, k3 = (float(estimate_kl(logprob, logprob + d, k)[0]) for k in ESTIMATORS[:3])
        assert k1 == pytest.approx(-d, abs=1e-5)
        assert k2 == pytest.approx(d * d / 2, abs=1e-5)
        assert k3 == pytest.approx(golden["G13"][name], abs=1e-5)
    x1 = estimate_kl(jnp.log(jnp.asarray([0.4])), jnp.log(jnp.asarray([0.5])), "x1")
    assert float(x1[0]) == pytest.approx(0.111572, abs=1e-5)


def test_small_differences_are_not_lost():
    found = estimate_kl(jnp.asarray([0.0]), jnp.asarray([1e-4]), "k3")
    assert float(found[0]) == pytest.approx(0.5e-8, rel=2e-3)


def test_expectations_and_gradients_are_those_the_docstring_names():
    """Tokens enumerated instead of sampled: an expectation is a sum over the vocabulary."""
    pi, ref = log_softmax(LOGITS), log_softmax(REFERENCE)

    def expected(logits, name):
        logs = jax.nn.log_softmax(logits)
        # The samples come from the policy, but no gradient flows through how often.
        weights = jax.lax.stop_gradient(jnp.exp(logs))
        return kl_penalty(logs, jnp.asarray(ref), weights, name).total

    def reverse(logits):
        logs = jax.nn.log_softmax(logits)
        return (jnp.exp(logs) * (logs - ref)).sum()

    def forward(logits):
        return (np.exp(ref) * (ref - jax.nn.log_softmax(logits))).sum()

    @jax.jit
    def run(logits):
        found = {name: jax.value_and_grad(expected)(logits, name) for name in ESTIMATORS}
        exact = exact_kl(logits[None], jnp.asarray(REFERENCE, jnp.float32)[None], jnp.ones(1))
        return found, jax.grad(reverse)(logits), jax.grad(forward)(logits), exact.total

    found, reverse_gradient, forward_gradient, exact = run(jnp.asarray(LOGITS, jnp.float32))
    values = {name: float(value) for name, (value, _) in found.items()}
    assert values["k1"] == pytest.approx(kl(pi, ref), abs=1e-5)
    assert values["k3"] == pytest.approx(kl(pi, ref), abs=1e-5)
    ratio = np.exp(ref) * (ref - pi)
    assert values["x1"] == pytest.approx((np.exp(pi) * ratio).sum(), abs=1e-5)
    np.testing.assert_allclose(found["k1"][1], 0.0, atol=1e-6)
    np.testing.assert_allclose(found["k2"][1], reverse_gradient, atol=1e-5)
    np.testing.assert_allclose(found["k3"][1], forward_gradient, atol=1e-5)
    assert float(exact) == pytest.approx(kl(pi, ref), abs=1e-5)


def test_the_reference_gets_no_gradient():
    @jax.jit
    @jax.grad
    def gradient(reference):
        tokens = kl_penalty(jnp.zeros(3), reference[0, :3], jnp.ones(3), "k2").total
        return tokens + exact_kl(jnp.zeros((1, 6)), reference, jnp.ones(1)).total

    assert not np.asarray(gradient(jnp.asarray(REFERENCE, jnp.float32)[None])).any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masked_tokens_and_extremes_leave_everything_finite(estimator):
    logprob = jnp.asarray([-1e4, -1e-3, jnp.nan, -2.0])
    reference = jnp.asarray([-1e-3, -1e4, -1.0, jnp.nan])
    weights = jnp.asarray([1.0, 0.5, 0.0, 0.0])

    @jax.jit
    def run(logprob):
        def loss(logprob):
            found = kl_penalty(logprob, reference, weights, estimator)
            return found.total, found.count

        return jax.value_and_grad(loss, has_aux=True)(logprob)

    (value, count), grad = run(logprob)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert not np.asarray(grad)[2:].any()
    assert float(count) == 1.5


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k4"):
        estimate_kl(jnp.zeros(1), jnp.zeros(1), "k4")
