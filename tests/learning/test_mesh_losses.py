"""Every loss on eight devices, and row by row: its sums are those of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.core.mesh import make_mesh
from rlm_jax.learning.distillation import sequence_distillation, sibling_distillation
from rlm_jax.learning.kl import exact_kl, kl_penalty
from rlm_jax.learning.losses import cross_entropy, soft_cross_entropy, z_penalty
from rlm_jax.learning.values import value_bce, value_hl_gauss, value_mse
from rlm_jax.models.histogram import Histogram
from rlm_jax.reasoning.sharding import place_batch

# Eight devices, many small programs.
pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
HISTOGRAM = Histogram(0.0, 1.0, 21, 0.75)
LOGITS = jnp.asarray(RNG.normal(size=(8, 5, 21)), jnp.float32)
OTHERS = jnp.asarray(RNG.normal(size=(8, 5, 21)), jnp.float32)
IDS = jnp.asarray(RNG.integers(0, 21, (8, 5, 21)), jnp.int32)
# Rows of very different weight: a mean over devices would not be the mean of the batch.
MASK = jnp.asarray(RNG.random((8, 5)) < np.linspace(0, 1, 8)[:, None])
UNIT = jnp.asarray(RNG.random((8, 5)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.dirichlet(np.ones(21), (8, 5)), jnp.float32) * MASK[..., None]


def all_losses(x, o, i, m, u, w):
    return {
        "cross_entropy": cross_entropy(x, i[..., 0], m),
        "soft_cross_entropy": soft_cross_entropy(x, i, w),
        "z_penalty": z_penalty(x, m),
        "value_mse": value_mse(x[..., 0], u, m),
        "value_bce": value_bce(x[..., 1], u, m),
        "value_hl_gauss": value_hl_gauss(x, u, m, HISTOGRAM),
        "sequence": sequence_distillation(x, w),
        "siblings": sibling_distillation(x, w, w > 0),
        "kl": kl_penalty(x[..., 2], o[..., 2], m),
        "exact_kl": exact_kl(x, o, m),
    }


@jax.jit
def run(logits, *batch):
    """Every loss, and the gradient of all together."""

    def loss(logits):
        found = all_losses(logits, *batch)
        return sum(each.total for each in found.values()), found

    return jax.grad(loss, has_aux=True)(logits)


def test_eight_devices_add_up_to_one():
    batch = (LOGITS, OTHERS, IDS, MASK, UNIT, WEIGHTS)
    gradient, here = run(*batch)
    spread, there = run(*place_batch(make_mesh(), batch))
    np.testing.assert_allclose(spread, gradient, rtol=1e-5, atol=1e-5)
    for name, each in here.items():
        np.testing.assert_allclose(there[name].total, each.total, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(there[name].count, each.count, rtol=1e-5, err_msg=name)
        assert float(each.count) == pytest.approx(float(MASK.sum()), rel=1e-5)


def test_rows_of_a_vmap_add_up_to_the_batch():
    batch = (LOGITS, OTHERS, IDS, MASK, UNIT, WEIGHTS)
    rows = jax.jit(jax.vmap(all_losses))(*batch)
    _, whole = run(*batch)
    for name, each in whole.items():
        assert rows[name].total.shape == (8,)
        np.testing.assert_allclose(rows[name].total.sum(), each.total, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(rows[name].count.sum(), each.count, rtol=1e-5, err_msg=name)
