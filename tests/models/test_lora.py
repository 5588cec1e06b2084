"""LoRA: what adapters add, that they start as nothing, and that a base stays a reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.core.mesh import make_mesh
from rlm_jax.core.sharding import shard_tree
from rlm_jax.learning.kl import exact_kl, kl_penalty
from rlm_jax.learning.losses import cross_entropy, token_logprobs
from rlm_jax.models.attention import make_dense_attend
from rlm_jax.models.lora import (
    LORA_TARGETS,
    LoraConfig,
    describe_lora,
    init_lora,
    lora_axes,
    merge_lora,
)
from rlm_jax.models.params import ParamSpec, init_params
from rlm_jax.models.presets import preset
from rlm_jax.models.quantize import quantize_params
from rlm_jax.models.transformer import forward, unembed

CFG = preset("tiny-llama")
LORA = LoraConfig(rank=4, alpha=8.0)
BASE = init_params(jax.random.key(0), CFG)
TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, CFG.vocab_size)
POSITIONS = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6))
TARGETS = jnp.roll(TOKENS, -1, axis=1)


@jax.jit
def logits_of(params):
    hidden, _ = forward(params, TOKENS, POSITIONS, cfg=CFG, attend=make_dense_attend(CFG))
    return unembed(params, hidden, cfg=CFG)


@jax.jit
def gradient(lora):
    def loss(lora):
        logits = logits_of(merge_lora(BASE, lora, LORA))
        return cross_entropy(logits, TARGETS, jnp.ones((2, 6))).total

    return jax.grad(loss)(lora)


@pytest.fixture(scope="module")
def stepped():
    """Adapters after one step of gradient descent."""
    lora = init_lora(jax.random.key(2), CFG, LORA)
    return jax.tree.map(lambda w, g: w - 0.01 * g, lora, gradient(lora))


def test_a_fresh_adapter_changes_no_bit():
    lora = init_lora(jax.random.key(2), CFG, LORA)
    merged = merge_lora(BASE, lora, LORA)
    jax.tree.map(np.testing.assert_array_equal, merged, BASE)
    np.testing.assert_array_equal(logits_of(merged), logits_of(BASE))
    assert float(jnp.abs(lora.layers[0]["wq"].down).max()) > 0.0


def test_adapters_add_the_parameters_of_golden_g63():
    cfg = dataclasses.replace(CFG, model_dim=64, num_heads=8, num_kv_heads=8, head_dim=8)
    for targets, matrices in ((("wq",), 1), (("wq", "wo"), 2)):
        specs = describe_lora(cfg, LoraConfig(rank=8, targets=targets))
        sizes = [np.prod(spec.shape) for spec in jax.tree.leaves(specs)]
        assert sum(sizes) == 1024 * matrices * cfg.num_layers


def test_merging_equals_numpy():
    lora = init_lora(jax.random.key(3), CFG, LORA)
    lora = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape), lora)
    merged = merge_lora(BASE, lora, LORA)
    for layer, adapters, new in zip(BASE.layers, lora.layers, merged.layers, strict=True):
        assert set(adapters) == set(LORA_TARGETS)
        for name, adapter in adapters.items():
            change = np.asarray(adapter.up, np.float64) @ np.asarray(adapter.down, np.float64)
            wanted = np.asarray(getattr(layer, name)) + 8.0 / 4 * change
            np.testing.assert_allclose(getattr(new, name), wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(new.attn_norm, layer.attn_norm)


def test_only_named_matrices_are_adapted():
    cfg = LoraConfig(rank=2, targets=("wv",))
    lora = init_lora(jax.random.key(3), CFG, cfg)
    moved = merge_lora(BASE, jax.tree.map(jnp.ones_like, lora), cfg)
    assert float(jnp.abs(moved.layers[1].wv - BASE.layers[1].wv).max()) > 0
    np.testing.assert_array_equal(moved.layers[1].wq, BASE.layers[1].wq)


def test_the_gradient_is_the_projection_of_the_matrix_gradient():
    """dL/d up = s dL/dW down^T; with up = 0, dL/d down = 0."""
    lora = init_lora(jax.random.key(2), CFG, LORA)

    def loss(params):
        return cross_entropy(logits_of(params), TARGETS, jnp.ones((2, 6))).total

    full, found = jax.jit(jax.grad(loss))(BASE), gradient(lora)
    for name in ("wk", "w_down"):
        down = np.asarray(lora.layers[0][name].down)
        wanted = LORA.scale * np.asarray(getattr(full.layers[0], name)) @ down.T
        np.testing.assert_allclose(found.layers[0][name].up, wanted, atol=1e-5)
        assert not np.asarray(found.layers[0][name].down).any()
        assert np.abs(wanted).max() > 1e-4


def test_kl_to_the_base_rises_above_zero_with_the_first_step(stepped):
    """Two published trainers measure the KL against a reference that has the trained adapter in
    it, where it is 0 for ever."""
    policy, mask = logits_of(merge_lora(BASE, stepped, LORA)), jnp.ones((2, 6))
    base = logits_of(BASE)
    logprob = token_logprobs(policy, TOKENS)
    for name in ("k2", "k3"):
        assert float(kl_penalty(logprob, token_logprobs(base, TOKENS), mask, name).mean()) > 1e-7
    assert float(exact_kl(policy, base, mask).mean()) > 1e-6
    shared = logits_of(merge_lora(BASE, stepped, LORA))
    assert float(exact_kl(policy, shared, mask).mean()) == 0.0


def test_dropout_leaves_out_whole_input_features(stepped):
    cfg = dataclasses.replace(LORA, dropout=0.5)
    merged = merge_lora(BASE, stepped, cfg, jax.random.key(5))
    change = np.asarray(merged.layers[0].wq - BASE.layers[0].wq)
    whole = np.asarray(merge_lora(BASE, stepped, cfg).layers[0].wq - BASE.layers[0].wq)
    out = ~change.any(0)
    assert 0 < out.sum() < change.shape[1]
    np.testing.assert_allclose(change[:, ~out], 2 * whole[:, ~out], atol=1e-6)


def test_adapters_are_split_as_their_matrices_are(stepped):
    mesh = make_mesh(data=4, model=2)
    placed = shard_tree(mesh, stepped, lora_axes(CFG, LORA, 2))
    gate = placed.layers[0]["w_gate"]
    assert gate.up.addressable_shards[0].data.shape == (gate.up.shape[0] // 2, 4)
    assert gate.down.sharding.is_fully_replicated
    specs = jax.tree.leaves(describe_lora(CFG, LORA), is_leaf=lambda x: isinstance(x, ParamSpec))
    names = jax.tree.leaves(
        lora_axes(CFG, LORA), is_leaf=lambda x: isinstance(x, tuple) and not isinstance(x[0], dict)
    )
    assert [spec.axes for spec in specs] == names


def test_bad_settings_and_models_are_refused(stepped):
    for fields, message in (
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ("embed",)}, "embed"),
        ({"targets": ()}, "targets"),
        ({"targets": ("wq", "wq")}, "targets"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraConfig(**fields)
    with pytest.raises(ValueError, match="quantized"):
        merge_lora(quantize_params(BASE, CFG), stepped, LORA)
    with pytest.raises(ValueError, match="layers"):
        merge_lora(dataclasses.replace(BASE, layers=BASE.layers[:1]), stepped, LORA)
