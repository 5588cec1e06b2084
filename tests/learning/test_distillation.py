"""Search distillation: improved step distributions and both losses, against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.core.mesh import make_mesh
from rlm_jax.learning.distillation import (
    improve_policy,
    list_children,
    sequence_distillation,
    sibling_distillation,
)
from rlm_jax.learning.losses import cross_entropy, token_logprobs
from rlm_jax.learning.steps import sum_by_step
from rlm_jax.learning.targets import value_tree
from rlm_jax.reasoning.sharding import place_batch, shard_search

SETTINGS = (
    *("num_children", "rule", "temperature", "value_scale", "visit_offset"),
    *("min_visits", "min_children"),
)
improve = jax.jit(improve_policy, static_argnames=SETTINGS)
read = jax.jit(value_tree, static_argnames=("rule", "discount"))
sequence = jax.jit(sequence_distillation)
siblings_form = jax.jit(sibling_distillation)
sibling_gradient = jax.jit(jax.grad(lambda *a: sibling_distillation(*a).total))


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def completed_by_hand(q, visits, prior, model_value, value_scale, visit_offset):
    """softmax(log prior + sigma(completed Q)) of one node, from Danihelka et al. 2022."""
    q, visits, prior = (np.asarray(a, np.float64) for a in (q, visits, prior))
    seen = visits > 0
    mean = (prior * q)[seen].sum() / prior[seen].sum() if seen.any() else 0.0
    mixed = (model_value + visits.sum() * mean) / (1 + visits.sum())
    q = np.where(seen, q, mixed)
    q = (q - q.min()) / max(q.max() - q.min(), 1e-8)
    logits = np.log(prior) + (visit_offset + visits.max()) * value_scale * q
    return np.exp(log_softmax(logits))


def test_weights_of_a_tree_equal_the_definitions(plant, random_tree):
    rng = np.random.default_rng(2)
    trees = [random_tree(rng, 16) for _ in range(8)]
    structure = plant(trees)
    rewards = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
    tree = read(structure, rewards, rule="weighted", discount=0.9)
    by_q = improve(structure, tree, num_children=16, value_scale=0.3, visit_offset=5.0)
    by_n = improve(structure, tree, num_children=16, rule="visits", temperature=0.5)
    taught = 0
    for row, nodes in enumerate(trees):
        for i, node in enumerate(nodes):
            kids = [j for j, n in enumerate(nodes) if n["parents"] == [i] and n.get("alive", True)]
            assert by_q.children[row, i].tolist() == kids + [-1] * (16 - len(kids))
            visits = [max(nodes[j]["visits"], nodes[j].get("terminal", False)) for j in kids]
            teaches = len(kids) >= 2 and sum(visits) > 0
            assert bool(by_q.teaches[row, i]) == bool(by_n.teaches[row, i]) == teaches
            if not teaches:
                assert not np.asarray(by_q.weights[row, i]).any()
                continue
            taught += 1
            wanted = completed_by_hand(
                [float(tree.edge[row, j]) for j in kids],
                visits,
                [nodes[j]["prior"] for j in kids],
                node["model_value"],
                0.3,
                5.0,
            )
            np.testing.assert_allclose(by_q.weights[row, i, : len(kids)], wanted, atol=1e-5)
            squares = np.asarray(visits) ** 2
            wanted = squares / squares.sum()
            np.testing.assert_allclose(by_n.weights[row, i, : len(kids)], wanted, atol=1e-5)
            assert not np.asarray(by_q.weights[row, i, len(kids) :]).any()
    assert taught > 5


def test_visit_weights_equal_golden_g54(plant, golden):
    nodes = [{"parents": []}] + [{"parents": [0], "visits": n} for n in (5, 3, 2)]
    structure = plant([nodes])
    tree = read(structure, jnp.zeros((1, 16)))
    for temperature, name in ((1.0, "G54_visit_policy_t1"), (0.5, "G54_t.5")):
        found = improve(structure, tree, num_children=3, rule="visits", temperature=temperature)
        np.testing.assert_allclose(found.weights[0, 0], golden[name], atol=1e-5)


def test_a_proven_child_takes_the_weight(plant):
    """A solution found right outweighs siblings of higher prior that came to nothing."""
    nodes = [{"parents": []}]
    nodes += [{"parents": [0], "visits": 1, "prior": p, "terminal": True} for p in (0.6, 0.3, 0.1)]
    structure = plant([nodes])
    tree = read(structure, jnp.zeros((1, 16)).at[0, 3].set(1.0), rule="max")
    found = improve(structure, tree, num_children=3, value_scale=1.0)
    assert float(found.weights[0, 0, 2]) > 0.999


def test_only_the_first_children_are_kept_and_settings_hold(plant):
    nodes = [{"parents": []}] + [{"parents": [0], "visits": 1, "prior": 0.25} for _ in range(4)]
    nodes[2]["alive"] = False
    structure = plant([nodes])
    assert list_children(structure, 2)[0, 0].tolist() == [1, 3]
    tree = read(structure, jnp.zeros((1, 16)))
    for settings_ in ({"min_visits": 4.0}, {"min_children": 4}):
        found = improve(structure, tree, num_children=4, **settings_)
        assert not found.teaches.any()
        assert not found.weights.any()
    with pytest.raises(ValueError, match="boltzmann"):
        improve_policy(structure, tree, num_children=2, rule="boltzmann")


def test_both_losses_equal_numpy():
    rng = np.random.default_rng(4)
    logprob = (-5 * rng.random((6, 4))).astype(np.float32)
    real = np.arange(4)[None] < np.asarray([4, 3, 2, 1, 4, 0])[:, None]
    weights = np.where(real, rng.random((6, 4)), 0)
    weights[4] = 0
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-9)
    dirty = jnp.asarray(np.where(real, logprob, np.nan))
    found = sequence(dirty, jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(found.total, -(weights * logprob).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.count, 4.0, rtol=1e-5)
    wanted = 0.0
    for row in range(4):
        w, logs = weights[row, real[row]], log_softmax(logprob[row, real[row]])
        wanted += (w * (np.log(w) - logs)).sum()
    found = siblings_form(dirty, jnp.asarray(weights, jnp.float32), jnp.asarray(real))
    np.testing.assert_allclose(found.total, wanted, rtol=1e-4)
    np.testing.assert_allclose(found.count, 4.0, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), scale=st.sampled_from([0.0, 1.0, 1e3, 1e8]))
def test_the_sibling_form_moves_no_mass_and_rests_at_its_target(seed, scale):
    rng = np.random.default_rng(seed)
    logprob = jnp.asarray(-scale * rng.random((3, 4)), jnp.float32)
    real = jnp.asarray(rng.random((3, 4)) < 0.7)
    weights = np.where(real, rng.random((3, 4)), 0)
    weights = jnp.asarray(weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9), jnp.float32)
    grad = np.asarray(sibling_gradient(logprob, weights, real))
    assert np.isfinite(grad).all()
    np.testing.assert_allclose(grad.sum(-1), 0.0, atol=1e-5)
    assert not grad[~np.asarray(real)].any()
    at_target = jnp.log(jnp.maximum(weights, 1e-30)) - 7.0
    assert float(siblings_form(at_target, weights, real).total) == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(sibling_gradient(at_target, weights, real), 0.0, atol=1e-5)


def test_the_sequence_form_is_weighted_fine_tuning_on_the_steps():
    """One row a step, weight w_k on each of its tokens: the same total and the same gradient."""
    rng = np.random.default_rng(6)
    logits = jnp.asarray(rng.normal(size=(3, 5, 7)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 7, (3, 5)), jnp.int32)
    ids = jnp.asarray([[-1, 0, 0, 0, -1], [-1, -1, 0, 0, 0], [0, 0, -1, -1, -1]])
    weights = jnp.asarray([0.5, 0.2, 0.3])

    def by_steps(logits):
        logprob = sum_by_step(token_logprobs(logits, tokens), ids, 1)[:, 0]
        return sequence_distillation(logprob[None], weights[None]).total

    def by_tokens(logits):
        return cross_entropy(logits, tokens, jnp.where(ids >= 0, weights[:, None], 0.0)).total

    first, second = (jax.jit(jax.value_and_grad(f))(logits) for f in (by_steps, by_tokens))
    np.testing.assert_allclose(first[0], second[0], rtol=1e-5)
    np.testing.assert_allclose(first[1], second[1], atol=1e-6)


def test_eight_devices_see_what_one_sees(plant, random_tree):
    rng = np.random.default_rng(8)
    structure = plant([random_tree(rng, 9) for _ in range(8)])
    rewards = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)

    def run(_, structure, rewards):
        tree = value_tree(structure, rewards)
        return improve_policy(structure, tree, num_children=4)

    mesh = make_mesh()
    many = jax.jit(shard_search(run, mesh))(jnp.zeros(()), *place_batch(mesh, (structure, rewards)))
    one = jax.jit(run)(jnp.zeros(()), structure, rewards)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), many, one)
    # A total over devices is the total of the batch.
    logprob = jnp.asarray(-rng.random((8, 16, 4)), jnp.float32)
    here = sequence(logprob, one.weights)
    there = sequence(*place_batch(mesh, (logprob, one.weights)))
    np.testing.assert_allclose(there.total, here.total, rtol=1e-5)
    np.testing.assert_allclose(there.count, here.count, rtol=1e-5)
