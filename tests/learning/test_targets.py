"""Values and advantages of trees: golden numbers, and recursion over nodes in plain Python."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.core.mesh import make_mesh
from rlm_jax.learning.advantages import leads_to, path_advantages, tree_advantages
from rlm_jax.learning.targets import (
    VALUE_RULES,
    find_dead_ends,
    target_weights,
    trace_paths,
    value_tree,
)
from rlm_jax.reasoning.sharding import place_batch, shard_search
from rlm_jax.reasoning.structure import path_to_root

read = jax.jit(value_tree, static_argnames=("rule", "discount"))
advantages = jax.jit(tree_advantages)
trace = jax.jit(trace_paths, static_argnums=2)


@jax.jit
def read_all(structure, rewards):
    """Values by every rule, at a discount of 0.9."""
    return {rule: value_tree(structure, rewards, rule=rule, discount=0.9) for rule in VALUE_RULES}


def pad(rewards, capacity=16):
    """Rewards of the first nodes, and NaN behind them."""
    rewards = np.atleast_2d(np.asarray(rewards, np.float32))
    space = [(0, 0), (0, capacity - rewards.shape[1])]
    return jnp.asarray(np.pad(rewards, space, constant_values=np.nan))


def test_algorithm_6_equals_golden_g09(plant, golden):
    """A chain of x1's q: root .20, .30, .50, and a terminal that the verifier found right."""
    chain = [{"parents": [], "value": 0.2}]
    chain += [{"parents": [i], "value": q, "visits": 1} for i, q in enumerate((0.3, 0.5, 0.9))]
    chain[3]["terminal"] = True
    structure = plant([chain])
    tree = read(structure, pad([0.0, 0.0, 0.0, 1.0]), rule="x1", discount=0.96)
    np.testing.assert_allclose(advantages(structure, tree)[0, 1:4], golden["G09"], atol=1e-5)
    paths = trace(structure, jnp.asarray([3]), 9)
    assert paths.tolist() == [[1, 2, 3] + [-1] * 6]
    along = path_advantages(advantages(structure, tree), paths)
    np.testing.assert_allclose(along[0, :3], golden["G09"], atol=1e-5)
    assert not np.asarray(along[0, 3:]).any()


def test_siblings_equal_golden_g61(plant):
    siblings = [
        {"parents": [], "visits": 4},
        {"parents": [0], "visits": 1, "model_value": 0.5},
        {"parents": [0], "visits": 3, "model_value": -0.2},
    ]
    structure = plant([siblings])
    tree = read(structure, pad([0.0, 0.0, 0.0]), rule="weighted", discount=1.0)
    assert float(tree.value[0, 0]) == pytest.approx(-0.025, abs=1e-6)
    np.testing.assert_allclose(advantages(structure, tree)[0, 1:3], [0.525, -0.175], atol=1e-6)


def test_rollouts_equal_golden_g08(plant, golden):
    """An edge with three rollouts below it, of two, three and one further steps."""
    nodes = [{"parents": []}, {"parents": [0]}]
    ends = {}
    for steps, reward in ((2, 1.0), (3, -1.0), (1, 1.0)):
        above = 1
        for _ in range(steps):
            nodes.append({"parents": [above]})
            above = len(nodes) - 1
        nodes[above]["terminal"] = True
        ends[above] = reward
    rewards = pad([ends.get(node, 0.0) for node in range(len(nodes))])
    structure = plant([nodes])
    tree = read(structure, rewards, rule="rollouts", discount=0.95)
    assert float(tree.edge[0, 1]) == pytest.approx(golden["G08_Q"], abs=1e-5)
    assert float(tree.value[0, 1]) == pytest.approx(golden["G08_V_next"], abs=1e-5)
    assert float(tree.weight[0, 1]) == 3.0
    binary = read(structure, jnp.maximum(rewards, 0), rule="rollouts", discount=1.0)
    assert float(binary.value[0, 0]) == pytest.approx(golden["G08_binary"], abs=1e-5)


class ByHand:
    """Values of one tree by recursion over its nodes, in float64."""

    def __init__(self, nodes, rewards, rule, discount):
        self.nodes, self.rewards, self.rule, self.discount = nodes, rewards, rule, discount
        self.below = {i: [] for i in range(len(nodes))}
        for i, node in enumerate(nodes):
            for parent in node["parents"] if node.get("alive", True) else ():
                self.below[parent].append(i)

    def ends(self, i):
        """(steps below, discounted reward) of every way from node i to the end of a solution."""
        found = []
        for child in self.below[i]:
            if self.nodes[child].get("terminal"):
                found.append(self.rewards[child])
            else:
                found += [self.rewards[child] + self.discount * r for r in self.ends(child)]
        return found

    def value(self, i):
        node = self.nodes[i]
        if self.rule == "rollouts":
            returns = self.ends(i)
            return sum(returns) / len(returns) if returns else 0.0
        seen = [(self.weight(c), self.edge(c)) for c in self.below[i] if self.weight(c) > 0]
        if not seen:
            return node["model_value"]
        if self.rule == "max":
            return max(q for _, q in seen)
        return sum(n * q for n, q in seen) / sum(n for n, _ in seen)

    def weight(self, i):
        visits = self.nodes[i].get("visits", 0)
        return max(visits, 1) if self.nodes[i].get("terminal") else visits

    def edge(self, i):
        if self.nodes[i].get("terminal"):
            return self.rewards[i]
        return self.rewards[i] + self.discount * self.value(i)

    def known(self, i):
        if self.nodes[i].get("terminal"):
            return True
        if self.rule == "rollouts":
            return bool(self.ends(i))
        return any(self.weight(c) > 0 for c in self.below[i])


def test_nodes_of_which_nothing_could_grow_are_dead_ends(plant):
    """Dropped steps were written and never visited; what was not paid for was not written."""

    def node(parent, model_value, **flags):
        return {"parents": [parent], "visits": 2.0, "model_value": model_value, **flags}

    dropped = {"alive": False, "visits": 0.0}
    tree = [
        {"parents": [], "visits": 8.0},
        node(0, 0.8), node(0, 0.7), node(0, 0.3), node(0, 0.4),
        node(1, 0.0, **dropped), node(1, 0.0, **dropped),
        node(2, 0.0, **dropped), node(2, 0.6),
        node(3, 0.0, **dropped),  # Not written.
        node(4, 0.0, alive=False),  # Pruned.
    ]  # fmt: skip
    written = np.zeros((1, 16), np.int32)
    written[0, [5, 6, 7, 8, 10]] = 2
    structure = dataclasses.replace(plant([tree]), span_length=jnp.asarray(written))
    rewards = pad([0.0, 0.125] + [0.0] * 9)
    for rule, root in (("max", 0.486), ("weighted", (0.125 + 0.486 + 0.27 + 0.36) / 4)):
        found = jax.tree.map(np.asarray, read(structure, rewards, rule=rule, discount=0.9))
        np.testing.assert_allclose(found.value[0, :5], [root, 0.0, 0.54, 0.3, 0.4], atol=1e-6)
        np.testing.assert_allclose(found.edge[0, 1:5], [0.125, 0.486, 0.27, 0.36], atol=1e-6)
        assert found.known[0, :5].tolist() == [True, True, True, False, False]
    rollouts = jax.tree.map(np.asarray, read(structure, rewards, rule="rollouts", discount=0.9))
    assert rollouts.known[0, :5].tolist() == [True, True, False, False, False]
    assert rollouts.value[0, 0] == 0.125
    weights = target_weights(structure, read(structure, rewards, rule="max"), min_visits=2.0)
    assert weights[0, :5].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(("merged", "expected"), [(0, [True, True]), (7, [True, False])])
def test_steps_that_were_merged_make_no_dead_end(plant, merged, expected):
    """Of the second node's two steps one led to state `merged`, which another node stands for."""
    parents = [[], [0], [0], [1], [1], [1], [2], [2]]
    tree = [
        {"parents": above, "visits": 2.0} | ({"alive": False, "visits": 0.0} if i > 2 else {})
        for i, above in enumerate(parents)
    ]
    structure = plant([tree])
    lengths = jnp.asarray([[0, *[4] * 7, *[0] * 8]], jnp.int32)
    keys = structure.state_key.at[0, 6].set(merged)
    structure = dataclasses.replace(structure, span_length=lengths, state_key=keys)
    assert find_dead_ends(structure)[0, 1:3].tolist() == expected


def test_values_pass_through_edges_to_deeper_parents(plant):
    """Node 5 hangs on 2, which is one move down, and on 4, which is three: what is proven below
    it is seen from all of them."""
    tree = [{"parents": [], "visits": 9.0}]
    for parents in ([0], [0], [1], [3], [2, 4]):
        tree.append({"parents": parents, "visits": 2.0, "model_value": 0.2})
    tree.append({"parents": [5], "visits": 1.0, "terminal": True})
    structure = plant([tree], num_parents=2)
    depth = structure.depth.at[0, 5].set(2).at[0, 6].set(3)
    structure = dataclasses.replace(structure, depth=depth)
    rewards = pad([0.0] * 6 + [1.0])
    found = read(structure, rewards, rule="max")
    assert found.value[0, :6].tolist() == [1.0] * 6
    assert read(structure, rewards, rule="rollouts").known[0, :6].tolist() == [True] * 6


@pytest.mark.parametrize("num_parents", [1, 2])
def test_values_equal_recursion(plant, random_tree, num_parents):
    rng = np.random.default_rng(num_parents)
    trees = [random_tree(rng, size, num_parents) for size in (1, 4, 12, 14, 14, 14, 15, 16)]
    structure = plant(trees, num_parents=num_parents)
    rewards = rng.normal(size=(8, 16)).astype(np.float32)
    found = read_all(structure, jnp.asarray(rewards))
    for rule in ("weighted", "max", "rollouts"):
        check_rule(structure, trees, rewards, found[rule], rule)


def check_rule(structure, trees, rewards, found, rule):
    weights = np.asarray(target_weights(structure, found, min_visits=2.0))
    found = jax.tree.map(np.asarray, found)
    for row, nodes in enumerate(trees):
        hand = ByHand(nodes, rewards[row], rule, 0.9)
        for i, node in enumerate(nodes):
            if not node.get("alive", True):
                assert not found.known[row, i]
                assert found.value[row, i] == found.edge[row, i] == weights[row, i] == 0.0
                continue
            ends = bool(node.get("terminal"))
            value = rewards[row, i] if ends else hand.value(i)
            assert found.value[row, i] == pytest.approx(value, abs=1e-4)
            edge = hand.edge(i) if i else 0.0
            assert found.edge[row, i] == pytest.approx(edge, abs=1e-4)
            assert found.known[row, i] == hand.known(i)
            many = len(hand.ends(i)) if rule == "rollouts" else node["visits"]
            assert bool(weights[row, i]) == (ends or (hand.known(i) and many >= 2))
        assert not found.known[row, len(nodes) :].any()


def test_searched_values_are_read_as_the_search_and_as_x1_mean_them(plant, random_tree):
    rng = np.random.default_rng(5)
    structure = plant([random_tree(rng, 16) for _ in range(8)])
    rewards = rng.normal(size=(8, 16)).astype(np.float32)
    ends, q = np.asarray(structure.terminal), np.asarray(structure.value)
    inner = np.asarray(structure.alive) & ~ends & (np.arange(16) > 0)
    trees = read_all(structure, jnp.asarray(rewards))
    for rule, value, edge in (("search", q, rewards + 0.9 * q), ("x1", q / 0.9, q)):
        tree = jax.tree.map(np.asarray, trees[rule])
        np.testing.assert_allclose(tree.value[inner], value[inner], rtol=1e-5)
        np.testing.assert_allclose(tree.edge[inner], edge[inner], rtol=1e-5)
        np.testing.assert_array_equal(tree.edge[ends], rewards[ends])
        np.testing.assert_array_equal(tree.value[ends], rewards[ends])
        np.testing.assert_array_equal(tree.known, trees["weighted"].known)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_visit_weighted_advantages_of_siblings_sum_to_zero(plant, random_tree, seed):
    rng = np.random.default_rng(seed)
    structure = plant([random_tree(rng, 12) for _ in range(8)])
    rewards = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
    tree = read_all(structure, rewards)["weighted"]
    found = np.asarray(advantages(structure, tree) * tree.weight)
    parent = np.asarray(structure.parent)
    assert np.abs(found).max() > 0.1
    for node in range(12):
        sums = np.where(parent == node, found, 0.0).sum(-1)
        np.testing.assert_allclose(sums, 0.0, atol=1e-4)
    assert not found[:, 0].any()


def test_more_slots_change_nothing(plant, random_tree):
    rng = np.random.default_rng(7)
    nodes = random_tree(rng, 10)
    rewards = rng.normal(size=(1, 10)).astype(np.float32)
    small = read_all(plant([nodes], capacity=10), jnp.asarray(rewards))
    wide = read_all(plant([nodes]), pad(rewards))
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(a, b[:, :10])
        assert not np.asarray(b[:, 10:]).any()


@pytest.mark.parametrize("num_parents", [1, 2])
def test_paths_and_what_leads_to_a_solution(plant, random_tree, num_parents):
    rng = np.random.default_rng(11)
    trees = [random_tree(rng, 16, num_parents) for _ in range(8)]
    structure = plant(trees, num_parents=num_parents)
    leads = np.asarray(jax.jit(leads_to)(structure, structure.terminal))
    for row, nodes in enumerate(trees):
        hand = ByHand(nodes, np.zeros(16), "rollouts", 1.0)
        for i, node in enumerate(nodes):
            ends = bool(node.get("terminal")) or bool(hand.ends(i))
            assert leads[row, i] == (ends and node.get("alive", True))
    assert leads.any()
    assert not leads.all()
    for node in range(16):
        found = np.asarray(trace(structure, jnp.full(8, node), 9))
        for row in range(8):
            path = path_to_root(structure, row, node)[1:]
            assert found[row].tolist() == path + [-1] * (9 - len(path))
    assert (np.asarray(trace(structure, jnp.full(8, -1), 9)) == -1).all()


def test_eight_devices_see_what_one_sees(plant, random_tree):
    rng = np.random.default_rng(13)
    structure = plant([random_tree(rng, 9) for _ in range(8)])
    rewards = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)

    def run(_, structure, rewards):
        trees = read_all(structure, rewards)
        edges = [tree_advantages(structure, tree) for tree in trees.values()]
        paths = trace_paths(structure, structure.num_nodes - 1, 9)
        return trees, edges, leads_to(structure, structure.terminal), paths

    mesh = make_mesh()
    many = jax.jit(shard_search(run, mesh))(jnp.zeros(()), *place_batch(mesh, (structure, rewards)))
    one = jax.jit(run)(jnp.zeros(()), structure, rewards)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), many, one)


def test_bad_settings_are_refused(plant):
    structure = plant([[{"parents": []}]])
    rewards = jnp.zeros((1, 16))
    with pytest.raises(ValueError, match="median"):
        value_tree(structure, rewards, rule="median")
    with pytest.raises(ValueError, match=r"discount.*0\.0"):
        value_tree(structure, rewards, discount=0.0)
