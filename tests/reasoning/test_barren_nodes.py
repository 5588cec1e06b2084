"""Nodes of which nothing can be grown: every step that a task drops is no child of theirs.

The procedural environment, with steps that are invalid by rate; at rate 1 nothing ever grows.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import procedural
import pytest
from film import TOKEN_LIMITS, frames, shoot, start
from test_strategies import LAST, VARIANTS

from rlm_jax.reasoning.structure import check

# Every strategy compiles twice.
pytestmark = pytest.mark.slow

ROUNDS = 40
SOME = [*LAST, *(pytest.param(VARIANTS[name][0], id=f"{name}-0") for name in ("puct", "gumbel"))]


def make_expand(invalid_rate):
    """The procedural expander, with steps that are paid for and dropped.

    Half of the nodes, but not the root, are wholly barren; elsewhere steps are lost one by one.
    """
    expand = procedural.make_expand()

    def drop(params, keys, world, structure, request):
        outcome, world = expand(params, keys, world, structure, request)
        nodes = jnp.maximum(request.nodes, 0)
        number = jnp.take_along_axis(world, nodes, 1)
        barren = (procedural.uniform(number, 7) < 0.5) & (request.nodes > 0)
        ranks = jnp.arange(request.num_children) + structure.num_nodes[:, None, None]
        lost = procedural.uniform(number[..., None], 8 + ranks) < invalid_rate
        lost |= barren[..., None] & (invalid_rate > 0)
        return outcome.replace(valid=outcome.valid & ~lost), world

    return drop


@functools.cache
def program(strategy):
    def run(invalid_rate, *problems):
        return shoot(strategy, make_expand(invalid_rate), *problems, rounds=ROUNDS)

    return jax.jit(run)


def film(strategy, invalid_rate):
    return jax.tree.map(np.asarray, program(strategy)(jnp.float32(invalid_rate), *start()))


@pytest.mark.parametrize("strategy", SOME)
def test_a_barren_node_is_not_asked_again(strategy):
    """Each node is grown once at most, whatever came of it, and the search comes to an end. A chain
    that may be refused asks again, but no more often than that."""
    taken = film(strategy, 0.4)
    assert (taken.asked[-1] < 0).all()
    before = jax.tree.map(np.asarray, start()[2])
    barren = 0
    most = 1 + getattr(strategy.tell, "keywords", {}).get("max_refused", 0)
    grown_ever = [collections.Counter() for _ in TOKEN_LIMITS]
    for _, grown_nodes, _, s in frames(taken):
        check(s)
        for b, lanes in enumerate(grown_nodes):
            inner = lanes[lanes > 0].tolist()
            grown_ever[b].update(inner)
            assert max(grown_ever[b].values(), default=0) <= most
            assert before.alive[b, inner].all()
            barren += sum(not (s.alive[b] & (s.parent[b] == node)).any() for node in inner)
        before = s
    assert barren > 3
    # What was dropped is dead, counted, and never part of an answer.
    dead = ~before.alive & (np.arange(before.alive.shape[1]) < before.num_nodes[:, None])
    assert dead.any()
    if strategy.name != "beam":  # It prunes what it visited.
        assert (before.visits[dead] == 0).all()
    assert not (before.terminal | before.proven)[dead].any()


@pytest.mark.parametrize("strategy", SOME)
def test_where_nothing_can_grow_the_search_ends_with_the_root(strategy):
    """At the root all steps are lost: it may be sampled anew, as long as the budget pays."""
    taken = film(strategy, 1.0)
    assert (taken.asked[-1] < 0).all()
    s = jax.tree.map(lambda array: array[-1], taken.structure)
    check(s)
    assert (s.alive.sum(-1) == 1).all()
    assert (s.parent[:, 1:] <= 0).all()
    answer = jax.jit(strategy.answer)(jax.tree.map(jnp.asarray, s), jnp.full_like(s.depth, -1))
    assert np.isfinite(answer.score).all()
    assert (np.asarray(answer.node) <= 0).all()
