"""Products in bfloat16: what is rounded, what is not, and that gradients are those of float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from rlm_jax.data.packing import TokenBatch
from rlm_jax.learning.networks import (
    LossConfig,
    choose_head,
    init_networks,
    token_loss,
    total_weights,
)
from rlm_jax.models.attention import make_dense_attend
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.mixed import RoundedMatrix, multiply_rounded, round_products
from rlm_jax.models.params import init_params
from rlm_jax.models.transformer import forward, linear, unembed

# Of bfloat16: 8 bits of mantissa.
EPSILON = 2.0**-8
TIED = ModelConfig(
    vocab_size=40, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=48,
    qk_norm=True, tie_embeddings=True,
)  # fmt: skip


def rounded(array):
    """As numpy sees it, in float64."""
    return np.asarray(
        jnp.asarray(array, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32), float
    )


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def test_product_and_gradients_are_those_of_rounded_factors():
    """An oracle in float64 of both factors, and of what comes back, rounded to bfloat16."""
    x, w, change = draw(3, 5, 64), draw(16, 64), draw(3, 5, 16)

    @jax.jit
    def run(x, w, change):
        out, pull = jax.vjp(lambda x, w: multiply_rounded(x, RoundedMatrix(w)), x, w)
        return out, *pull(change)

    out, into_x, into_w = run(x, w, change)
    assert {array.dtype for array in (out, into_x, into_w)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(out, rounded(x) @ rounded(w).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(into_x, rounded(change) @ rounded(w), rtol=1e-5, atol=1e-5)
    wanted = np.einsum("rto,rti->oi", rounded(change), rounded(x))
    np.testing.assert_allclose(into_w, wanted, rtol=1e-5, atol=1e-5)
    # It is rounded, and that is all: not the float32 product.
    exact = x.astype(float) @ w.T.astype(float)
    assert 1e-4 < np.abs(out - exact).max() < EPSILON * (np.abs(x) @ np.abs(w).T).max()


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_but_the_looked_up_embedding_is_rounded(tied):
    cfg = dataclasses.replace(TIED, tie_embeddings=tied)
    params = init_params(jax.random.key(0), cfg)
    wrapped = round_products(params, cfg)
    leaves = jax.tree.leaves(wrapped, is_leaf=is_rounded)
    plain = [leaf for leaf in leaves if not is_rounded(leaf)]
    assert sum(map(is_rounded, leaves)) == 7 * cfg.num_layers + 1
    assert [leaf.shape for leaf in plain if leaf.ndim > 1] == [params.embed.shape]
    assert wrapped.lm_head.weights is (params.embed if tied else params.lm_head)


def is_rounded(leaf):
    return isinstance(leaf, RoundedMatrix)


def make_batch(cfg, rows=4, tokens=24):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, cfg.vocab_size, (rows, tokens))
    ones = np.ones((rows, tokens), np.float32)
    return TokenBatch(
        tokens=jnp.asarray(ids, jnp.int32),
        segments=jnp.ones((rows, tokens), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (rows, tokens)),
        loss_weight=jnp.asarray(ones),
        soft_ids=jnp.asarray(ids[..., None], jnp.int32),
        soft_weights=jnp.zeros((rows, tokens, 1)),
        value_target=jnp.asarray(0.5 * ones),
        value_weight=jnp.asarray(ones),
        goals=jnp.zeros((rows, tokens, 0), jnp.int8),
    )


def loss_fn(cfg, matmul_dtype):
    settings = LossConfig(matmul_dtype=matmul_dtype)

    def loss(networks, batch):
        totals = total_weights(batch)
        return token_loss(networks, batch, totals, model=cfg, cfg=settings)[0]

    return loss


def test_the_loss_and_its_gradient_are_near_those_of_float32():
    networks = init_networks(jax.random.key(1), TIED, choose_head("sigmoid", "bce"))
    batch = make_batch(TIED)
    wide, narrow = (
        jax.jit(jax.value_and_grad(loss_fn(TIED, dtype)))(networks, batch)
        for dtype in ("float32", "bfloat16")
    )
    assert wide[0] != narrow[0]
    np.testing.assert_allclose(narrow[0], wide[0], rtol=2 * EPSILON)
    for ours, theirs in zip(*map(jax.tree.leaves, (narrow[1], wide[1])), strict=True):
        assert ours.dtype == jnp.float32
        scale = np.linalg.norm(theirs) + 1e-8
        assert np.linalg.norm(ours - theirs) / scale < 8 * EPSILON


def test_no_product_of_a_matrix_is_one_of_float32():
    """Forward or backward: three for each of the 15 matrices; attention's and the value head's,
    which has one row, stay as they are."""
    networks = init_networks(jax.random.key(1), TIED, choose_head("sigmoid", "bce"))
    batch = make_batch(TIED)
    sizes = [leaf.shape for leaf in jax.tree.leaves(networks.policy) if leaf.ndim > 1]

    def factors(dtype):
        """Dtypes of the factors of each product that a matrix, or its gradient, takes part in."""
        program = jax.make_jaxpr(jax.grad(loss_fn(TIED, dtype)))(networks, batch)
        products = [e for e in find_equations(program.jaxpr) if e.primitive.name == "dot_general"]
        found = []
        for product in products:
            shapes = [v.aval.shape for v in (*product.invars, *product.outvars)]
            if any(s in sizes or s[::-1] in sizes for s in shapes):
                found.append({v.aval.dtype.name for v in product.invars})
        return found

    assert factors("bfloat16") == 3 * len(sizes) * [{"bfloat16"}]
    # Of few rows there is one more form, for processors.
    assert {frozenset(dtypes) for dtypes in factors("float32")} == {frozenset({"float32"})}


def find_equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from find_equations(inner)


def test_a_forward_of_rounded_products_keeps_the_stream_in_float32():
    params = round_products(init_params(jax.random.key(0), TIED), TIED)
    tokens = jnp.zeros((1, 4), jnp.int32)
    positions = jnp.arange(4, dtype=jnp.int32)[None]
    attend = make_dense_attend(TIED)
    hidden, _ = jax.jit(functools.partial(forward, cfg=TIED, attend=attend))(
        params, tokens, positions
    )
    logits = jax.jit(functools.partial(unembed, cfg=TIED))(params, hidden)
    assert hidden.dtype == logits.dtype == jnp.float32
    assert linear(hidden, params.layers[0].wq).shape == (1, 4, 32)


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="matmul_dtype 'float8': accepted are"):
        LossConfig(matmul_dtype="float8")
