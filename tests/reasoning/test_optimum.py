"""Searches on trees whose best leaf is known, and how visits spread where all is equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from film import start
from procedural import fold, make_expand, make_world, uniform

from rlm_jax.core.budget import zero_budget
from rlm_jax.reasoning.drive import run_compiled
from rlm_jax.reasoning.operators.structure import child_slots
from rlm_jax.reasoning.protocol import Outcome
from rlm_jax.reasoning.strategies.beam import make_beam
from rlm_jax.reasoning.strategies.best_first import make_best_first
from rlm_jax.reasoning.strategies.gumbel import make_gumbel
from rlm_jax.reasoning.strategies.puct import make_puct
from rlm_jax.reasoning.strategies.td_mcts import make_td_mcts
from rlm_jax.reasoning.strategies.uct import make_uct
from rlm_jax.reasoning.structure import check, make_structure

DEPTH, BRANCHES, BATCH = 4, 3, 16


def best_below(bits, depth):
    """The highest leaf at or below a state at this depth: the exact value."""
    if depth == DEPTH:
        return uniform(bits, 1)
    children = fold(bits[..., None], jnp.arange(BRANCHES))
    return best_below(children, depth + 1).max(-1)


def expand_exactly(params, keys, world, structure, request):
    """Every node has the same few children, the exact value is known, and leaves end."""
    del params, keys
    slots = child_slots(structure, request)
    rows = jnp.arange(slots.shape[0])[:, None]
    nodes = jnp.maximum(request.nodes, 0)
    # Lanes that sample the root beside or after the first one bring nothing new.
    ranks = jnp.where((request.nodes == 0)[..., None], slots - 1, jnp.arange(BRANCHES))
    children = fold(world[rows, nodes][..., None], ranks % BRANCHES)
    depth = structure.depth[rows, nodes][..., None] + 1
    value = jnp.select(
        [depth == d for d in range(1, DEPTH + 1)],
        [best_below(children, d) for d in range(1, DEPTH + 1)],
    )
    zero = jnp.zeros(slots.shape)
    none = zero.astype(jnp.uint32)
    outcome = Outcome(
        valid=jnp.broadcast_to(request.grows[..., None], slots.shape),
        duplicate=ranks >= BRANCHES,
        length=slots * 0,
        logprob=zero,
        value=value,
        reward=zero,
        terminal=jnp.broadcast_to(depth == DEPTH, slots.shape),
        answer_key=none,
        state_key=none,
        proven=zero > 1,
        node_value=zero[..., 0],
        cost=zero_budget(structure.num_nodes),
    )
    return outcome, world.at[rows[..., None], slots].set(children, mode="drop")


FULL = 1 + BRANCHES * (1 + 3 + 9 + 27)
TREE = {"num_children": BRANCHES, "max_depth": DEPTH, "answer_rule": "best"}
SOLO = 1 + BRANCHES * DEPTH
# With the slots that it may fill: those of the straight way down, or most of the tree.
SEARCHES = {
    "best_first": (make_best_first(**TREE), SOLO),
    "beam": (make_beam(beam_width=1, **TREE), SOLO),
    "beam-2": (make_beam(beam_width=2, shrink=True, **TREE), 2 * SOLO),
    "uct": (make_uct(exploration=0.1, backup="max", **TREE), FULL - 30),
    "puct": (make_puct(exploration=0.5, num_lanes=2, **TREE), FULL - 30),
    "gumbel": (make_gumbel(num_simulations=30, num_lanes=3, backup="max", **TREE), FULL - 30),
    "td_mcts": (make_td_mcts(c1=0.1, terminal="exclude", discount=1.0, **TREE), FULL - 30),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_with_an_exact_value_the_best_leaf_is_found(name):
    strategy, size = SEARCHES[name]
    strategy = strategy._replace(widths=(), count_lanes=None)
    keys, world, structure = start(np.full(BATCH, 9, np.int32), size, seed=3)

    @jax.jit
    def run(world, structure):
        grown, _ = run_compiled(strategy, expand_exactly, None, keys, world, structure)
        return grown, strategy.answer(grown, jnp.full(grown.depth.shape, -1, jnp.int32))

    grown, answer = run(world, structure)
    check(grown)
    bits = np.asarray(world[:, :1])
    for _ in range(DEPTH):
        bits = np.asarray(fold(jnp.asarray(bits)[..., None], jnp.arange(BRANCHES)))
        bits = bits.reshape(BATCH, -1)
    best = np.asarray(uniform(jnp.asarray(bits), 1)).max(-1)
    node = np.asarray(answer.node)
    assert np.asarray(grown.terminal)[np.arange(BATCH), node].all()
    found = np.asarray(grown.model_value)[np.arange(BATCH), node]
    np.testing.assert_array_equal(found, best)


def flat_expand():
    """Equal values, equal steps, no end."""
    expand = make_expand(terminal_rate=0.0, duplicate_rate=0.0, value_fn=lambda bits: 0.5)

    def flat(params, keys, world, structure, request):
        outcome, world = expand(params, keys, world, structure, request)
        return outcome.replace(logprob=jnp.zeros_like(outcome.logprob)), world

    return flat


@pytest.mark.parametrize(
    ("strategy", "spread"),
    [
        (make_puct(num_children=3, max_depth=9, exploration=2.0), 3),
        (make_uct(num_children=3, max_depth=9, judge="visit"), 1),
        (make_td_mcts(num_children=3, max_depth=9, discount=1.0), 1),
    ],
    ids=["puct", "uct", "td_mcts"],
)
def test_equal_values_spread_visits_evenly(strategy, spread):
    """Property (i): no child of the root gets more than an expansion ahead of another."""
    run = jax.jit(lambda k, w, s: run_compiled(strategy, flat_expand(), None, k, w, s)[0])
    structure = run(*start(np.full(2, 10_000, np.int32), 121))
    visits, parent = np.asarray(structure.visits), np.asarray(structure.parent)
    for b in range(2):
        of_root = visits[b][parent[b] == 0]
        assert len(of_root) == 3
        assert of_root.sum() > 20
        assert of_root.max() - of_root.min() <= spread


def test_a_search_ends_when_everything_is_closed():
    strategy = make_puct(num_children=2, num_lanes=2, max_depth=2, resample=False)
    run = jax.jit(lambda k, w, s: run_compiled(strategy, make_expand(), None, k, w, s)[0])
    structure = run(*start(np.full(5, 10_000, np.int32)))
    depth, alive = np.asarray(structure.depth), np.asarray(structure.alive)
    assert depth.max() == 2
    inner = (depth < 2) & alive & ~np.asarray(structure.terminal)
    for b in range(5):
        assert np.isin(np.flatnonzero(inner[b]), np.asarray(structure.parent)[b]).all()


@pytest.mark.parametrize(
    ("num_simulations", "considered", "visits_per_round", "calls"),
    [(32, 16, 1, 4), (128, 32, 1, 27), (800, 32, 1, 155), (128, 16, 16, 8)],
)
def test_rounds_of_gumbel_search(num_simulations, considered, visits_per_round, calls):
    """Sequential calls of the network, counted by running; the root's own comes on top."""
    num_children = 4
    root_lanes = considered // num_children
    strategy = make_gumbel(
        num_simulations=num_simulations,
        max_considered=considered,
        visits_per_round=visits_per_round,
        num_children=num_children,
        num_lanes=considered,
        root_lanes=root_lanes,
        max_depth=30,
    )._replace(widths=(), count_lanes=None)  # One loop for all rounds: it compiles much faster.
    size = 1 + considered + num_children * num_simulations
    run = jax.jit(lambda k, w, s: run_compiled(strategy, flat_expand(), None, k, w, s)[0])
    keys = jax.random.split(jax.random.key(0), 1)
    structure = make_structure(jnp.ones(1, jnp.int32), size)
    structure = run(keys, make_world(keys, size), structure)
    assert int(structure.num_nodes[0]) == size
    assert int(structure.budget.model_calls[0]) - 1 <= calls
    if calls < 10:
        assert int(structure.budget.model_calls[0]) - 1 == calls
