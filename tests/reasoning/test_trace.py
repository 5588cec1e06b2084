"""The operator log: its events alone rebuild the structure, for every way to change one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from procedural import make_expand, make_world
from replay import replay

from rlm_jax.reasoning.drive import advance, advance_host, start
from rlm_jax.reasoning.operators.structure import keep_subtree, take_nodes
from rlm_jax.reasoning.strategies import beam, best_first, best_of_n, puct
from rlm_jax.reasoning.structure import check, make_structure
from rlm_jax.reasoning.trace import keep_event, read_events

CAPACITY, ROUNDS, BATCH = 49, 60, 4
TREE = {"num_children": 3, "num_lanes": 2, "max_depth": 4}
PUCT = puct.make_puct(**TREE)
# The strategy, the environment, and the operators that the log must have met.
CASES = {
    "chains": (best_of_n.make_best_of_n(8, 5), {}, {"generate", "backtrack"}),
    "beam": (beam.make_beam(beam_width=3, num_children=3, max_depth=4), {}, {"prune"}),
    "threshold": (best_first.make_best_first(**TREE, threshold=0.5), {}, {"prune"}),
    "merged": (puct.make_puct(**TREE, merge_states=True), {"num_states": 9}, {"merge", "link"}),
    "visit": (
        puct.make_puct(**TREE, num_simulations=12, judge="visit", terminal="revisit"),
        {},
        {"evaluate", "backpropagate"},
    ),
}


def begin(num_parents=1):
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.arange(BATCH))
    prompts = jnp.full(BATCH, 3, jnp.int32)
    structure = make_structure(prompts, CAPACITY, num_parents=num_parents, token_limit=150)
    return keys, make_world(keys, CAPACITY), structure


@functools.cache
def programs(name):
    strategy, world, _ = CASES[name]
    open_search = functools.partial(start, strategy, trace_rounds=ROUNDS)
    go_on = functools.partial(advance, strategy, make_expand(**world), None)
    return jax.jit(open_search), jax.jit(go_on)


def events_of(search, row, num_children):
    return read_events(search.trace, search.structure, row, num_children)


def assert_rebuilt(events, structure, row):
    alive, parents = replay([(event.operator, event.nodes) for event in events])
    count = int(structure.num_nodes[row])
    assert alive == np.asarray(structure.alive[row, :count]).tolist()
    expected = np.asarray(structure.parents[row, :count]).tolist()
    assert parents == [[parent for parent in of if parent >= 0] for of in expected]


@pytest.mark.parametrize("name", CASES)
def test_the_events_alone_rebuild_the_structure(name):
    open_search, go_on = programs(name)
    strategy, _, expected = CASES[name]
    search = go_on(open_search(*begin(num_parents=3 if name == "merged" else 1)))
    check(search.structure)
    met = set()
    for row in range(BATCH):
        events = events_of(search, row, strategy.num_children)
        assert_rebuilt(events, search.structure, row)
        assert [event.round for event in events] == sorted(event.round for event in events)
        met |= {event.operator for event in events}
    assert expected <= met
    assert ("backpropagate" in met) == (name in ("merged", "visit"))


@pytest.mark.slow
def test_a_kept_subtree_is_one_event_between_two_searches():
    expand = jax.jit(make_expand())
    open_search = jax.jit(functools.partial(start, PUCT, trace_rounds=ROUNDS))
    search = open_search(*begin())
    search = advance_host(PUCT, expand, None, search)
    before = [events_of(search, row, 3) for row in range(BATCH)]
    structure = search.structure
    inner = structure.alive & (structure.parent == 0) & ~structure.terminal
    nodes = jnp.argmax(jnp.where(inner, structure.visits, -1.0), -1).astype(jnp.int32)
    kept, order = keep_subtree(structure, nodes)
    kept = kept.replace(token_limit=kept.token_limit + 60)
    world = take_nodes(search.world, order)
    again = advance_host(PUCT, expand, None, open_search(search.keys, world, kept))
    check(again.structure)
    for row in range(BATCH):
        kept_here = keep_event(before[row][-1].round + 1, int(nodes[row]), np.asarray(order[row]))
        after = events_of(again, row, 3)
        assert any(event.operator == "generate" for event in after)
        assert_rebuilt([*before[row], kept_here, *after], again.structure, row)


def test_a_log_that_is_too_short_says_so():
    open_search, go_on = programs("chains")
    search = go_on(open_search(*begin()))
    trace = search.trace.replace(
        nodes=search.trace.nodes[:, :2], operators=search.trace.operators[:, :2]
    )
    with pytest.raises(ValueError, match=r"the log holds 2 rounds and .* log more rounds"):
        read_events(trace, search.structure, 0, 1)
