"""The loss of both networks and the update: numpy oracles, microbatches, devices, and the guard."""

import dataclasses
import functools
import math

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
    KL_ESTIMATORS,
    LossConfig,
    assemble,
    choose_head,
    init_adapted,
    init_networks,
    token_loss,
    total_weights,
)
from rlm_jax.learning.update import (
    BadStep,
    OptimizerConfig,
    accept_updates,
    find_bad_step,
    init_state,
    make_optimizer,
    make_schedule,
    update_state,
)
from rlm_jax.models.attention import make_dense_attend
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.heads import HeadConfig, apply_value_head
from rlm_jax.models.lora import LoraConfig
from rlm_jax.models.number_embedding import number_waves
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
NUM_GOALS = 5
GOALS = LossConfig(value_coef=0.5, goal_coef=2.0)


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
        goals=rng.integers(-1, 2, (size, NUM_GOALS)),
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
    totals = total_weights(batch)

    @jax.jit
    def judge(tokens):
        attend = make_dense_attend(MODEL)
        positions = jnp.arange(tokens.shape[1])[None]
        hidden, _ = forward(networks.policy, tokens, positions, cfg=MODEL, attend=attend)
        logits = unembed(networks.policy, hidden, cfg=MODEL)
        return logits[0], apply_value_head(networks.value_head, hidden)[0]

    batch = jax.device_get(batch)
    policy = value = 0.0
    for row in range(batch.tokens.shape[0]):
        for segment in range(1, int(batch.segments[row].max()) + 1):
            here = np.flatnonzero(batch.segments[row] == segment)
            # Nothing looks at the padding behind it.
            tokens = np.zeros((1, 8), np.int32)
            tokens[0, : len(here)] = batch.tokens[row, here]
            logits, estimate = jax.device_get(judge(tokens))
            logits = logits.astype(np.float64)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for place, at in enumerate(here):
                weight = float(batch.loss_weight[row, at])
                shares = batch.soft_weights[row, at]
                if weight and shares.sum() > 0:
                    kept = shares > 0
                    ids = batch.soft_ids[row, at][kept]
                    gap = np.log(shares[kept]) - logp[place - 1, ids]
                    policy += weight * float((shares[kept] * gap).sum())
                elif weight:
                    policy -= weight * float(logp[place - 1, int(batch.tokens[row, at])])
                if float(batch.value_weight[row, at]):
                    target, found = float(batch.value_target[row, at]), float(estimate[place])
                    value -= np.log(found if target else 1 - found)
    expected = policy / float(totals.policy) + 0.5 * value / float(totals.value)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["value_loss"].total) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("cfg", [GOALS, LossConfig(value_loss="mse", z_coef=0.01)])
def test_microbatches_add_up_to_the_batch(networks, batch, cfg):
    if cfg.goal_coef:
        networks = init_networks(jax.random.key(0), MODEL, choose_head("goals", "bce", NUM_GOALS))
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


@jax.jit
def _forward(policy, batch):
    """Hidden states of a batch, and logits; position t predicts t + 1."""
    attend = make_dense_attend(MODEL, segment_ids=batch.segments)
    hidden, _ = forward(policy, batch.tokens, batch.positions, cfg=MODEL, attend=attend)
    return hidden, unembed(policy, hidden[:, :-1], cfg=MODEL)


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_kl_is_measured_from_the_base_at_the_tokens_that_teach(networks, batch):
    base = init_networks(jax.random.key(3), MODEL, HeadConfig((), "sigmoid")).policy

    @jax.jit
    def losses(networks, batch, base):
        totals = total_weights(batch)
        cfgs = {name: LossConfig(kl_coef=0.7, kl_estimator=name) for name in KL_ESTIMATORS}
        found = {name: _loss(cfg)(networks, batch, totals, base) for name, cfg in cfgs.items()}
        return found, _loss(LossConfig())(networks, batch, totals)[0]

    found, plain = losses(networks, batch, base)
    own, other = (_log_softmax(_forward(p, batch)[1]) for p in (networks.policy, base))
    weight = np.asarray(batch.loss_weight)[:, 1:]
    at = np.asarray(batch.tokens)[:, 1:, None]
    p, q = (np.take_along_axis(logs, at, -1)[..., 0] for logs in (own, other))
    expected = {
        "exact": (np.exp(own) * (own - other)).sum(-1),
        "k1": p - q,
        "k2": (q - p) ** 2 / 2,
        "k3": np.exp(q - p) - (q - p) - 1,
        "x1": np.exp(q) * (q - p),
    }
    assert expected.keys() == found.keys()
    for name, (value, metrics) in found.items():
        total = (weight * expected[name]).sum()
        assert float(metrics["kl"].total) == pytest.approx(total, rel=1e-3), name
        assert float(metrics["kl"].count) == weight.sum()
        added = 0.7 * total / weight.sum()
        assert float(value) - float(plain) == pytest.approx(added, rel=1e-3), name


def test_a_base_is_asked_for_where_one_is_needed(networks, batch):
    loss = _loss(LossConfig(kl_coef=0.7))
    with pytest.raises(ValueError, match=r"kl_coef=0.7 needs the policy"):
        jax.eval_shape(loss, networks, batch, total_weights(batch))


def test_adapters_learn_alone_and_leave_their_base_behind(networks, batch):
    """The KL is 0 while the adapters are fresh, and above it after one step."""
    lora = LoraConfig(rank=2)
    learned = init_adapted(jax.random.key(4), networks, MODEL, lora)
    optimizer = make_optimizer(OptimizerConfig(num_steps=10, warmup_steps=1), learned)
    loss = functools.partial(_loss(LossConfig(kl_coef=0.1)), base=networks.policy, lora=lora)
    update = jax.jit(functools.partial(update_state, loss=loss, optimizer=optimizer))
    first, before = update(init_state(learned, optimizer), batch)
    second, after = update(first, batch)
    assert abs(float(before["kl"].mean())) < 1e-6
    assert float(after["kl"].mean()) > 1e-5
    assert jax.tree.structure(second.params) == jax.tree.structure(learned)
    found = assemble(second.params, networks.policy, lora)
    assert found.policy.embed is networks.policy.embed
    change = np.asarray(found.policy.layers[0].wq - networks.policy.layers[0].wq)
    assert np.linalg.matrix_rank(change, tol=1e-5) == 2
    with pytest.raises(ValueError, match="adapters need the policy"):
        assemble(second.params)


def test_a_histogram_head_learns_by_its_own_loss(batch):
    """Its loss against a Gaussian cut into bins by the error function of Python."""
    networks = init_networks(jax.random.key(0), MODEL, choose_head("hl_gauss", "hl_gauss"))
    cfg = LossConfig(value_loss="hl_gauss")
    _, metrics = jax.jit(_loss(cfg))(networks, batch, total_weights(batch))
    hidden, _ = _forward(networks.policy, batch)
    (layer,), bins = networks.value_head.layers, networks.value_head.histogram
    logs = _log_softmax(np.asarray(hidden) @ np.asarray(layer.weight).T + np.asarray(layer.bias))
    expected = 0.0
    edges = [bins.bin_width * (i - bins.margin_bins) for i in range(bins.num_bins + 1)]
    for row, at in np.argwhere(np.asarray(batch.value_weight) > 0):
        target = float(batch.value_target[row, at])
        below = [math.erf((edge - target) / (math.sqrt(2) * bins.sigma)) for edge in edges]
        mass = np.diff(below) / (below[-1] - below[0])
        expected -= float(batch.value_weight[row, at]) * float(mass @ logs[row, at])
    assert float(metrics["value_loss"].total) == pytest.approx(expected, rel=1e-4)
    values = apply_value_head(networks.value_head, hidden)
    assert 0 <= float(values.min()) <= float(values.max()) <= 1
    with pytest.raises(ValueError, match="'bce' does not train a head of a histogram"):
        jax.eval_shape(_loss(), networks, batch, total_weights(batch))


def test_goals_are_learned_where_they_are_known(batch):
    """Cross-entropy of every known goal in numpy; with no goals in the batch there is no loss."""
    networks = init_networks(jax.random.key(0), MODEL, choose_head("goals", "bce", NUM_GOALS))
    loss, metrics = jax.jit(_loss(GOALS))(networks, batch, total_weights(batch))
    hidden, _ = _forward(networks.policy, batch)
    factors = networks.value_head.goals
    waves = np.asarray(number_waves(jnp.arange(NUM_GOALS)))
    state, goal = (
        np.asarray(read) @ np.asarray(factor.weight).T + np.asarray(factor.bias)
        for read, factor in ((hidden, factors.state), (waves, factors.goal))
    )
    logits = state @ goal.T / math.sqrt(state.shape[-1])
    signs = np.asarray(batch.goals)
    expected = np.log1p(np.exp(-signs * logits))[signs != 0].sum()
    assert (signs != 0).any()
    assert (signs == 0).any()
    assert float(metrics["goal_loss"].total) == pytest.approx(expected, rel=1e-4)
    without, _ = jax.jit(_loss(CFG))(networks, batch, total_weights(batch))
    share = 2 * expected / (signs != 0).sum()
    assert float(loss) - float(without) == pytest.approx(share, rel=1e-3)
    bare = dataclasses.replace(batch, goals=batch.goals[..., :0])
    none, metrics = jax.jit(_loss(GOALS))(networks, bare, total_weights(bare))
    assert float(none) == float(without)
    assert float(metrics["goal_loss"].count) == 0


def test_a_loss_that_does_not_train_a_head_is_refused(networks, batch):
    with pytest.raises(ValueError, match="goal_coef trains a head for many goals"):
        jax.eval_shape(_loss(GOALS), networks, batch, total_weights(batch))
    with pytest.raises(ValueError, match="the task names no goals"):
        choose_head("goals", "bce")
    with pytest.raises(ValueError, match="'mse' does not train value_head 'hl_gauss'"):
        choose_head("hl_gauss", "mse")
    with pytest.raises(ValueError, match="value_head 'linear'"):
        choose_head("linear", "mse")
    assert choose_head("sigmoid", "mse") == HeadConfig((), "sigmoid")
    with pytest.raises(ValueError, match="'hl_gauss' does not train a head of one number"):
        jax.eval_shape(
            _loss(LossConfig(value_loss="hl_gauss")), networks, batch, total_weights(batch)
        )


def test_a_bad_batch_leaves_the_last_good_state(networks, batch):
    optimizer = make_optimizer(OptimizerConfig(num_steps=10, warmup_steps=1), networks)
    update = jax.jit(functools.partial(update_state, loss=_loss(), optimizer=optimizer))
    good, fine = update(init_state(networks, optimizer), batch)
    target = batch.value_target.at[:].set(jnp.nan)
    bad, metrics = update(good, dataclasses.replace(batch, value_target=target))
    assert not bool(bad.healthy)
    later, finite = update(bad, batch)
    for first, second in zip(
        jax.tree.leaves(good.params), jax.tree.leaves(later.params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    assert int(later.step) == int(good.step) == 1
    found = find_bad_step([fine, metrics, finite], 9)
    assert found is not None
    assert found[:2] == (8, "value_loss")
    assert np.isnan(found.value)
    assert find_bad_step([fine, finite], 9) is None
    # Told to, it goes on from where it was.
    again, _ = update(accept_updates({"train": later})["train"], batch)
    wanted, _ = update(good, batch)
    for first, second in zip(jax.tree.leaves(again), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


def test_an_update_that_is_no_number_is_refused(networks, batch):
    cfg = OptimizerConfig(name="adamw", learning_rate=1e30, num_steps=10, warmup_steps=1)
    optimizer = make_optimizer(cfg, networks)
    update = jax.jit(functools.partial(update_state, loss=_loss(), optimizer=optimizer))
    state, metrics = update(init_state(networks, optimizer), batch)
    assert find_bad_step([metrics], 3) == BadStep(3, "update_norm", math.inf)
    np.testing.assert_array_equal(
        np.asarray(state.params.policy.embed), np.asarray(networks.policy.embed)
    )


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


def test_schedule_that_falls_from_the_start_falls_behind_its_rise():
    cfg = OptimizerConfig(num_steps=100, warmup_steps=10, decay_share=1.0, final_share=0.1)
    shares = [float(make_schedule(cfg)(step)) for step in (10, 55, 100)]
    assert shares == pytest.approx([1.0, 0.55, 0.1])


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
    with pytest.raises(ValueError, match="'k4'"):
        LossConfig(kl_estimator="k4")
    for name in ("value_coef", "z_coef", "kl_coef"):
        with pytest.raises(ValueError, match=f"{name} must be a number >= 0, got -1.0"):
            LossConfig(**{name: -1.0})


def test_matrices_go_to_muon_and_the_rest_to_adam(networks):
    optimizer = make_optimizer(OptimizerConfig(num_steps=10, warmup_steps=1), networks)
    state = init_state(networks, optimizer)
    momenta = optax.tree.get_all_with_path(state.opt_state, "mu")
    sizes = sorted(sum(leaf.size for leaf in jax.tree.leaves(mu)) for _, mu in momenta)
    total = sum(leaf.size for leaf in jax.tree.leaves(networks))
    embedding = networks.policy.embed.size
    assert sum(sizes) == total
    assert min(sizes) < total - embedding
