"""Every strategy on the procedural environment: drivers, batches and devices agree, and what each
promises holds after every round."""

import dataclasses
import functools
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from film import CAPACITY, TOKEN_LIMITS, film, frames, start
from jax.sharding import PartitionSpec
from procedural import make_expand
from scripted import grow, make_outcome, make_request

from rlm_jax.core.mesh import BATCH_AXES, make_mesh
from rlm_jax.reasoning import strategies
from rlm_jax.reasoning.drive import Limits, next_request, run_compiled, run_host
from rlm_jax.reasoning.operators.update import BACKUPS
from rlm_jax.reasoning.strategies.beam import make_beam
from rlm_jax.reasoning.strategies.best_first import make_best_first
from rlm_jax.reasoning.strategies.best_of_n import make_best_of_n
from rlm_jax.reasoning.strategies.greedy import make_greedy
from rlm_jax.reasoning.strategies.gumbel import make_gumbel
from rlm_jax.reasoning.strategies.puct import make_puct
from rlm_jax.reasoning.strategies.td_mcts import DEFAULTS, make_td_mcts
from rlm_jax.reasoning.strategies.uct import make_uct
from rlm_jax.reasoning.structure import check, make_structure
from rlm_jax.reasoning.tree_config import TreeConfig
from rlm_jax.reasoning.tree_search import init_state, update_tree

# Of each strategy one variant with a lane and one with several; between them, every setting.
CHAINS = {
    "greedy": [make_greedy(12)],
    "best_of_n": [make_best_of_n(5, 12, max_refused=1)],
    "beam": [
        make_beam(beam_width=1, num_children=3, max_depth=5, dropped="keep"),
        make_beam(beam_width=3, num_children=2, max_depth=5, shrink=True, root_lanes=2),
    ],
    "best_first": [
        make_best_first(num_children=3, max_depth=5, resample=False, num_solutions=4),
        make_best_first(
            num_lanes=3, num_children=2, max_depth=5, threshold=-0.5, root_lanes=2, depth_bonus=0.1
        ),
        make_best_first(num_lanes=3, max_depth=5, num_children=2, prior_weight=0.5, widen=True),
        make_best_first(num_lanes=2, num_children=3, max_depth=4, merge_states=True),
    ],
}
SMALL = {"max_depth": 4, "num_children": 3}
TREES = {
    "uct": [
        (make_uct, SMALL | {"judge": "visit", "terminal": "revisit", "num_simulations": 14}),
        (make_uct, SMALL | {"num_lanes": 3, "backup": "max", "root_lanes": 2}),
    ],
    "puct": [
        (make_puct, SMALL | {"tie_break": "random", "root_noise": 0.25}),
        (make_puct, SMALL | {"num_lanes": 3, "judge": "visit", "root_lanes": 2}),
    ],
    "gumbel": [
        (make_gumbel, SMALL | {"num_simulations": 9}),
        (
            functools.partial(make_gumbel, visits_per_round=4),
            SMALL | {"num_simulations": 20, "num_lanes": 5, "root_lanes": 3, "root_noise": 0.25},
        ),
        (
            functools.partial(make_gumbel, fit_budget=True),
            SMALL | {"num_simulations": 14, "num_lanes": 2, "judge": "visit"},
        ),
    ],
    "td_mcts": [
        (make_td_mcts, DEFAULTS | {"max_depth": 4}),
        (
            make_td_mcts,
            DEFAULTS | {"max_depth": 4, "num_lanes": 2, "terminal": "exclude", "resample": True},
        ),
    ],
}
MADE = {name: [(make(**tree), tree) for make, tree in of] for name, of in TREES.items()}
VARIANTS = CHAINS | {name: [strategy for strategy, _ in of] for name, of in MADE.items()}
ALL = [
    pytest.param(strategy, id=f"{name}-{i}")
    for name, of in VARIANTS.items()
    for i, strategy in enumerate(of)
]
# One of each; greedy is the first of best_of_n's chains.
LAST = [pytest.param(of[-1], id=name) for name, of in VARIANTS.items() if name != "greedy"]
SEARCHES = [
    pytest.param(strategy, TreeConfig(**tree), id=f"{name}-{i}")
    for name, of in MADE.items()
    for i, (strategy, tree) in enumerate(of)
]


def last_frame(strategy):
    return jax.tree.map(lambda array: array[-1], film(strategy).structure)


def assert_equal(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_every_strategy_is_tested():
    found = {module.name for module in pkgutil.iter_modules(strategies.__path__)}
    assert found == set(VARIANTS)
    for name in found:
        module = importlib.import_module(f"rlm_jax.reasoning.strategies.{name}")
        assert hasattr(module, f"make_{name}")
        assert all(strategy.name == name for strategy in VARIANTS[name])


@pytest.mark.parametrize("strategy", ALL)
def test_every_round_keeps_the_invariants(strategy):
    """The arena's own; within budget; no node asked for that ended or died, or was grown before
    unless it is widened."""
    before = jax.tree.map(np.asarray, start()[2])
    rounds = 0
    for asked, grown_nodes, state, structure in frames(film(strategy)):
        check(structure)
        widens = getattr(state, "unwritten", None) is not None
        for b, lanes in enumerate(grown_nodes):
            grown = lanes[lanes >= 0]
            inner = grown[grown > 0]
            assert len(set(inner)) == len(inner)
            assert (before.alive & ~before.terminal)[b, grown].all()
            assert widens or not np.isin(inner, before.parent[b]).any()
        rounds += (asked >= 0).any()
        before = structure
    assert rounds > 1
    assert (before.budget.generated_tokens <= TOKEN_LIMITS).all()
    assert (before.num_nodes[TOKEN_LIMITS == 0] == 1).all()


@pytest.mark.parametrize("strategy", LAST)
def test_the_host_driver_grows_equal_structures(strategy):
    keys, world, structure = start()
    rounds = []
    expand = jax.jit(make_expand())
    by_host, _ = run_host(
        strategy, expand, None, keys, world, structure, lambda i, s: rounds.append((i, s))
    )
    assert_equal(by_host, last_frame(strategy))
    assert [i for i, _ in rounds] == list(range(1, len(rounds) + 1))
    assert rounds[-1][1] is by_host


@pytest.mark.parametrize("strategy", LAST)
def test_alone_on_a_device_equals_in_a_batch_on_one(strategy):
    """The compiled driver, one structure on each of eight devices; no device talks to another."""
    spec = PartitionSpec(BATCH_AXES)

    def run(k, w, s):
        return run_compiled(strategy, make_expand(), None, k, w, s)[0]

    mesh = make_mesh(replica=2, data=4)
    compiled = (
        jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))
        .lower(*start())
        .compile()
    )
    assert_equal(compiled(*start()), last_frame(strategy))
    text = compiled.as_text()
    assert not any(op in text for op in ("all-reduce", "all-gather", "collective-permute"))


def oracle_first_child(s, b):
    """A node's first child; of the root, the first one of the newest sampling."""
    first = np.full(CAPACITY, -1)
    for i in reversed(range(1, s.num_nodes[b])):
        first[s.parent[b, i]] = i
    at_root = [i for i in range(1, s.num_nodes[b]) if s.parent[b, i] == 0]
    if at_root:
        newest = max(s.created_at[b, i] for i in at_root)
        first[0] = min(i for i in at_root if s.created_at[b, i] == newest)
    return first


def oracle_open_leaves(s, b, cfg):
    """Leaves at or below each node that a round may select, counted one by one."""
    first, count = oracle_first_child(s, b), np.zeros(CAPACITY, int)
    for i in range(s.num_nodes[b]):
        ended = s.terminal[b, i] or s.depth[b, i] >= cfg.max_depth
        again = cfg.terminal == "revisit" or (cfg.terminal == "stop" and s.terminal[b, i])
        again |= cfg.judge == "visit" and s.visits[b, i] == 0
        old = s.parent[b, i] == 0 and i < first[0]
        if s.alive[b, i] and first[i] < 0 and not old and (not ended or again):
            at = i
            while at >= 0:
                count[at] += 1
                at = s.parent[b, at]
    return count


@pytest.mark.parametrize(("strategy", "cfg"), SEARCHES)
def test_open_leaves_are_those_counted_from_scratch(strategy, cfg):
    for *_, state, structure in frames(film(strategy)):
        for b in range(len(TOKEN_LIMITS)):
            assert (state.first_child[b] == oracle_first_child(structure, b)).all()
            assert (state.open_leaves[b] == oracle_open_leaves(structure, b, cfg)).all()


def flatten(tree):
    """All rounds of a film as one large batch, with the keys to it."""
    rounds, batch, *_ = jax.tree.leaves(tree)[0].shape
    return jax.tree.map(
        lambda array: jnp.asarray(array.reshape(rounds * batch, *array.shape[2:])), tree
    ), jnp.tile(start()[0], rounds)


@pytest.mark.parametrize(("strategy", "cfg"), SEARCHES)
def test_a_tree_search_can_go_on_from_any_structure(strategy, cfg):
    states, _ = flatten(film(strategy).state)
    made = jax.jit(functools.partial(init_state, cfg=cfg))(*flatten(film(strategy).structure))
    np.testing.assert_array_equal(made.first_child, states.first_child)
    np.testing.assert_array_equal(made.open_leaves, states.open_leaves)


def test_a_root_sampled_anew_by_fewer_lanes_is_told_from_the_old_one():
    """Two lanes brought four solutions; the budget paid for one lane of the second sampling."""
    cfg = TreeConfig(num_children=2, num_lanes=2, root_lanes=2)
    structure = make_structure(jnp.asarray([1]), 9)
    structure, _ = grow(structure, [0, 0], 2, [0.1, 0.2, 0.3, 0.4], terminal=[True] * 4)
    structure, _ = grow(structure, [0], 2, [0.5, 0.6])
    state = jax.jit(functools.partial(init_state, cfg=cfg))(structure, start()[0][:1])
    assert state.first_child.tolist() == [[5] + [-1] * 8]
    assert state.open_leaves.tolist() == [[2, 0, 0, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("strategy", VARIANTS["best_first"])
def test_best_first_can_go_on_from_any_structure(strategy):
    states, _ = flatten(film(strategy).state)
    made = jax.jit(strategy.init)(*flatten(film(strategy).structure))
    np.testing.assert_array_equal(made.open, states.open)
    for ours, theirs in zip(*map(jax.tree.leaves, (made, states)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_beam_can_go_on_from_any_structure():
    strategy = VARIANTS["beam"][1]
    states, _ = flatten(film(strategy).state)
    made = jax.jit(strategy.init)(*flatten(film(strategy).structure))
    same_width = np.asarray(made.width == states.width)
    beams = np.asarray(made.beams).tolist(), np.asarray(states.beams).tolist()
    for ours, theirs, same in zip(*beams, same_width, strict=True):
        ours, theirs = set(ours) - {-1}, set(theirs) - {-1}
        # Made anew, it cannot tell which solutions had been among the best.
        assert ours == theirs if same else ours <= theirs
    assert same_width.mean() > 0.5


@pytest.mark.parametrize("backup", BACKUPS)
def test_a_node_whose_steps_are_all_refused_is_worth_what_they_are(backup):
    """The evaluator's 0.9 of a dead end gives way to 0.1, that of its refused steps, and above."""
    cfg = TreeConfig(num_children=2, max_depth=3, backup=backup)
    tell = jax.jit(functools.partial(update_tree, cfg=cfg))
    structure = make_structure(jnp.ones(1, jnp.int32), 9)
    keys = jax.random.split(jax.random.key(0), 1)
    state = init_state(structure, keys, cfg=cfg)
    for node, valid, values in ((0, True, (0.9, 0.5)), (1, False, (0.2, 0.0))):
        request = make_request([node], 2)
        outcome = make_outcome(structure, request, value=values, valid=valid)
        state, structure, _ = tell(state, structure, request, outcome)
    check(structure)
    np.testing.assert_allclose(structure.model_value[0, 1:3], [0.1, 0.5])
    assert np.asarray(state.open_leaves[0, :3]).tolist() == [1, 0, 1]
    if backup == "mean":
        # Two visits, one of each opinion; the root has seen both of them and its other child.
        np.testing.assert_allclose(structure.value[0, 1], (0.9 + 0.1) / 2)
        np.testing.assert_allclose(structure.visits[0, :3], [3, 2, 1])
    else:
        np.testing.assert_allclose(structure.value[0, 1], 0.1)
        wanted = 0.5 if backup == "max" else (2 * 0.1 + 0.5) / 3
        np.testing.assert_allclose(structure.value[0, 0], wanted, rtol=1e-6)


@pytest.mark.parametrize(("strategy", "cfg"), SEARCHES)
def test_visits_and_values_follow_from_those_below(strategy, cfg):
    """A node's visits are its own and its children's; a mean, weighted mean or maximum of them."""
    s = last_frame(strategy)
    checked = 0
    for b, node in np.ndindex(s.depth.shape):
        made = s.parent[b] == node
        if node >= s.num_nodes[b] or not s.visits[b][made].any():
            continue
        checked += 1
        # The root is sampled anew, all else is grown once.
        growths = len(set(s.created_at[b][made]))
        n, value = s.visits[b][made], s.value[b][made]
        if cfg.backup == "mean":
            own = 1.0 if node else growths * (cfg.judge == "visit")
            assert s.visits[b, node] == own + n.sum()
            mean = own * s.model_value[b, node] + (n * value).sum()
            np.testing.assert_allclose(s.value[b, node], mean / s.visits[b, node], atol=1e-5)
            continue
        # x1: N-1+M at the root, N-2+M elsewhere; M the steps that were no duplicates.
        assert n.sum() == s.visits[b, node] - growths - (node > 0) + s.alive[b][made].sum()
        seen = made & s.alive[b] & (s.visits[b] > 0)
        if node == 0:
            seen &= np.arange(CAPACITY) >= oracle_first_child(s, b)[0]
        n, value = s.visits[b][seen], s.value[b][seen]
        wanted = value.max() if cfg.backup == "max" else (n * value).sum() / n.sum()
        np.testing.assert_allclose(s.value[b, node], cfg.discount * wanted, atol=1e-5)
    assert checked > 10


@pytest.mark.parametrize(
    ("strategy", "shrinks"), list(zip(VARIANTS["beam"], (False, True), strict=True))
)
def test_a_beam_goes_on_from_the_best(strategy, shrinks):
    """Every round by the rule: the best of the new steps, solutions among them if it shrinks."""
    before = jax.tree.map(np.asarray, start()[2])
    width = np.full(len(TOKEN_LIMITS), strategy.num_lanes)
    for *_, state, s in frames(film(strategy)):
        # The other problems are short of tokens: beams wait.
        for b in np.flatnonzero(TOKEN_LIMITS == 300):
            new = range(before.num_nodes[b], s.num_nodes[b])
            pool = [i for i in new if s.visits[b, i] and (shrinks or not s.terminal[b, i])]
            best = sorted(pool, key=lambda i: -s.value[b, i])[: width[b]]
            goes_on = [i for i in best if not s.terminal[b, i] and s.depth[b, i] < 5]
            assert [i for i in state.beams[b] if i >= 0] == goes_on
            if shrinks:
                width[b] -= sum(bool(s.terminal[b, i]) for i in best)
                inner = np.isin(np.arange(CAPACITY), s.parent[b])
                leaves = np.flatnonzero(s.alive[b] & ~s.terminal[b] & ~inner)
                assert all(i in goes_on or i == 0 or s.depth[b, i] == 5 for i in leaves)
            else:
                assert s.alive[b, list(new)].tolist() == [bool(s.visits[b, i]) for i in new]
        before = s
    assert (width < strategy.num_lanes).any() == shrinks


def test_best_first_grows_the_best_open_leaves():
    strategy = VARIANTS["best_first"][1]
    before, opened = None, np.zeros(0)
    for _, lanes, state, s in frames(film(strategy)):
        for b in np.flatnonzero(TOKEN_LIMITS == 300):
            grown = lanes[b][lanes[b] >= 0]
            if before is not None and len(grown) and grown[0] > 0:
                score = before.value[b] + 0.1 * before.depth[b]
                ranked = sorted(np.flatnonzero(opened[b]), key=lambda i: -score[i])
                assert grown.tolist() == ranked[: len(grown)]
            elif len(grown):
                assert set(grown) == {0}
        # What is valued below the threshold was pruned at once.
        inner = np.arange(CAPACITY)[None] > 0
        assert not (s.alive & inner & ~s.terminal & (s.value < -0.5)).any()
        before, opened = s, np.array(state.open)


@pytest.mark.parametrize(
    ("weight", "order"), [(0.0, [1, 2, 3]), (0.2, [2, 1, 3]), (2.0, [2, 3, 1])]
)
def test_best_first_weighs_odds_by_the_policy(weight, order):
    """Odds 3/2, 1 and 1/4 of steps with chances 0.05, 0.65 and 0.3."""
    strategy = make_best_first(num_lanes=3, num_children=3, prior_weight=weight)
    structure = make_structure(jnp.ones(1, jnp.int32), 13)
    keys = jax.random.split(jax.random.key(0), 1)
    request = make_request([0, -1, -1], 3)
    steps = {"value": [0.6, 0.5, 0.2], "logprob": np.log([0.05, 0.65, 0.3])}
    fields = {name: [*values, *([0.0] * 6)] for name, values in steps.items()}
    outcome = make_outcome(structure, request, **fields)
    state, structure = jax.jit(strategy.tell)(
        strategy.init(structure, keys), structure, request, outcome
    )
    assert jax.jit(strategy.ask)(state, structure, keys).nodes[0].tolist() == order


def test_best_first_widens_what_may_still_be_solved():
    """Which node is next, by a table of each node's odds and of the steps it has written."""
    strategy = make_best_first(num_children=1, prior_weight=0.5, widen=True)
    tell, ask = jax.jit(strategy.tell), jax.jit(strategy.ask)
    keys = jax.random.split(jax.random.key(0), 1)
    structure = make_structure(jnp.ones(1, jnp.int32), 40)
    state = strategy.init(structure, keys)
    rng = np.random.default_rng(2)
    value, own, rest, last, parents = {0: 1.0}, {0: 0.0}, {0: 1.0}, {0: 0.3}, []

    def score(node):
        odds = value[node] / (1 - value[node]) * np.exp(0.5 * own[node]) if node else np.inf
        chance = 1.0 if node == 0 else odds * rest[node] / (1 + odds * rest[node])
        right = 0.3 * chance
        return np.log(right / (1 - right)) + 0.5 * np.log(min(last[node], rest[node]))

    for new in range(1, 30):
        node = int(ask(state, structure, keys).nodes[0, 0])
        still = [one for one in rest if rest[one] > 0.01]
        assert node == max(still, key=score)
        chance = rng.uniform(0.1, 0.6) * rest[node]
        worth = rng.uniform(0.05, 0.7)
        steps = {"value": [worth], "logprob": [np.log(chance)], "valid": [new % 5 > 0]}
        request = make_request([node], 1)
        state, structure = tell(
            state, structure, request, make_outcome(structure, request, **steps)
        )
        rest[node], last[node] = rest[node] - chance, chance
        parents.append(node)
        if new % 5 and structure.depth[0, new] < 16:
            value[new], own[new], rest[new], last[new] = worth, np.log(chance), 1.0, 0.3
    assert len(set(parents)) > 4
    assert max(map(parents.count, parents)) > 2


@pytest.mark.parametrize("merge_states", [False, True])
def test_best_first_grows_a_state_once_if_told(merge_states):
    """Five states for 24 nodes: without merging some are grown again and again."""
    strategy = make_best_first(num_children=3, max_depth=6, merge_states=merge_states)
    keys, world, structure = start()
    expand = make_expand(num_states=6, terminal_rate=0.0)
    s = run_compiled(strategy, expand, None, keys, world, structure)[0]
    s = jax.tree.map(np.asarray, s)
    check(s)
    again = 0
    for b in np.flatnonzero(TOKEN_LIMITS == 300):
        grown = np.unique(s.parent[b][(s.parent[b] > 0)])
        states = [key for key in s.state_key[b][grown].tolist() if key]
        again += len(states) - len(set(states))
    assert (again == 0) == merge_states


def test_best_first_ends_with_its_solutions():
    strategy = VARIANTS["best_first"][0]
    s = last_frame(strategy)
    solved = (s.alive & s.terminal).sum(-1)
    # A last round of three steps may bring more than are wanted.
    assert ((solved >= 4) & (solved <= 6) | (solved < 4)).all()
    assert (solved >= 4).any()


def test_a_node_whose_steps_are_very_unlikely_is_widened_again():
    """Long steps: their probability is below what float32 holds."""
    strategy = make_best_first(num_children=1, max_depth=1, prior_weight=0.7, widen=True)
    keys, _, structure = start(np.full(1, 100, np.int32))
    state = strategy.init(structure, keys)
    for _ in range(3):
        request = strategy.ask(state, structure, keys)
        assert request.nodes.tolist() == [[0]]
        outcome = make_outcome(structure, request, logprob=-200.0, value=0.5)
        state, structure = strategy.tell(state, structure, request, outcome)


@pytest.mark.parametrize(("expansions", "planned", "considered"), [(13, 12, 4), (90, 32, 8)])
def test_gumbel_is_planned_for_what_the_budget_pays_for(expansions, planned, considered):
    """The root is an expansion too; 12 simulations are two halvings of 4 children, not of 8."""
    keys, world, structure = start(np.full(3, 10**6, np.int32), 300)
    structure = dataclasses.replace(structure, expansion_limit=jnp.full(3, expansions, jnp.int32))
    tree = {"num_children": 8, "max_depth": 6, "num_lanes": 4, "resample": False}

    def run(**settings):
        strategy = make_gumbel(**settings, **tree)
        grow = jax.jit(functools.partial(run_compiled, strategy, make_expand(), None))
        return grow(keys, world, structure)[0]

    fitted = run(num_simulations=32, max_considered=8, fit_budget=True)
    assert_equal(fitted, run(num_simulations=planned, max_considered=considered))
    check(fitted)


@pytest.mark.parametrize(("left", "served"), [(0, 0), (1, 1), (5, 1), (12, 2), (29, 4), (30, 5)])
def test_the_end_of_a_budget_goes_into_whole_steps(left, served):
    strategy = VARIANTS["best_of_n"][0]
    keys, _, structure = start(np.full(2, left, np.int32))
    ask = jax.jit(functools.partial(next_request, strategy, limits=Limits(step_tokens=6)))
    request = ask(strategy.init(structure, keys), structure, keys)
    assert request.active.tolist() == [[lane < served for lane in range(5)]] * 2


def test_a_chain_that_must_wait_goes_on_later():
    strategy = VARIANTS["best_of_n"][0]
    expand = make_expand(terminal_rate=1.0)
    run = jax.jit(
        lambda k, w, s: run_compiled(
            strategy, expand, None, k, w, s, limits=Limits(step_tokens=20)
        )[0]
    )
    structure = run(*start(np.full(4, 40, np.int32)))
    check(structure)
    # Every chain ends with its first step, of six tokens at most: all five fit, two at a time.
    assert structure.num_nodes.tolist() == [6] * 4
    assert structure.terminal[:, 1:6].all()


@pytest.mark.parametrize(("num_chains", "max_refused"), [(1, 0), (1, 3), (5, 2)])
def test_a_chain_writes_on_where_a_step_was_refused(num_chains, max_refused):
    """As often as it may; a step refused once more ends it, as a solution or its depth does."""
    strategy = make_best_of_n(num_chains, 6, max_refused=max_refused)
    expand = make_expand(terminal_rate=0.1, refused_rate=0.3)
    run = jax.jit(lambda k, w, s: run_compiled(strategy, expand, None, k, w, s)[0])
    s = run(*start(np.full(16, 1000, np.int32)))
    check(s)
    s = jax.tree.map(np.asarray, s)
    ends = set()
    for row in range(len(s.num_nodes)):
        children = [[] for _ in range(s.num_nodes[row])]
        for node in range(1, s.num_nodes[row]):
            children[s.parent[row, node]].append(node)
        chains = [[0]] * num_chains if num_chains == 1 else [[0, n] for n in children[0]]
        for chain in chains:
            refused = 0
            while s.alive[row, chain[-1]] and children[chain[-1]]:
                below = children[chain[-1]]
                dead = [node for node in below if not s.alive[row, node]]
                refused += len(dead)
                living = [node for node in below if s.alive[row, node]]
                assert below == dead + living
                if not living:
                    break
                assert len(living) == 1
                chain.append(living[0])
            if num_chains > 1 and not s.alive[row, chain[-1]]:
                continue  # Which chain a refused first step belongs to cannot be told.
            full = s.terminal[row, chain[-1]] or s.depth[row, chain[-1]] == 6
            if num_chains == 1:
                assert refused <= max_refused if full else refused == max_refused + 1
            else:
                assert full or 0 < refused <= max_refused + 1
            ends.add((bool(full), refused > 0))
    assert ends >= {(True, False), (False, True)}
    if max_refused:
        assert (True, True) in ends


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_greedy(0), "max_depth must be >= 1"),
        (lambda: make_greedy(3, max_refused=-1), "max_refused must be >= 0, got -1"),
        (lambda: make_best_of_n(0, 3), "num_chains"),
        (lambda: make_best_of_n(2, 3, "median"), "median"),
        (lambda: make_puct(num_children=0), "num_children must be >= 1, got 0"),
        (lambda: make_puct(exploration=-1.0), "exploration"),
        (lambda: make_puct(answer_rule="loudest"), "loudest"),
        (lambda: make_puct(q="raw-ish"), "raw-ish"),
        (lambda: make_puct(base=0.0), "base must be > 0"),
        (lambda: make_uct(visit_offset=-1.0), "visit_offset"),
        (lambda: make_uct(terminal="revisit"), "needs num_simulations"),
        (lambda: make_uct(num_lanes=2, root_lanes=3), "root_lanes=3 of num_lanes=2"),
        (lambda: make_td_mcts(value_low=1.0), "value_low must be < value_high, got 1.0, 1.0"),
        (lambda: make_td_mcts(discount=1.5), "discount"),
        (lambda: make_gumbel(max_considered=0), "max_considered"),
        (lambda: make_gumbel(visits_per_round=0), "visits_per_round must be >= 1, got 0"),
        (lambda: make_gumbel(gumbel_scale=-1.0), "gumbel_scale"),
        (lambda: make_beam(beam_width=0), "beam_width must be >= 1, got 0"),
        (lambda: make_beam(root_lanes=5), "root_lanes=5 of beam_width=4: accepted is at most"),
        (lambda: make_beam(num_solutions=-2), "num_solutions must be >= 1, got -2"),
        (lambda: make_beam(dropped="burn"), "burn"),
        (lambda: make_beam(answer_rule="loudest"), "loudest"),
        (lambda: make_best_first(num_lanes=2, root_lanes=3), "root_lanes=3 of num_lanes=2"),
        (lambda: make_best_first(num_solutions=0), "num_solutions must be >= 1, got 0"),
        (lambda: make_best_first(depth_bonus=-0.1), "depth_bonus"),
        (lambda: make_best_first(prior_weight=-0.1), "prior_weight"),
        (lambda: make_best_first(answer_rule="loudest"), "loudest"),
        (lambda: make_best_first(widen=True), "widen=True: accepted is a prior_weight > 0"),
    ],
)
def test_bad_settings_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
