"""x1's search in lockstep: the spec's scripted run (golden G07), and random trees, against a plain
Python search written from Algorithm 1 and the code it describes."""

import ast
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from procedural import make_expand, make_world
from scripted import make_scripted_expand

from rlm_jax.reasoning.drive import run_compiled, run_host
from rlm_jax.reasoning.operators.traversal import select_answer
from rlm_jax.reasoning.strategies.td_mcts import make_td_mcts
from rlm_jax.reasoning.structure import check, make_structure

# Name of a node -> its children: (name, value, terminal). B1a ends with reward -1.
SCRIPT = {
    "root": [("A", 0.4, False), ("B", 0.1, False)],
    "A": [("A1", -0.2, False), ("A2", 0.3, False)],
    "B": [("B1", 0.5, False), ("B2", -0.3, False)],
    "B1": [("B1a", -1.0, True), ("B1b", 0.2, False)],
}
# After each iteration: the scores at each step of the descent, and every node's (N, q).
GOLDEN = [
    ([], {"root": (1, 0.24), "A": (1, 0.4), "B": (1, 0.1)}),
    (
        [[0.7, 0.55]],
        {"root": (2, 0.06272), "A": (2, 0.048), "A1": (1, -0.2), "A2": (1, 0.3), "B": (1, 0.1)},
    ),
    (
        [[0.940701, 1.175051]],
        {"root": (3, 0.06912), "A": (2, 0.048), "B": (2, 0.096), "B1": (1, 0.5), "B2": (1, -0.3)},
    ),
    (
        [[1.113328, 1.137328], [1.375051, 0.975051]],
        {
            "root": (4, -0.178422),
            "A": (2, 0.048),
            "B": (3, -0.34176),
            "B1": (2, -0.384),
            "B1a": (1, -1.0),
            "B1b": (1, 0.2),
        },
    ),
]


class Plain:
    """x1's search, one node an object. `propose(node)` gives [(name, value, terminal)]."""

    def __init__(self, name, value=0.0, terminal=False):
        self.name, self.q, self.terminal = name, np.float32(value), terminal
        self.visits, self.children = 1, []

    def scores(self, c1=1.25, c2=19652.0):
        n = np.float32(self.visits)
        factor = np.float32(c1) + np.log((n + np.float32(c2)) / np.float32(c2))
        return [
            (c.q + np.float32(1)) / np.float32(2)
            + factor * np.sqrt(n - np.float32(1)) / np.float32(1 + c.visits)
            for c in self.children
        ]

    def select(self):
        path, seen = [self], []
        while path[-1].children:
            seen.append(path[-1].scores())
            path.append(path[-1].children[int(np.argmax(seen[-1]))])
        return path, seen

    def expand(self, path, steps, discount=0.96):
        path[-1].children = [Plain(*step) for step in steps]
        for node in reversed(path):
            total = sum(c.visits for c in node.children)
            node.q = np.float32(discount * sum(c.visits * c.q for c in node.children) / total)
            node.visits += 1


def make_root():
    root = Plain("root")
    root.visits = 0  # The root is the one node that nobody evaluated.
    return root


def walk(node):
    yield node
    for child in node.children:
        yield from walk(child)


def test_the_plain_search_replays_golden_g07(root):
    tree = make_root()
    for scores, stats in GOLDEN:
        path, seen = tree.select()
        tree.expand(path, SCRIPT[path[-1].name])
        for got, wanted in zip(seen, scores, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-6)
        found = {node.name: (node.visits, node.q) for node in walk(tree)}
        for name, numbers in stats.items():
            assert found[name] == pytest.approx(numbers, abs=1e-6)
    path = root.parent / "shared" / "spec" / "golden.json"
    if not path.is_file():
        pytest.skip("the spec's golden numbers are not beside the repository")
    wanted = ast.literal_eval(json.loads(path.read_text())["G07"])[-1][3]
    assert {name: pytest.approx(numbers, abs=1e-6) for name, numbers in wanted.items()} == found


def test_td_mcts_replays_golden_g07_in_lockstep():
    strategy = make_td_mcts(max_depth=9)
    expand = make_scripted_expand(SCRIPT)
    structure = make_structure(jnp.asarray([1]), 9)
    tree, asked = make_root(), []

    def watch(params, keys, names, structure, request):
        asked.append([names[int(node)] for node in request.nodes[0]])
        return expand(params, keys, names, structure, request)

    rounds = []
    final, names = run_host(
        strategy,
        watch,
        None,
        jax.random.split(jax.random.key(0), 1),
        {0: "root"},
        structure,
        lambda _, structure: rounds.append(structure),
    )
    assert asked == [["root"], ["A"], ["B"], ["B1"]]
    assert len(rounds) == len(GOLDEN)
    for structure, (_, golden) in zip(rounds, GOLDEN, strict=True):
        check(structure)
        path, _ = tree.select()
        tree.expand(path, SCRIPT[path[-1].name])
        plain = {node.name: (node.visits, node.q) for node in walk(tree)}
        count = int(structure.num_nodes[0])
        assert {names[i] for i in range(count)} == set(plain)
        for i in range(count):
            stats = float(structure.visits[0, i]), float(structure.value[0, i])
            assert stats == pytest.approx(plain[names[i]], abs=1e-6)
            assert stats == pytest.approx(golden.get(names[i], stats), abs=1e-6)
    # The walk by highest value goes to A2, as the spec says.
    none = jnp.full((1, 9), -1, jnp.int32)
    answer = jax.jit(functools.partial(select_answer, rule="highest_value"))(final, none)
    assert names[int(answer.node[0])] == "A2"


def test_td_mcts_replays_the_plain_search_on_random_trees():
    size, batch = 61, 12
    strategy = make_td_mcts(max_depth=50)
    keys = jax.random.split(jax.random.key(4), batch)
    expand = make_expand(terminal_rate=0.03, duplicate_rate=0.0)
    run = jax.jit(lambda k, w, s: run_compiled(strategy, expand, None, k, w, s)[0])
    structure = run(keys, make_world(keys, size), make_structure(jnp.ones(batch, jnp.int32), size))
    check(structure)
    s = jax.tree.map(np.asarray, structure)
    stopped = 0
    for b in range(batch):
        tree, slot = make_root(), 1
        tree.name = 0
        while slot < s.num_nodes[b]:
            path, _ = tree.select()
            assert s.parent[b, slot : slot + 2].tolist() == [path[-1].name] * 2
            tree.expand(
                path,
                [(i, s.model_value[b, i], s.terminal[b, i]) for i in (slot, slot + 1)],
            )
            slot += 2
        if slot + 2 <= size:
            # D2, D7: it ended early, because what it would select next is a solution.
            assert tree.select()[0][-1].terminal
            stopped += 1
        for node in walk(tree):
            assert s.visits[b, node.name] == node.visits
            np.testing.assert_allclose(s.value[b, node.name], node.q, atol=1e-5)
            if node.children:
                visits = sum(child.visits for child in node.children)
                assert visits == node.visits - (1 if node.name == 0 else 2) + 2
    assert 0 < stopped < batch
