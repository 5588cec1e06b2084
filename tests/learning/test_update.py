"""The loss of both networks and the update: numpy oracles, microbatches, devices, and the guard."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlm_jax.core.mesh import BATCH_AXES, make_mesh
from rlm_jax.data.examples import make_example
from rlm_jax.data.packing import TokenBatch, pack_examples
from rlm_jax.learning.networks import (
    LossConfig,
    init_networks,
    token_loss,
    total_weights,
)
from rlm_jax.learning.update import (
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_schedule,
    require_finite,
    sum_metrics,
    update_state,
)
from rlm_jax.models.attention import make_dense_attend
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.heads import HeadConfig, apply_value_head
from rlm_jax.models.transformer import forward, unembed

MODEL = ModelConfig(
    vocab_size=24,
    num_layers=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    qk_norm=True,
    tie_embeddings=True,
    context_length=64,
    eos_ids=(2,),
    bos_id=1,
)
CFG = LossConfig(value_coef=0.5)


def _draw_example(rng):
    size = int(rng.integers(4, 9))
    soft = rng.random((size, 3)) * (rng.random((size, 1)) < 0.5)
    soft /= np.maximum(soft.sum(-1, keepdims=True), 1e-9)
    ids = np.stack([rng.permutation(24)[:3] for _ in range(size)])
    return make_example(
        rng.integers(3, 24, size),
        loss_weight=np.r_[0, rng.integers(0, 2, size - 1)],
        soft_ids=ids,
        soft_weights=soft,
        value_target=rng.integers(0, 2, size),
        value_weight=rng.integers(0, 2, size),
    )


@pytest.fixture(scope="module")
def networks():
    return init_networks(jax.random.key(0), MODEL, HeadConfig((), "sigmoid"))


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    rng = np.random.default_rng(0)
    packed = pack_examples([_draw_example(rng) for _ in range(10)], 20, num_soft=3)
    # Rows of padding, so that eight devices and four parts divide them.
    spare = -packed.tokens.shape[0] % 8

    def widen(array):
        return jnp.pad(array, ((0, spare), *((0, 0) for _ in array.shape[1:])))

    return jax.tree.map(widen, packed)


def _loss(cfg=CFG):
    return functools.partial(token_loss, model=MODEL, cfg=cfg)


def test_loss_is_that_of_each_token_by_itself(networks, batch):
    """Every example forwarded alone, and every sum done in numpy."""
    loss, metrics = jax.jit(_loss())(networks, batch, total_weights(batch))
    policy = value = 0.0
    for row in range(batch.tokens.shape[0]):
        for segment in range(1, int(batch.segments[row].max()) + 1):
            here = np.flatnonzero(np.asarray(batch.segments[row]) == segment)
            tokens = batch.tokens[row, here][None]
            positions = jnp.arange(len(here))[None]
            hidden, _ = forward(
                networks.policy, tokens, positions, cfg=MODEL, attend=make_dense_attend(MODEL)
            )
            logits = np.asarray(unembed(networks.policy, hidden, cfg=MODEL))[0].astype(np.float64)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            estimate = np.asarray(apply_value_head(networks.value_head, hidden))[0]
            for place, at in enumerate(here):
                weight = float(batch.loss_weight[row, at])
                shares = np.asarray(batch.soft_weights[row, at])
                if weight and shares.sum() > 0:
                    kept = shares > 0
                    ids = np.asarray(batch.soft_ids[row, at])[kept]
                    gap = np.log(shares[kept]) - logp[place - 1, ids]
                    policy += weight * float((shares[kept] * gap).sum())
                elif weight:
                    policy -= weight * float(logp[place - 1, int(batch.tokens[row, at])])
                if float(batch.value_weight[row, at]):
                    target, found = float(batch.value_target[row, at]), float(estimate[place])
                    value -= np.log(found if target else 1 - found)
    totals = total_weights(batch)
    expected = policy / float(totals.policy) + 0.5 * value / float(totals.value)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["value_loss"].total) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("cfg", [CFG, LossConfig(value_loss="mse", z_coef=0.01)])
def test_microbatches_add_up_to_the_batch(networks, batch, cfg):
    optimizer = make_optimizer(
        OptimizerConfig(name="adamw", num_steps=10, warmup_steps=1), networks
    )
    state = init_state(networks, optimizer)
    update = functools.partial(update_state, loss=_loss(cfg), optimizer=optimizer)
    whole, one = jax.jit(update)(state, batch)
    parts, four = jax.jit(functools.partial(update, num_microbatches=4))(state, batch)
    for first, second in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(np.asarray(first), np.asarray(second), atol=2e-5)
    assert one.keys() == four.keys()
    for name in one:
        assert float(one[name].mean()) == pytest.approx(float(four[name].mean()), rel=1e-4)
    with pytest.raises(ValueError, match="cut into 5 microbatches"):
        jax.eval_shape(functools.partial(update, num_microbatches=5), state, batch)


def test_eight_devices_update_as_one(networks, batch):
    optimizer = make_optimizer(OptimizerConfig(num_steps=10, warmup_steps=1), networks)
    state = init_state(networks, optimizer)
    update = jax.jit(functools.partial(update_state, loss=_loss(), optimizer=optimizer))
    plain, metrics = update(state, batch)
    mesh = make_mesh(data=8)
    split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    spread, split_metrics = update(state, split)
    for first, second in zip(jax.tree.leaves(plain), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(np.asarray(first), np.asarray(second), atol=1e-5)
    for name in metrics:
        assert float(metrics[name].mean()) == pytest.approx(
            float(split_metrics[name].mean()), abs=1e-5
        )


def test_a_bad_batch_leaves_the_last_good_state(networks, batch):
    optimizer = make_optimizer(OptimizerConfig(num_steps=10, warmup_steps=1), networks)
    update = jax.jit(functools.partial(update_state, loss=_loss(), optimizer=optimizer))
    good, _ = update(init_state(networks, optimizer), batch)
    poisoned = jax.tree.map(jnp.copy, batch)
    target = poisoned.value_target.at[:].set(jnp.nan)
    bad, metrics = update(good, dataclasses.replace(poisoned, value_target=target))
    assert not bool(bad.healthy)
    later, _ = update(bad, batch)
    for first, second in zip(
        jax.tree.leaves(good.params), jax.tree.leaves(later.params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    assert int(later.step) == int(good.step) == 1
    means = {name: float(value.mean()) for name, value in sum_metrics([metrics]).items()}
    with pytest.raises(FloatingPointError, match="near step 7"):
        require_finite(means, 7)
    require_finite({"loss": 1.0}, 7)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_repeated_updates_learn_a_batch(networks, batch, name):
    rate = {"muon": 2e-2, "adamw": 3e-3}[name]
    cfg = OptimizerConfig(name=name, learning_rate=rate, num_steps=30, warmup_steps=2)
    optimizer = make_optimizer(cfg, networks)
    update = jax.jit(functools.partial(update_state, loss=_loss(), optimizer=optimizer))
    state, losses = init_state(networks, optimizer), []
    for _ in range(30):
        state, metrics = update(state, batch)
        losses.append(float(metrics["loss"].mean()))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 30


def test_schedule_rises_stays_and_falls():
    schedule = make_schedule(
        OptimizerConfig(num_steps=100, warmup_steps=10, decay_share=0.4, final_share=0.1)
    )
    shares = [float(schedule(step)) for step in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[10:61] == pytest.approx([1.0] * 51)
    assert shares[80] == pytest.approx(0.55)
    assert shares[100] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "sgd"}, "'sgd'"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"decay_share": 1.5}, "decay_share"),
        ({"warmup_steps": 20, "num_steps": 10}, "warmup_steps=20 of num_steps=10"),
        ({"clip_norm": -1.0}, "clip_norm=-1"),
    ],
)
def test_wrong_optimizers_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


def test_wrong_losses_are_named():
    with pytest.raises(ValueError, match="'huber'"):
        LossConfig(value_loss="huber")
    with pytest.raises(ValueError, match="value_coef=-1"):
        LossConfig(value_coef=-1.0)


def test_matrices_go_to_muon_and_the_rest_to_adam(networks):
    optimizer = make_optimizer(OptimizerConfig(num_steps=10, warmup_steps=1), networks)
    state = init_state(networks, optimizer)
    momenta = optax.tree.get_all_with_path(state.opt_state, "mu")
    sizes = sorted(sum(leaf.size for leaf in jax.tree.leaves(mu)) for _, mu in momenta)
    total = sum(leaf.size for leaf in jax.tree.leaves(networks))
    embedding = networks.policy.embed.size
    assert sum(sizes) == total
    assert min(sizes) < total - embedding
