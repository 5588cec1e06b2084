"""int8 inference: exact integers, bounded rounding, whole models close to float, shards, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec as P

from rlm_jax.core.mesh import make_mesh
from rlm_jax.core.sharding import shard_tree
from rlm_jax.models import quantize as quantize_module
from rlm_jax.models.attention import make_dense_attend
from rlm_jax.models.gguf import load_gguf
from rlm_jax.models.params import abstract_params, describe, init_params
from rlm_jax.models.presets import PRESETS, preset
from rlm_jax.models.quantize import (
    QuantizedMatrix,
    check_quantization,
    look_up,
    multiply_integers,
    multiply_quantized,
    quantize_params,
    quantize_rows,
    quantized_axes,
    rotate,
)
from rlm_jax.models.transformer import forward, linear, unembed

TINY = [name for name in PRESETS if name.startswith("tiny")]
# Few shapes: each one compiles anew.
MATRICES = st.sampled_from([(1, 1), (5, 6), (3, 64)]).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-1e4, 1e4, width=32))
)


def integers(rng, *shape):
    return rng.integers(-127, 128, shape).astype(np.int8)


def quantize(matrix):
    """A matrix as `quantize_params` does it, op by op."""
    values, scale = quantize_rows(rotate(jnp.asarray(matrix)))
    return QuantizedMatrix(values, scale, values.astype(jnp.int32).sum(1))


def random_params(cfg, seed=0):
    """Normal weights with one input channel in 16 ten times as large, and biases that are not 0."""
    rng = np.random.default_rng(seed)

    def draw(spec):
        scale = np.where(np.arange(spec.shape[-1]) % 16 == 3, 10.0, 1.0) * spec.shape[-1] ** -0.5
        return jnp.asarray(rng.standard_normal(spec.shape) * scale, jnp.float32)

    return jax.tree.map(draw, describe(cfg))


def compute_logits(params, tokens, cfg):
    @jax.jit
    def run(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, _ = forward(params, tokens, positions, cfg=cfg, attend=make_dense_attend(cfg))
        return unembed(params, hidden, cfg=cfg)

    return np.asarray(run(params, jnp.asarray(tokens, jnp.int32)))


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize(("outputs", "inputs"), [(192, 576), (7, 30), (1, 1), (64, 1536)])
def test_integer_products_are_exact(rows, outputs, inputs, unsigned, monkeypatch):
    monkeypatch.setattr(quantize_module, "cpu_prefers_unsigned", lambda: unsigned)
    rng = np.random.default_rng(rows)
    x, w = integers(rng, rows, inputs), integers(rng, outputs, inputs)
    x[0], w[0] = 127, -127
    x[-1, -1] = -127
    found = jax.jit(lambda *args: multiply_integers(*args))(x, w, w.sum(1, dtype=np.int32))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, x.astype(np.int64) @ w.astype(np.int64).T)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_products_are_padded_and_unsigned_on_cpu_alone(platform, unsigned, monkeypatch):
    monkeypatch.setattr(quantize_module, "cpu_prefers_unsigned", lambda: unsigned)
    x, w, sums = jnp.zeros((1, 32), jnp.int8), jnp.zeros((8, 32), jnp.int8), jnp.zeros(8, jnp.int32)
    traced = jax.jit(lambda *args: multiply_integers(*args)).trace(x, w, sums)
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    rows, kind = (4, "ui8" if unsigned else "i8") if platform == "cpu" else (1, "i8")
    factors = rf"\(tensor<{rows}x32x{kind}>, tensor<8x32xi8>\)"
    # Factors of two types are not widened first, which would be many times slower.
    assert re.search(rf"dot_general.*{factors} -> tensor<{rows}x8xi32>", lowered)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("avx512f avx512_vnni", True),
        ("avx512_vnni amx_int8", False),
        ("avx2", False),
        (None, False),
    ],
)
def test_unsigned_products_are_for_processors_that_have_them(
    flags, expected, tmp_path, monkeypatch
):
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse2\n")
    monkeypatch.setattr(quantize_module, "_PROCESSOR", file)
    assert quantize_module.cpu_prefers_unsigned.__wrapped__() == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("leading", [(1, 1), (3,), (2, 5)])
def test_a_product_equals_numpy_on_the_same_integers(leading, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*leading, 96)), dtype)
    w = quantize(rng.standard_normal((40, 96)).astype(np.float32))
    rounded, scale = (np.asarray(part) for part in quantize_rows(rotate(x)))
    exact = rounded.astype(np.int64) @ np.asarray(w.values, np.int64).T
    expected = exact * scale[..., None].astype(np.float64) * np.asarray(w.scale, np.float64)
    found = multiply_quantized(x, w, out_dtype=jnp.float32)
    assert found.shape == (*leading, 40)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    narrow = linear(x, w)
    assert narrow.dtype == dtype
    np.testing.assert_array_equal(narrow, found.astype(dtype))


@settings(deadline=None, max_examples=60)
@given(MATRICES)
def test_rounding_errs_by_half_a_scale_at_most(matrix):
    values, scale = (np.asarray(part) for part in quantize_rows(jnp.asarray(matrix)))
    assert values.dtype == np.int8
    assert np.abs(values.astype(int)).max() <= 127
    largest = np.abs(matrix).max(1)
    np.testing.assert_allclose(scale, np.maximum(largest, 1e-30) / 127, rtol=1e-6)
    error = np.abs(values * scale[:, None].astype(np.float64) - matrix)
    assert (error <= scale[:, None] * 0.5 * (1 + 1e-4)).all()
    # The largest of a row keeps its place and sign, and zero stays zero.
    assert (np.abs(values.astype(int)).max(1) == np.where(largest > 1e-28, 127, 0)).all() or (
        (largest > 0) & (largest <= 1e-28)
    ).any()
    assert (values[matrix == 0] == 0).all()


@settings(deadline=None, max_examples=40)
@given(MATRICES)
def test_a_matrix_comes_back_within_its_channels_scales(matrix):
    quantized = quantize(matrix)
    rows = jnp.arange(matrix.shape[0], dtype=jnp.int32)
    back = np.asarray(look_up(quantized, rows, jnp.float32), np.float64)
    # A rotation keeps lengths: half a scale per channel is the most a row moves.
    moved = np.linalg.norm(back - matrix, axis=1)
    length = np.linalg.norm(matrix.astype(np.float64), axis=1)
    bound = np.asarray(quantized.scale) * 0.5 * matrix.shape[1] ** 0.5
    assert (moved <= bound * (1 + 1e-4) + 1e-5 * length).all()


@pytest.mark.parametrize(
    ("channels", "block"), [(128, 64), (64, 64), (48, 16), (576, 64), (30, 2), (7, 1)]
)
def test_rotation_is_orthonormal_and_stays_in_its_blocks(channels, block):
    matrix = np.asarray(rotate(jnp.eye(channels)))
    np.testing.assert_allclose(matrix @ matrix, np.eye(channels), atol=1e-6)
    np.testing.assert_allclose(matrix, matrix.T, atol=0)
    number = np.arange(channels) // block
    inside = number[:, None] == number
    np.testing.assert_allclose(np.abs(matrix), inside * block**-0.5, rtol=1e-6)


def test_rotation_spares_a_row_with_an_outlier():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 256)).astype(np.float32)
    x[:, 17] = 60.0
    w = rng.standard_normal((32, 256)).astype(np.float32)
    rows, scale = quantize_rows(jnp.asarray(x))
    plain = np.asarray(rows * scale[:, None]) @ w.T
    turned = np.asarray(multiply_quantized(jnp.asarray(x), quantize(w), out_dtype=jnp.float32))

    def gap(found):
        return np.sqrt(np.mean((found - x @ w.T) ** 2))

    # The other side's rounding of w is in `turned` alone, and still it wins.
    assert gap(turned) < 0.6 * gap(plain)


def test_rows_of_nothing_and_of_nonsense():
    x = np.ones((3, 8), np.float32)
    x[0] = 0
    x[1, 2] = np.nan
    w = quantize(np.ones((4, 8), np.float32))
    found = np.asarray(multiply_quantized(jnp.asarray(x), w, out_dtype=jnp.float32))
    np.testing.assert_array_equal(found[0], 0)
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[2], 8, rtol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_every_family_stays_close_to_float(name):
    cfg = preset(name)
    params = random_params(cfg)
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 12))
    exact = compute_logits(params, tokens, cfg)
    found = compute_logits(quantize_params(params, cfg), tokens, cfg)
    assert found.dtype == np.float32
    error = np.sqrt(np.mean((found - exact) ** 2)) / exact.std()
    assert 1e-4 < error < 0.06


@pytest.mark.parametrize("name", TINY)
def test_matrices_alone_become_integers(name):
    cfg = preset(name)
    params = init_params(jax.random.key(0), cfg, jnp.bfloat16)
    made = quantize_params(params, cfg)
    assert (made.lm_head is None) == cfg.tie_embeddings
    bytes_before, bytes_after = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (params, made)
    )
    assert bytes_after < 0.65 * bytes_before
    kept = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 1]
    others = [leaf for leaf in jax.tree.leaves(made) if leaf.dtype == jnp.bfloat16]
    jax.tree.map(np.testing.assert_array_equal, others, kept)
    hidden = jax.eval_shape(
        lambda p: forward(
            p,
            jnp.zeros((1, 2), jnp.int32),
            jnp.zeros((1, 2), jnp.int32),
            cfg=cfg,
            attend=make_dense_attend(cfg),
        )[0],
        made,
    )
    assert hidden.dtype == jnp.bfloat16


def test_it_is_traceable_and_says_its_shapes_without_weights():
    cfg = preset("tiny-qwen2")
    params = random_params(cfg)
    made = quantize_params(params, cfg)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype(float), b.astype(float), atol=1),
        jax.jit(functools.partial(quantize_params, cfg=cfg))(params),
        made,
    )
    shapes = jax.eval_shape(functools.partial(quantize_params, cfg=cfg), abstract_params(cfg))
    assert jax.tree.structure(shapes) == jax.tree.structure(made)
    assert all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(made), strict=True)
    )


def test_tensor_parallel_integers_give_the_same_logits():
    cfg = preset("tiny-qwen2")
    params = quantize_params(random_params(cfg), cfg)
    tokens = np.arange(10).reshape(2, 5)
    split = shard_tree(make_mesh(data=4, model=2), params, quantized_axes(cfg))
    wq, wo = split.layers[0].wq, split.layers[0].wo
    assert isinstance(wq, QuantizedMatrix)
    assert (wq.values.sharding.spec, wq.scale.sharding.spec) == (P("model", None), P("model"))
    assert wq.sums.sharding.spec == P("model")
    assert (wo.values.sharding.spec, wo.scale.sharding.spec) == (P(None, "model"), P(None))
    expected = compute_logits(params, tokens, cfg)
    # A rotation that is split sums in another order, and a last bit may tip a rounding.
    np.testing.assert_allclose(compute_logits(split, tokens, cfg), expected, atol=0.02)


def test_rows_split_over_devices_are_rounded_alike():
    cfg = preset("tiny-llama")
    params = quantize_params(random_params(cfg), cfg)
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((16, cfg.model_dim)), jnp.float32)
    mesh = make_mesh(data=8)
    rows = P(("replica", "data"))

    def run(params, hidden):
        return unembed(params, hidden, cfg=cfg)

    split = jax.shard_map(run, mesh=mesh, in_specs=(P(), rows), out_specs=rows)
    found = np.asarray(jax.jit(split)(params, hidden))
    np.testing.assert_allclose(found, jax.jit(run)(params, hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_smollm2_predicts_what_it_predicts_in_float(smollm2_gguf):
    params, cfg, _ = load_gguf(smollm2_gguf)
    tokens = np.random.default_rng(0).integers(10, cfg.vocab_size, (1, 12))
    tokens[0, 4:] = np.arange(500, 508)
    exact = jax.nn.log_softmax(compute_logits(params, tokens, cfg))
    found = jax.nn.log_softmax(compute_logits(quantize_params(params, cfg), tokens, cfg))
    divergence = np.sum(np.exp(exact) * (exact - found), -1)
    assert 0 < divergence.mean() < 0.05


def test_quantizing_twice_is_refused():
    cfg = preset("tiny-llama")
    once = quantize_params(random_params(cfg), cfg)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_params(once, cfg)


@pytest.mark.parametrize("name", ["int4", "INT8", "", "none"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=rf"quantize '{name}': accepted are 'int8' or None"):
        check_quantization(name)


def test_known_names_pass():
    check_quantization(None)
    check_quantization("int8")
