"""Drivers: chunks, rows handed on, snapshots, structures at their own pace, limits, the log."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from procedural import make_expand, make_world

from rlm_jax.core.snapshot import load_snapshot, save_snapshot
from rlm_jax.reasoning.drive import (
    Limits,
    advance,
    replace_rows,
    run_apart,
    run_compiled,
    start,
)
from rlm_jax.reasoning.strategies import best_of_n, gumbel, puct
from rlm_jax.reasoning.structure import Operator, check, make_structure
from rlm_jax.reasoning.trace import read_events

CAPACITY, LIMIT = 49, 150
STRATEGIES = {
    "best_of_n": best_of_n.make_best_of_n(8, 5),
    "puct": puct.make_puct(num_children=3, num_lanes=2, max_depth=4),
    "gumbel": gumbel.make_gumbel(
        num_simulations=6, num_children=3, num_lanes=2, root_lanes=1, max_depth=4
    ),
}
WIDE = gumbel.make_gumbel(
    num_simulations=10, num_children=3, num_lanes=4, root_lanes=2, max_depth=4
)


def problem_keys(numbers):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.asarray(numbers))


def begin(numbers):
    keys = problem_keys(numbers)
    structure = make_structure(jnp.full(len(numbers), 3, jnp.int32), CAPACITY, token_limit=LIMIT)
    return keys, make_world(keys, CAPACITY), structure


@functools.cache
def programs(name, trace_rounds=0):
    strategy, expand = STRATEGIES[name], make_expand()

    def open_search(keys, world, structure):
        return start(strategy, keys, world, structure, trace_rounds=trace_rounds)

    def chunk(search, max_rounds, min_finished):
        return advance(
            strategy,
            expand,
            None,
            search,
            max_rounds=max_rounds,
            min_finished=min_finished,
        )

    return jax.jit(open_search), jax.jit(chunk)


@functools.cache
def whole(name):
    run = functools.partial(run_compiled, STRATEGIES[name], make_expand(), None)
    return jax.jit(run)(*begin(range(6)))[0]


def rows_of(structure, rows):
    return jax.tree.map(lambda array: np.asarray(array)[np.asarray(rows)], structure)


def assert_equal(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_in_chunks_stopped_saved_and_resumed_is_the_same_search(name, tmp_path):
    open_search, chunk = programs(name)
    search = open_search(*begin(range(3)))
    like = jax.eval_shape(lambda s: s, search)
    num_chunks = 0
    while np.asarray(search.running).any():
        search = chunk(search, 2, 3)
        num_chunks += 1
        assert int(search.rounds.max()) <= 2 * num_chunks
        save_snapshot(tmp_path / "search.npz", search)
        search = load_snapshot(tmp_path / "search.npz", like)
    assert num_chunks > 1
    assert [path.name for path in tmp_path.iterdir()] == ["search.npz"]
    assert_equal(search.structure, rows_of(whole(name), range(3)))


@pytest.mark.parametrize("name", STRATEGIES)
def test_finished_rows_go_to_the_next_problems(name):
    strategy = STRATEGIES[name]
    open_search, chunk = programs(name)
    search = open_search(*begin(range(3)))
    places, waiting, done = [0, 1, 2], [3, 4, 5], {}

    @jax.jit
    def hand_on(search, row, number):
        keys, world, structure = begin([0])
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(number)
        world = search.world.at[row].set(make_world(keys, CAPACITY))
        structure = jax.tree.map(lambda a, b: a.at[row].set(b), search.structure, structure)
        return replace_rows(strategy, search, row, keys, structure, world)

    while len(done) < 6:
        search = chunk(search, 1000, 1 if waiting else 3)
        for row in range(3):
            if places[row] is None or bool(search.running[row]):
                continue
            done[places[row]] = rows_of(search.structure, [row])
            places[row] = waiting.pop(0) if waiting else None
            if places[row] is not None:
                search = hand_on(search, jnp.asarray([row]), jnp.asarray([places[row]]))
    for number in range(6):
        assert_equal(done[number], rows_of(whole(name), [number]))


def test_structures_at_their_own_pace_are_the_same_structures():
    strategy, expand = STRATEGIES["puct"], jax.jit(make_expand())
    keys, world, structure = begin(range(6))
    threads, seen = set(), []

    def remote(params, keys, world, structure, request):
        threads.add(threading.get_ident())
        outcome, new = expand(params, keys, jnp.asarray(world["nodes"]), structure, request)
        return outcome, {"nodes": np.asarray(new)}

    worlds = [{"nodes": np.asarray(world[row : row + 1])} for row in range(6)]
    done, worlds = run_apart(
        strategy,
        remote,
        None,
        keys,
        worlds,
        structure,
        lambda row, one: seen.append((row, int(one.num_nodes[0]))),
        in_flight=3,
    )
    assert_equal(done, whole("puct"))
    assert {row for row, _ in seen} == set(range(6))
    assert 1 < len(threads) <= 3
    with pytest.raises(ValueError, match="in_flight must be >= 1, got 0"):
        run_apart(strategy, remote, None, keys, worlds, structure, in_flight=0)
    with pytest.raises(ValueError, match="5 worlds for 6"):
        run_apart(strategy, remote, None, keys, worlds[:5], structure, in_flight=1)


@pytest.mark.parametrize(
    ("strategy", "planned", "first"),
    [
        pytest.param(WIDE, (4, 3, 2, 1), 2, marks=pytest.mark.slow),
        (puct.make_puct(num_children=3, num_lanes=4, max_depth=4), (4, 1), 1),
    ],
    ids=["gumbel", "puct"],
)
def test_a_narrow_round_has_a_narrow_program(strategy, planned, first):
    assert strategy.widths == planned
    widths = []

    def expand(params, keys, world, structure, request):
        jax.debug.callback(lambda: widths.append(request.nodes.shape[1]), ordered=True)
        return make_expand()(params, keys, world, structure, request)

    keys, world, structure = begin(range(2))
    run = functools.partial(run_compiled, strategy, expand, None)
    done, _ = jax.jit(run)(keys, world, structure)
    jax.effects_barrier()
    assert widths[0] == first
    assert set(widths) <= set(planned)
    assert len(set(widths)) > 1
    run = jax.jit(functools.partial(run_compiled, strategy, make_expand(), None))
    assert_equal(done, rows_of(run(*begin(range(6)))[0], [0, 1]))
    wide = jax.jit(functools.partial(run_compiled, strategy._replace(widths=()), expand, None))
    if strategy.count_lanes is None:
        assert_equal(done, wide(keys, world, structure)[0])


@pytest.mark.parametrize(
    ("limits", "holds"),
    [
        (Limits(), lambda s: s.proven.any(-1)),
        (
            Limits(proven=False, min_value=0.5),
            lambda s: (s.terminal & (s.value >= 0.5)).any(-1),
        ),
        (
            Limits(proven=False, min_share=0.6, min_solutions=2),
            lambda s: s.terminal.sum(-1) >= 2,
        ),
    ],
)
def test_a_search_ends_early_when_its_answer_is_settled(limits, holds):
    strategy, expand = STRATEGIES["puct"], make_expand(proven_answer=3)
    run = functools.partial(run_compiled, strategy, expand, None, limits=limits)
    done = jax.tree.map(np.asarray, jax.jit(run)(*begin(range(6)))[0])
    check(done)
    spent, full = done.budget.generated_tokens, np.asarray(whole("puct").budget.generated_tokens)
    settled = holds(done)
    assert (spent <= full).all()
    assert (spent[settled] < full[settled]).any()
    # What was not settled went on to the end.
    np.testing.assert_array_equal(spent[~settled], full[~settled])


def test_a_state_is_searched_once_whatever_leads_to_it():
    strategy = puct.make_puct(num_children=3, num_lanes=2, max_depth=4, merge_states=True)
    keys, world, _ = begin(range(4))
    structure = make_structure(
        jnp.full(4, 3, jnp.int32), CAPACITY, token_limit=LIMIT, num_parents=3
    )
    run = functools.partial(run_compiled, strategy, make_expand(num_states=9), None)
    done = jax.tree.map(np.asarray, jax.jit(run)(keys, world, structure)[0])
    check(done)
    num_edges = 0
    for row in range(4):
        named = done.alive[row] & (done.state_key[row] != 0)
        states = done.state_key[row][named]
        assert len(set(states.tolist())) == len(states)
        linked = np.flatnonzero((done.more_parents[row] >= 0).any(-1))
        num_edges += len(linked)
        for node in linked:
            # Some dead child of the further parent stands for the same state.
            for parent in done.more_parents[row, node]:
                twins = (done.parent[row] == parent) & ~done.alive[row]
                assert parent < 0 or done.state_key[row, node] in done.state_key[row][twins]
    assert num_edges > 0


def test_the_log_tells_every_operator_call_in_order():
    open_search, chunk = programs("puct", trace_rounds=40)
    search = chunk(open_search(*begin(range(2))), 1000, 2)
    structure = search.structure
    for row in range(2):
        events = read_events(search.trace, structure, row, 3)
        grown = [event for event in events if event.operator == "generate"]
        assert len(grown) == int(structure.budget.expansions[row])
        slots = [child for event in grown for child in event.nodes[1:]]
        assert slots == list(range(1, int(structure.num_nodes[row])))
        for event in grown:
            assert all(int(structure.parent[row, c]) == event.nodes[0] for c in event.nodes[1:])
        selected = [event.nodes[0] for event in events if event.operator == "select"]
        assert selected == [event.nodes[0] for event in grown]
        assert any(event.operator == "backtrack" for event in events)
        backed = [event.nodes for event in events if event.operator == "backpropagate"]
        assert all(path[-1] == 0 for path in backed)
        assert [path[0] for path in backed] == selected
    assert int(search.trace.operators.max()) == Operator.GENERATE


def test_a_snapshot_of_another_tree_is_refused(tmp_path):
    path = tmp_path / "s.npz"
    save_snapshot(path, {"a": jnp.ones(3, jnp.bfloat16), "k": jax.random.key(1)})
    back = load_snapshot(path, {"a": jnp.zeros(3, jnp.bfloat16), "k": jax.random.key(0)})
    assert back["a"].dtype == jnp.bfloat16
    assert jax.random.key_data(back["k"]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="holds 2 arrays, wanted are 1"):
        load_snapshot(path, {"a": jnp.zeros(3)})
    with pytest.raises(ValueError, match="bfloat16"):
        load_snapshot(path, {"a": jnp.zeros(3), "k": jax.random.key(0)})
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="no snapshot"):
        load_snapshot(path, {"a": jnp.zeros(3)})
    with pytest.raises(FileNotFoundError):
        load_snapshot(tmp_path / "none", {})


def test_limits_name_a_bad_value():
    with pytest.raises(ValueError, match="min_share"):
        Limits(min_share=1.5)
    with pytest.raises(ValueError, match="step_tokens must be >= 1, got 0"):
        Limits(step_tokens=0)
