"""Masked statistics against numpy, budgets, meshes and sharding rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlm_jax.core.budget import add_budgets, zero_budget
from rlm_jax.core.masked import masked_argmax, masked_mean, masked_softmax, masked_sum
from rlm_jax.core.mesh import AXES, make_mesh
from rlm_jax.core.metrics import add_metrics, metric_means
from rlm_jax.core.sharding import FSDP, fits, partition_spec, shard_tree
from rlm_jax.models.params import init_params, param_axes
from rlm_jax.models.presets import preset

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(5, 7)).astype(np.float32)
MASK = RNG.random((5, 7)) < 0.6
MASK[2] = False


def test_masked_sums_ignore_what_is_masked_even_nan():
    dirty = jnp.asarray(np.where(MASK, VALUES, np.nan))
    both = masked_sum(dirty, jnp.asarray(MASK), axis=-1)
    np.testing.assert_allclose(both.total, np.where(MASK, VALUES, 0).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(both.count, MASK.sum(-1))
    assert float(both.mean()[2]) == 0.0
    assert float(masked_mean(dirty, jnp.asarray(MASK))) == pytest.approx(VALUES[MASK].mean())


def test_masked_softmax_is_a_distribution_over_the_mask():
    weights = np.asarray(masked_softmax(jnp.asarray(VALUES * 100), jnp.asarray(MASK)))
    assert (weights[~MASK] == 0).all()
    np.testing.assert_allclose(weights.sum(-1), MASK.any(-1), atol=1e-5)
    row = np.exp(VALUES[0] * 100 - (VALUES[0] * 100)[MASK[0]].max()) * MASK[0]
    np.testing.assert_allclose(weights[0], row / row.sum(), atol=1e-5)


def test_masked_argmax_takes_the_lowest_of_ties_and_admits_minus_infinity():
    values = jnp.asarray([[1.0, 3.0, 3.0], [9.0, -jnp.inf, -jnp.inf], [1.0, 2.0, 3.0]])
    mask = jnp.asarray([[True, True, True], [False, True, True], [False] * 3])
    index, found = masked_argmax(values, mask)
    assert index.tolist()[:2] == [1, 1]
    assert found.tolist() == [True, True, False]


def test_metrics_of_microbatches_add_up_to_the_large_batch():
    halves = [
        {"loss": masked_sum(jnp.asarray(v), jnp.asarray(m))}
        for v, m in ((VALUES[:1], MASK[:1]), (VALUES[1:], MASK[1:]))
    ]
    both = metric_means(add_metrics(*halves))
    assert both["loss"] == pytest.approx(VALUES[MASK].mean(), rel=1e-5)
    with pytest.raises(ValueError, match="accuracy"):
        add_metrics(halves[0], {**halves[1], "accuracy": halves[1]["loss"]})


def test_budgets_add_counter_by_counter():
    first = zero_budget(jnp.zeros(3)).replace(generated_tokens=jnp.asarray([1, 2, 3]))
    second = first.replace(model_calls=jnp.asarray([7, 7, 7]))
    total = add_budgets(first, second)
    assert total.generated_tokens.tolist() == [2, 4, 6]
    assert total.model_calls.tolist() == [7, 7, 7]
    assert total.scored_tokens.tolist() == [0, 0, 0]


def test_a_mesh_always_has_three_axes():
    assert make_mesh().axis_names == AXES
    assert dict(make_mesh(replica=2, model=2).shape) == {"replica": 2, "data": 2, "model": 2}
    assert dict(make_mesh(data=1, devices=jax.devices()[:1]).shape) == dict.fromkeys(AXES, 1)


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"replica": -1, "data": -1}, {"model": 0}, {"data": 4}, {"model": 3}]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ValueError, match="mesh"):
        make_mesh(**sizes)


def test_rules_map_names_and_refuse_what_they_do_not_know():
    assert partition_spec(("heads", "embed")) == PartitionSpec("model", None)
    assert partition_spec(("batch", None)) == PartitionSpec(("replica", "data"), None)
    assert partition_spec(("ffn", "embed"), FSDP) == PartitionSpec("model", "data")
    with pytest.raises(ValueError, match="colour"):
        partition_spec(("colour",))
    with pytest.raises(ValueError, match="map twice"):
        partition_spec(("heads", "ffn"))


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = make_mesh(data=2, model=4)
    spec = PartitionSpec("model", "data")
    assert fits(mesh, spec, (12, 6)) == PartitionSpec("model", "data")
    assert fits(mesh, spec, (6, 6)) == PartitionSpec(None, "data")
    assert fits(mesh, PartitionSpec(("replica", "data")), (4, 9)) == PartitionSpec(
        ("replica", "data"), None
    )


def test_model_parameters_spread_over_the_mesh():
    cfg = preset("tiny-llama")
    params = init_params(jax.random.key(0), cfg)
    mesh = make_mesh(data=2, model=4)
    placed = shard_tree(mesh, params, param_axes(cfg), FSDP)
    np.testing.assert_array_equal(placed.layers[0].w_up, params.layers[0].w_up)
    assert placed.layers[0].w_up.sharding.spec == PartitionSpec("model", "data")
    # Two KV heads of width eight: sixteen rows over four devices, by rows and not by heads.
    assert placed.layers[0].wk.addressable_shards[0].data.shape == (4, 16)
    assert placed.final_norm.sharding.is_fully_replicated or placed.final_norm.ndim == 1
