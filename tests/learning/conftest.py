"""The spec's golden numbers, and trees that several tests of this room learn from."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.reasoning.structure import Operator, check, make_structure

_STATISTICS = ("visits", "value", "model_value", "prior", "reward", "logprob")
_TOPOLOGY = ("parent", "more_parents", "operator", "depth", "span_start", "alive", "terminal")
_WRITTEN = (*_TOPOLOGY, *_STATISTICS)


@pytest.fixture(scope="session")
def golden(root):
    """Numbers of the spec by name; skips where it is absent."""
    path = root.parent / "shared" / "spec" / "golden.json"
    if not path.is_file():
        pytest.skip("the spec's golden numbers are not beside the repository")
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def plant():
    """plant(trees) -> Structure of trees given as lists of nodes; few shapes, few compiles.

    A node is a dict: parents (a list, the root's empty), and any statistics of `Structure`.
    """
    return _plant


def _plant(trees, capacity=16, num_parents=1):
    structure = make_structure(jnp.asarray([3] * len(trees)), capacity, num_parents=num_parents)
    arrays = {name: np.array(getattr(structure, name)) for name in _WRITTEN}
    for row, tree in enumerate(trees):
        for place, node in enumerate(tree):
            node = dict(node)
            parents = node.pop("parents")
            arrays["alive"][row, place] = True
            if parents:
                above = [arrays["depth"][row, parent] for parent in parents]
                arrays["parent"][row, place] = parents[0]
                arrays["more_parents"][row, place, : len(parents) - 1] = parents[1:]
                arrays["depth"][row, place] = max(above) + 1
                arrays["span_start"][row, place] = 3
                arrays["operator"][row, place] = Operator.GENERATE
            for name, value in node.items():
                arrays[name][row, place] = value
    made = {name: jnp.asarray(array) for name, array in arrays.items()}
    count = jnp.asarray([len(tree) for tree in trees], jnp.int32)
    structure = structure.replace(**made, num_nodes=count, num_created=count)
    check(structure)
    return structure


@pytest.fixture(scope="session")
def random_tree():
    """random_tree(rng, size, num_parents) -> a list of nodes for `plant`."""

    def grow(rng, size, num_parents=1):
        nodes = [{"parents": [], "visits": 0.0, "model_value": rng.normal(), "value": rng.normal()}]
        for place in range(1, size):
            open_nodes = [
                i for i, n in enumerate(nodes) if not n.get("terminal") and n.get("alive", True)
            ]
            count = min(len(open_nodes), int(rng.integers(1, num_parents + 1)))
            parents = sorted(rng.choice(open_nodes, count, replace=False).tolist())
            nodes.append(
                {
                    "parents": parents,
                    "visits": float(rng.integers(0, 4)),
                    "value": rng.normal(),
                    "model_value": rng.normal(),
                    "prior": rng.random(),
                    "reward": rng.normal(),
                    "terminal": place > 2 and bool(rng.random() < 0.3),
                    "alive": place < 3 or bool(rng.random() < 0.9),
                }
            )
            nodes[-1]["terminal"] &= nodes[-1]["alive"]
        return nodes

    return grow
