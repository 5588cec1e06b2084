"""Every strategy through both drivers on the procedural environment; invariants every round."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from procedural import make_expand, make_world

from rlm_jax.core.mesh import BATCH_AXES, make_mesh
from rlm_jax.reasoning import strategies
from rlm_jax.reasoning.drive import Limits, next_request, run_compiled, run_host
from rlm_jax.reasoning.strategies import best_of_n, greedy, gumbel, puct, td_mcts, uct
from rlm_jax.reasoning.structure import check, make_structure

VARIANTS = {
    "greedy": [greedy.make_greedy(12)],
    "best_of_n": [best_of_n.make_best_of_n(5, 12, rule) for rule in ("majority", "best")],
    "puct": [
        puct.make_puct(num_children=3, num_lanes=lanes, max_depth=5, base=base)
        for lanes, base in ((1, None), (3, 19652.0))
    ],
    "uct": [
        uct.make_uct(num_children=3, num_lanes=lanes, max_depth=5, judge=judge)
        for lanes, judge in ((1, "expansion"), (4, "visit"))
    ],
    "gumbel": [
        gumbel.make_gumbel(
            num_simulations=12, num_children=3, num_lanes=4, max_depth=5, root_lanes=2, judge=judge
        )
        for judge in ("expansion", "visit")
    ],
    "td_mcts": [td_mcts.make_td_mcts(max_depth=5), td_mcts.make_td_mcts(max_depth=5, num_lanes=2)],
}
ALL = [strategy for variants in VARIANTS.values() for strategy in variants]
IDS = [f"{strategy.name}-{i}" for i, strategy in enumerate(ALL)]
CAPACITY = 64


def problem_keys(numbers):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.asarray(numbers))


def start(numbers, token_limit=300):
    keys = problem_keys(numbers)
    structure = make_structure(
        jnp.full(len(numbers), 4, jnp.int32), CAPACITY, token_limit=token_limit
    )
    return keys, make_world(keys, CAPACITY), structure


def search(strategy, numbers, token_limit=300):
    keys, world, structure = start(numbers, token_limit)
    run = jax.jit(lambda k, w, s: run_compiled(strategy, make_expand(), None, k, w, s))
    return run(keys, world, structure)[0]


def assert_equal(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_every_strategy_is_tested():
    found = {module.name for module in pkgutil.iter_modules(strategies.__path__)}
    assert found == set(VARIANTS)
    for name in found:
        module = importlib.import_module(f"rlm_jax.reasoning.strategies.{name}")
        assert hasattr(module, f"make_{name}")


@pytest.mark.parametrize("strategy", ALL, ids=IDS)
def test_drivers_agree_and_invariants_hold_after_every_round(strategy):
    keys, world, structure = start(range(4))
    rounds = []

    def on_round(number, structure):
        rounds.append(number)
        check(structure)

    expand = jax.jit(make_expand())
    by_host, _ = run_host(strategy, expand, None, keys, world, structure, on_round)
    assert rounds
    assert_equal(by_host, search(strategy, range(4)))


@pytest.mark.parametrize("strategy", ALL, ids=IDS)
def test_alone_equals_in_a_batch(strategy):
    batch = search(strategy, range(6))
    alone = search(strategy, [4])
    assert_equal(jax.tree.map(lambda a: a[4:5], batch), alone)


@pytest.mark.parametrize("strategy", ALL, ids=IDS)
def test_eight_devices_equal_one(strategy):
    keys, world, structure = start(range(8))
    spec = PartitionSpec(BATCH_AXES)

    def run(k, w, s):
        return run_compiled(strategy, make_expand(), None, k, w, s)[0]

    sharded = jax.jit(
        jax.shard_map(run, mesh=make_mesh(replica=2, data=4), in_specs=spec, out_specs=spec)
    )
    assert_equal(sharded(keys, world, structure), search(strategy, range(8)))
    text = sharded.lower(keys, world, structure).compile().as_text()
    assert not any(op in text for op in ("all-reduce", "all-gather", "collective-permute"))


@pytest.mark.parametrize("strategy", ALL, ids=IDS)
@pytest.mark.parametrize("token_limit", [0, 1, 17, 60])
def test_the_budget_is_never_exceeded(strategy, token_limit):
    structure = search(strategy, range(3), token_limit)
    check(structure)
    assert (np.asarray(structure.budget.generated_tokens) <= token_limit).all()


@pytest.mark.parametrize(("left", "served"), [(0, 0), (1, 1), (5, 1), (12, 2), (29, 4), (30, 5)])
def test_the_end_of_a_budget_goes_into_whole_steps(left, served):
    strategy = VARIANTS["best_of_n"][0]
    keys, _, structure = start(range(2), token_limit=left)
    request = next_request(
        strategy, strategy.init(structure, keys), structure, keys, limits=Limits(step_tokens=6)
    )
    assert request.active.tolist() == [[lane < served for lane in range(5)]] * 2


def test_a_chain_that_must_wait_goes_on_later():
    strategy = VARIANTS["best_of_n"][0]
    keys, world, structure = start(range(4), token_limit=40)
    expand = make_expand(terminal_rate=1.0)
    run = jax.jit(
        lambda k, w, s: run_compiled(
            strategy, expand, None, k, w, s, limits=Limits(step_tokens=20)
        )[0]
    )
    structure = run(keys, world, structure)
    check(structure)
    # Every chain ends with its first step, of six tokens at most: all five fit, two at a time.
    assert structure.num_nodes.tolist() == [6] * 4
    assert structure.terminal[:, 1:6].all()


def test_puct_visits_are_sums_and_values_are_means_of_what_was_evaluated():
    structure = search(VARIANTS["puct"][1], range(4))
    s = jax.tree.map(np.asarray, structure)
    for b in range(4):
        for node in range(s.num_nodes[b]):
            children = (s.parent[b] == node) & s.alive[b]
            if not children.any():
                continue
            own = 0.0 if node == 0 else 1.0
            assert s.visits[b, node] == own + s.visits[b][children].sum()
            mean = own * s.model_value[b, node] + (s.visits * s.value)[b][children].sum()
            np.testing.assert_allclose(s.value[b, node], mean / s.visits[b, node], rtol=1e-4)


def test_puct_fills_its_capacity_and_never_asks_for_a_closed_node():
    strategy = VARIANTS["puct"][1]
    keys, world, structure = start(range(4), token_limit=100_000)
    state = strategy.init(structure, keys)
    ask, tell, expand = jax.jit(strategy.ask), jax.jit(strategy.tell), jax.jit(make_expand())
    for _ in range(7):
        request = ask(state, structure, keys)
        nodes = np.asarray(request.nodes)
        terminal, alive = np.asarray(structure.terminal), np.asarray(structure.alive)
        for b in range(4):
            asked = nodes[b][nodes[b] >= 0]
            assert len(set(asked)) == len(asked)
            assert not terminal[b, asked].any()
            assert alive[b, asked].all()
            assert (np.asarray(structure.depth)[b, asked] < 5).all()
        outcome, world = expand(None, keys, world, structure, request)
        state, structure = tell(state, structure, request, outcome)
        check(structure)


def test_puct_ends_when_everything_is_closed():
    strategy = puct.make_puct(num_children=2, num_lanes=2, max_depth=2, resample=False)
    structure = search(strategy, range(5), token_limit=100_000)
    depth, alive = np.asarray(structure.depth), np.asarray(structure.alive)
    assert depth.max() == 2
    inner = (depth < 2) & alive & ~np.asarray(structure.terminal)
    for b in range(5):
        parents = set(np.asarray(structure.parent)[b].tolist())
        assert all(node in parents for node in np.flatnonzero(inner[b]))


def test_equal_values_spread_visits_evenly():
    expand = make_expand(terminal_rate=0.0, duplicate_rate=0.0, value_fn=lambda bits: 0.5)
    strategy = puct.make_puct(num_children=3, max_depth=9, exploration=2.0, length_power=0.0)
    keys, world, structure = start(range(2), token_limit=100_000)

    def flat(params, keys, world, structure, request):
        outcome, world = expand(params, keys, world, structure, request)
        return outcome.replace(logprob=jnp.zeros_like(outcome.logprob)), world

    structure, _ = jax.jit(lambda k, w, s: run_compiled(strategy, flat, None, k, w, s))(
        keys, world, structure
    )
    children = np.asarray(structure.parent) == 0
    for b in range(2):
        visits = np.asarray(structure.visits)[b][children[b]]
        assert visits.max() - visits.min() <= 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: greedy.make_greedy(0), "max_depth must be >= 1"),
        (lambda: best_of_n.make_best_of_n(0, 3), "num_chains"),
        (lambda: best_of_n.make_best_of_n(2, 3, "median"), "median"),
        (lambda: puct.make_puct(num_children=0), "num_children must be >= 1, got 0"),
        (lambda: puct.make_puct(exploration=-1.0), "exploration"),
        (lambda: puct.make_puct(answer_rule="loudest"), "loudest"),
    ],
)
def test_bad_settings_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
