"""Visit counts and improved policies against mctx, on random trees of K given actions a node.

mctx evaluates a child when a simulation first reaches it and gives it the same K actions as every
node. So ours judges on visit here; a masked action is a step that the expander did not bring.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from procedural import fold, uniform

from rlm_jax.core.budget import zero_budget
from rlm_jax.reasoning.drive import run_compiled
from rlm_jax.reasoning.operators.structure import child_slots
from rlm_jax.reasoning.protocol import make_outcome
from rlm_jax.reasoning.strategies.gumbel import improve_prior, make_gumbel, scale_q
from rlm_jax.reasoning.strategies.puct import make_puct
from rlm_jax.reasoning.structure import check, make_structure
from rlm_jax.reasoning.tree_config import TreeConfig
from rlm_jax.reasoning.tree_descent import find_first, look_below
from rlm_jax.reasoning.tree_search import init_state

mctx = pytest.importorskip("mctx", reason="pip install 'rlm_jax[test]' brings mctx")

ROOTS = np.asarray([5, 77, 123], np.uint32)


def make_mask(num_actions):
    """Nothing masked; one action; all but the first three."""
    mask = np.zeros((len(ROOTS), num_actions), bool)
    mask[1, 1] = True
    mask[2, 3:] = True
    return jnp.asarray(mask)


def predict(bits, num_actions):
    """Logits [K] and value of a state."""
    logits = 4.0 * uniform(bits[..., None], jnp.arange(num_actions) + 50)
    return logits, 2.0 * uniform(bits, 1) - 1.0


def make_expand(num_actions, mask):
    def expand(params, keys, world, structure, request):
        del params, keys
        slots = child_slots(structure, request)
        bits = jnp.take_along_axis(world, jnp.maximum(request.nodes, 0), 1)
        logits, value = predict(bits, num_actions)
        valid = jnp.broadcast_to(request.grows[..., None], slots.shape)
        valid &= (request.nodes != 0)[..., None] | ~mask[:, None]
        rows = jnp.arange(slots.shape[0])[:, None, None]
        children = fold(bits[..., None], jnp.arange(num_actions))
        cost = zero_budget(structure.num_nodes)
        outcome = make_outcome(valid, cost, logprob=logits, node_value=value)
        return outcome, world.at[rows, slots].set(children, mode="drop")

    return expand


def run_ours(strategy, num_actions, num_simulations):
    size = 1 + num_actions * (num_simulations + 1)
    structure = make_structure(jnp.ones(len(ROOTS), jnp.int32), size)
    world = jnp.zeros(structure.depth.shape, jnp.uint32).at[:, 0].set(ROOTS)
    keys = jax.random.split(jax.random.key(0), len(ROOTS))
    expand = make_expand(num_actions, make_mask(num_actions))
    run = jax.jit(lambda w, s: run_compiled(strategy, expand, None, keys, w, s)[0])
    structure = run(world, structure)
    check(structure)
    return structure


@functools.cache
def run_mctx(kind, num_actions, num_simulations, gumbel_scale=0.0, value_scale=0.0):
    def recurrent(params, key, action, embedding):
        del params, key
        child = fold(embedding, action)
        logits, value = predict(child, num_actions)
        zero = jnp.zeros_like(value)
        output = mctx.RecurrentFnOutput(
            reward=zero, discount=zero + 1.0, prior_logits=logits, value=value
        )
        return output, child

    def search():
        logits, value = predict(jnp.asarray(ROOTS), num_actions)
        root = mctx.RootFnOutput(prior_logits=logits, value=value, embedding=jnp.asarray(ROOTS))
        args = (None, jax.random.key(3), root, recurrent, num_simulations)
        mask = make_mask(num_actions)
        if kind == "puct":
            return mctx.muzero_policy(*args, invalid_actions=mask, dirichlet_fraction=0.0)
        transform = functools.partial(
            mctx.qtransform_completed_by_mix_value, value_scale=value_scale
        )
        return mctx.gumbel_muzero_policy(
            *args, invalid_actions=mask, gumbel_scale=gumbel_scale, qtransform=transform
        )

    return jax.jit(search)()


def settings(num_actions, num_simulations, num_lanes=1):
    return {
        "num_children": num_actions,
        "num_simulations": num_simulations,
        "num_lanes": num_lanes,
        "max_depth": num_simulations + 1,
        "judge": "visit",
        "length_power": 0.0,
    }


def make_ours(kind, gumbel=None, value_scale=0.0, **tree):
    if kind == "puct":
        return make_puct(base=19652.0, q="siblings", **tree)
    strategy = make_gumbel(gumbel_scale=0.0, value_scale=value_scale, **tree)
    # One loop for rounds of all widths: it compiles much faster.
    strategy = strategy._replace(widths=(), count_lanes=None)
    if gumbel is None:
        return strategy

    def init(structure, keys):
        state = strategy.init(structure, keys)
        return state.replace(extra=state.extra.replace(gumbel=gumbel))

    return strategy._replace(init=init)


def assert_same_visits(structure, output):
    """At the root's children in order, and over the whole tree as a multiset."""
    tree = output.search_tree
    theirs = np.asarray(tree.summary().visit_counts)
    visits = np.asarray(structure.visits).astype(int)
    np.testing.assert_array_equal(visits[:, 1 : 1 + theirs.shape[1]], theirs)
    for ours, node_visits in zip(visits, np.asarray(tree.node_visits), strict=True):
        seen = sorted(node_visits[node_visits > 0])
        assert sorted(ours[ours > 0]) == seen


CASES = [
    ("gumbel", 4, 8, 1),
    ("gumbel", 8, 50, 4),
    ("gumbel", 32, 200, 16),
    ("puct", 4, 8, 1),
    ("puct", 32, 200, 1),
]


@pytest.mark.parametrize(("kind", "num_actions", "num_simulations", "num_lanes"), CASES)
def test_visit_counts_equal(kind, num_actions, num_simulations, num_lanes):
    output = run_mctx(kind, num_actions, num_simulations)
    strategy = make_ours(kind, **settings(num_actions, num_simulations, num_lanes))
    assert_same_visits(run_ours(strategy, num_actions, num_simulations), output)


@pytest.mark.parametrize("num_actions", [8, 16])
def test_several_visits_a_round_halve_alike(num_actions):
    """Visits of the root's children are mctx's: what a round gives them, they had anyway."""
    output = run_mctx("gumbel", num_actions, 128)
    tree = settings(num_actions, 128, num_lanes=16)
    structure = run_ours(make_ours("gumbel", visits_per_round=8, **tree), num_actions, 128)
    theirs = np.asarray(output.search_tree.summary().visit_counts)
    np.testing.assert_array_equal(structure.visits[:, 1 : 1 + num_actions], theirs)


def test_visit_counts_equal_under_the_same_gumbel_noise():
    output = run_mctx("gumbel", 8, 50, gumbel_scale=1.0)
    gumbel = output.search_tree.extra_data.root_gumbel
    assert np.asarray(gumbel).std() > 0.5
    strategy = make_ours("gumbel", gumbel, **settings(8, 50, 4))
    assert_same_visits(run_ours(strategy, 8, 50), output)


def test_improved_policies_equal():
    """With values at play and a leaf a round the whole search is mctx's, to rounding."""
    num_actions, num_simulations = 8, 50
    output = run_mctx("gumbel", num_actions, num_simulations, value_scale=0.1)
    tree = settings(num_actions, num_simulations)
    structure = run_ours(make_ours("gumbel", value_scale=0.1, **tree), num_actions, num_simulations)
    assert_same_visits(structure, output)

    @jax.jit
    def improve(structure):
        cfg = TreeConfig(**tree)
        keys = jax.random.split(jax.random.key(0), len(ROOTS))
        state = init_state(structure, keys, cfg=cfg)
        root = structure.num_nodes[:, None] * 0
        _, siblings = look_below(state, structure, root, cfg, find_first(state, root))
        scaled = scale_q(siblings, value_scale=0.1, visit_offset=50.0)
        return improve_prior(siblings, scaled)[:, 0]

    policy = np.asarray(improve(structure))
    np.testing.assert_allclose(policy, output.action_weights, atol=1e-5)
    np.testing.assert_allclose(structure.value[:, 0], output.search_tree.summary().value, atol=1e-5)
