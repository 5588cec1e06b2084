"""The forward pass against transformers' logits, and attention against plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlm_jax.core.mesh import make_mesh
from rlm_jax.core.sharding import shard_tree
from rlm_jax.models.attention import MASKED_SCORE, make_dense_attend, scores_scale
from rlm_jax.models.config import ModelConfig, RopeScaling
from rlm_jax.models.gguf import load_gguf
from rlm_jax.models.hf import load_hf
from rlm_jax.models.params import (
    abstract_params,
    count_params,
    describe,
    init_params,
    param_axes,
)
from rlm_jax.models.presets import PRESETS, preset
from rlm_jax.models.rope import apply_rope, rope_tables
from rlm_jax.models.transformer import forward, linear, unembed

CASES = ["llama", "qwen2", "qwen2_yarn_windows", "qwen3", "gemma3"]


def random_params(cfg):
    """Parameters from numpy: drawing them in JAX compiles a kernel for every shape."""
    rng = np.random.default_rng(0)

    def draw(spec):
        return jnp.asarray(rng.standard_normal(spec.shape) * spec.shape[-1] ** -0.5, jnp.float32)

    return jax.tree.map(draw, describe(cfg))


def positions_of(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)


def compute_logits(params, tokens, cfg, **masks):
    @jax.jit
    def run(params, tokens):
        attend = make_dense_attend(cfg, **masks)
        hidden, _ = forward(params, tokens, positions_of(tokens), cfg=cfg, attend=attend)
        return unembed(params, hidden, cfg=cfg)

    return np.asarray(run(params, jnp.asarray(tokens, jnp.int32)))


def check_golden(logits, golden, case, columns, tolerance):
    np.testing.assert_allclose(logits[..., columns], golden[f"{case}/logits"], atol=tolerance)
    total = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(total, golden[f"{case}/logsumexp"], atol=tolerance)
    top = np.take_along_axis(logits, golden[f"{case}/argmax"][..., None], -1)[..., 0]
    np.testing.assert_allclose(top, logits.max(-1), atol=2 * tolerance)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, recipes, recipe_folders, golden_logits):
    params, cfg, _ = load_hf(recipe_folders(case))
    logits = compute_logits(params, recipes.golden_tokens(case), cfg)
    assert logits.dtype == np.float32
    check_golden(logits, golden_logits, case, recipes.golden_columns(case, cfg.vocab_size), 5e-5)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_bfloat16_stays_as_close_as_transformers(case, recipes, recipe_folders, golden_logits):
    params, cfg, _ = load_hf(recipe_folders(case), "bfloat16")
    logits = compute_logits(params, recipes.golden_tokens(case), cfg)
    ours = logits[..., recipes.golden_columns(case, cfg.vocab_size)]
    exact, theirs = golden_logits[f"{case}/logits"], golden_logits[f"{case}/bfloat16"]

    def gap(a, b):
        return np.sqrt(np.mean((a - b) ** 2))

    assert 0 < gap(ours, exact) < 1.2 * gap(theirs, exact)
    # Two independent roundings of one function: sqrt(2) times one of them, and no systematic part.
    assert gap(ours, theirs) < 1.6 * gap(theirs, exact)


def test_smollm2_logits_equal_transformers(smollm2_gguf, recipes, golden_logits):
    params, cfg, _ = load_gguf(smollm2_gguf)
    assert dataclasses.replace(cfg) == preset("smollm2-135m")
    logits = compute_logits(params, golden_logits["smollm2/tokens"], cfg)
    columns = recipes.golden_columns("smollm2", cfg.vocab_size)
    check_golden(logits, golden_logits, "smollm2", columns, 1e-3)


def tiny(**changes) -> ModelConfig:
    plain = {"rope_scaling": RopeScaling(), "num_layers": 1}
    return dataclasses.replace(preset("tiny-llama"), **(plain | changes))


def attend_in_numpy(q, k, v, cfg, allowed):
    """One query at a time, keys repeated, float64."""
    out = np.zeros(q.shape)
    rows, num_tokens, heads, _ = q.shape
    for r in range(rows):
        for h in range(heads):
            group = h // (heads // k.shape[2])
            for t in range(num_tokens):
                keys = np.flatnonzero(allowed[r, t])
                scores = k[r, keys, group].astype(np.float64) @ q[r, t, h] * scores_scale(cfg)
                if cfg.attn_softcap:
                    scores = cfg.attn_softcap * np.tanh(scores / cfg.attn_softcap)
                weights = np.exp(scores - scores.max())
                out[r, t, h] = weights / weights.sum() @ v[r, keys, group]
    return out


@pytest.mark.parametrize("masked", ["nothing", "padding", "segments"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 3, "sliding_pattern": (True,)},
        {"attn_softcap": 2.0, "attn_scale": 3.0},
    ],
)
@pytest.mark.parametrize("num_tokens", [7, 75])  # One block of queries, and three.
def test_dense_attention_equals_numpy(num_tokens, changes, masked):
    cfg = tiny(**changes)
    rng = np.random.default_rng(0)
    rows = 2
    q = rng.standard_normal((rows, num_tokens, 4, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, rows, num_tokens, 2, 8)).astype(np.float32)
    t, s = np.mgrid[:num_tokens, :num_tokens]
    allowed = np.broadcast_to(s <= t, (rows, num_tokens, num_tokens)).copy()
    if cfg.sliding_window:
        allowed &= t - s < cfg.sliding_window
    masks = {}
    if masked == "padding":
        masks["key_mask"] = jnp.arange(num_tokens)[None] < jnp.array(
            [[num_tokens - 2], [num_tokens]]
        )
        allowed &= np.asarray(masks["key_mask"])[:, None, :]
        allowed[0, -2:] = s[-2:] == t[-2:]  # the padding's own rows: any values do
    if masked == "segments":
        masks["segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 3, (rows, num_tokens))))
        ids = np.asarray(masks["segment_ids"])
        allowed &= ids[:, :, None] == ids[:, None, :]
    out, state = make_dense_attend(cfg, **masks)(0, *map(jnp.asarray, (q, k, v)), "state")
    expected = attend_in_numpy(q, k, v, cfg, allowed)
    real = np.ones((rows, num_tokens), bool)
    if masked == "padding":
        real = np.asarray(masks["key_mask"])
    assert state == "state"
    assert np.isfinite(np.asarray(out)).all()
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=1e-5)


def test_padding_does_not_change_a_row():
    cfg = preset("tiny-gemma3")
    params = random_params(cfg)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9))
    alone = compute_logits(params, tokens[:1, :6], cfg)
    padded = compute_logits(
        params, tokens, cfg, key_mask=jnp.arange(9)[None] < jnp.array([[6], [9]])
    )
    np.testing.assert_allclose(padded[:1, :6], alone, atol=1e-5)


def test_scores_depend_on_distance_alone():
    cfg = preset("tiny-gemma3")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 2, 1, cfg.head_dim)), jnp.float32)

    def score(start):
        tables = rope_tables(cfg, jnp.array([[start, start + 3]], jnp.int32))
        assert set(tables) == {True, False}
        rotated = apply_rope(x, tables[True])
        return float(jnp.vdot(rotated[0, 0], rotated[0, 1]))

    assert score(0) == pytest.approx(score(50), abs=1e-4)
    assert score(0) != pytest.approx(float(jnp.vdot(x[0, 0], x[0, 1])), abs=1e-2)


def test_attend_sees_rotated_grouped_heads_and_carries_state():
    cfg = preset("tiny-qwen3")
    params = random_params(cfg)
    tokens = jnp.ones((2, 3), jnp.int32)
    dense = make_dense_attend(cfg)

    def attend(layer, q, k, v, seen):
        assert q.shape == (2, 3, cfg.num_heads, cfg.head_dim)
        assert k.shape == v.shape == (2, 3, cfg.num_kv_heads, cfg.head_dim)
        return dense(layer, q, k, v, None)[0], (*seen, jnp.int32(layer))

    def run(params):
        return forward(params, tokens, positions_of(tokens), cfg=cfg, attend=attend, state=())

    hidden, seen = jax.eval_shape(run, params)
    assert hidden.shape == (2, 3, cfg.model_dim)
    assert len(seen) == cfg.num_layers


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_one_description_gives_layout_shapes_and_axes(name):
    cfg = preset(name)
    shapes = abstract_params(cfg, jnp.bfloat16)
    leaves, treedef = jax.tree.flatten(shapes)
    axes = treedef.flatten_up_to(param_axes(cfg))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    for leaf, names in zip(leaves, axes, strict=True):
        assert len(names) == len(leaf.shape)
        assert set(names) <= {"vocab", "embed", "heads", "kv_heads", "ffn", None}
    assert sum(leaf.size for leaf in leaves) == count_params(cfg)
    if name.startswith("tiny"):
        made = jax.eval_shape(lambda key: init_params(key, cfg, jnp.bfloat16), jax.random.key(0))
        assert jax.tree.structure(made) == treedef
        assert jax.tree.leaves(made) == leaves


def test_tensor_parallel_parameters_give_the_same_logits():
    cfg = preset("tiny-qwen2")
    params = random_params(cfg)
    tokens = np.arange(10).reshape(2, 5)
    split = shard_tree(make_mesh(data=4, model=2), params, param_axes(cfg))
    assert split.layers[0].wq.sharding.spec == PartitionSpec("model", None)
    assert split.layers[0].wo.sharding.spec == PartitionSpec(None, "model")
    expected = compute_logits(params, tokens, cfg)
    np.testing.assert_allclose(compute_logits(split, tokens, cfg), expected, atol=1e-5)


def test_initial_parameters_follow_their_names():
    small, tied = tiny(), tiny(tie_embeddings=True)
    a, b = (init_params(jax.random.key(3), cfg) for cfg in (small, tied))
    assert b.lm_head is None
    jax.tree.map(np.testing.assert_array_equal, a.layers, b.layers)
    assert not np.array_equal(a.layers[0].wk, a.layers[0].wv)
    assert float(jnp.std(a.layers[0].w_gate)) == pytest.approx(small.model_dim**-0.5, rel=0.1)


def test_masked_score_is_finite_in_bfloat16():
    assert np.isfinite(float(jnp.asarray(MASKED_SCORE, jnp.bfloat16)))


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"no preset 'gpt5'.*smollm2-135m"):
        preset("gpt5")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("leading", [(1, 1), (2, 1), (3,), (5, 2), (300,)])
def test_products_of_any_number_of_rows_equal_numpy(leading, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*leading, 48)), dtype)
    w = jnp.asarray(rng.standard_normal((36, 48)), dtype)
    expected = np.asarray(x, np.float32) @ np.asarray(w, np.float32).T
    for out_dtype in (None, jnp.float32):
        found = jax.jit(linear, static_argnames="out_dtype")(x, w, out_dtype=out_dtype)
        assert (found.shape, found.dtype) == ((*leading, 36), jnp.dtype(out_dtype or dtype))
        tolerance = 1e-5 if found.dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(
            found.astype(np.float32), expected, rtol=tolerance, atol=10 * tolerance
        )


@pytest.mark.parametrize(("platform", "sums"), [("cpu", "f32"), ("tpu", "bf16"), ("cuda", "bf16")])
@pytest.mark.parametrize("rows", [2, 300])
def test_products_of_bfloat16_come_out_wide_on_cpu_alone(rows, platform, sums):
    x, w = jnp.zeros((rows, 48), jnp.bfloat16), jnp.zeros((36, 48), jnp.bfloat16)
    lowered = jax.jit(linear).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    (product,) = [line for line in lowered.splitlines() if "dot_general" in line]
    # A narrow sum of a split product is half the bytes of its all-reduce.
    assert product.endswith(f"x{sums}>")
