"""The tree of a host-side search, in plain Python: PUCT over sampled reasoning steps.

Select by Q + c P sqrt(N_p) / (1 + N_c) from the root, expand the leaf with K sampled steps, give
each child one visit worth its value, and add those K visits to every ancestor (AlphaMath, arXiv
2405.03553: constant c, prior from the step's mean token log-probability). The value of a node is
exp(mean token log-probability of its path). It is the bookkeeping that a framework driving a
model from Python would keep; it knows neither the model nor what is kept per node.

Ties go to the step sampled first. A node that is finished, or at the depth limit, or has nothing
left to grow below it is closed and never selected.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One sampled step. logprob: sum over its tokens. kept: whatever its sampler needs again."""

    tokens: list[int]
    logprob: float
    finished: bool
    kept: Any = None


@dataclasses.dataclass
class Node:
    """parent: -1 for the root. children: indices of its K children, empty for a leaf.

    tokens: of its own step (the prompt, for the root). path_logprob, path_tokens: of the generated
    tokens from the root to here. total: sum of the values backed up. prior: given its siblings.
    """

    parent: int
    depth: int
    tokens: list[int]
    path_logprob: float = 0.0
    path_tokens: int = 0
    prior: float = 1.0
    visits: int = 0
    total: float = 0.0
    finished: bool = False
    closed: bool = False
    children: range = range(0)
    kept: Any = None


@dataclasses.dataclass
class Tree:
    """A search tree, its root first. exploration: c of PUCT."""

    nodes: list[Node]
    exploration: float
    max_depth: int
    expansions: int = 0


def plant_tree(
    prompt: Sequence[int], *, exploration: float = 1.25, max_depth: int = 16, kept: Any = None
) -> Tree:
    """A tree whose only leaf is the root.

    Raises:
      ValueError: the prompt is empty, or `max_depth` is below 1.
    """
    if not prompt:
        raise ValueError("prompt of 0 tokens: accepted are prompts of 1 token or more")
    if max_depth < 1:
        raise ValueError(f"max_depth={max_depth}: accepted are numbers >= 1")
    return Tree([Node(-1, 0, list(prompt), kept=kept)], exploration, max_depth)


def select_leaf(tree: Tree) -> int | None:
    """The leaf to expand next; None when the whole tree is closed."""
    if tree.nodes[0].closed:
        return None
    index = 0
    while tree.nodes[index].children:
        node = tree.nodes[index]
        open_children = [child for child in node.children if not tree.nodes[child].closed]
        bonus = tree.exploration * math.sqrt(node.visits)
        index = max(open_children, key=lambda child: _score(tree.nodes[child], bonus))
    return index


def add_children(tree: Tree, leaf: int, steps: Sequence[Step]) -> None:
    """Hangs sampled steps below a leaf, and backs their values up.

    Raises:
      ValueError: the node is no open leaf, or a step is empty.
    """
    above = tree.nodes[leaf]
    if above.children or above.closed:
        raise ValueError(f"node {leaf} is not an open leaf")
    if not steps or not all(step.tokens for step in steps):
        raise ValueError(f"node {leaf}: accepted are one step or more, of one token or more each")
    first = len(tree.nodes)
    priors = _normalise([math.exp(step.logprob / len(step.tokens)) for step in steps])
    for step, prior in zip(steps, priors, strict=True):
        node = Node(
            leaf,
            above.depth + 1,
            list(step.tokens),
            path_logprob=above.path_logprob + step.logprob,
            path_tokens=above.path_tokens + len(step.tokens),
            prior=prior,
            finished=step.finished,
            closed=step.finished or above.depth + 1 >= tree.max_depth,
            kept=step.kept,
        )
        node.visits, node.total = 1, path_value(node)
        tree.nodes.append(node)
    above.children = range(first, len(tree.nodes))
    tree.expansions += 1
    _back_up(tree, leaf)


def path_value(node: Node) -> float:
    """exp(mean token log-probability) of the path, in (0, 1]."""
    return math.exp(node.path_logprob / max(node.path_tokens, 1))


def trace_path(tree: Tree, index: int) -> list[int]:
    """Indices of the nodes from the root to `index`."""
    path = []
    while index >= 0:
        path.append(index)
        index = tree.nodes[index].parent
    return path[::-1]


def join_tokens(tree: Tree, index: int) -> list[int]:
    """All tokens from the prompt's first to the node's last."""
    return [token for node in trace_path(tree, index) for token in tree.nodes[node].tokens]


def _score(node: Node, bonus: float) -> float:
    return node.total / node.visits + bonus * node.prior / (1 + node.visits)


def _normalise(weights: list[float]) -> list[float]:
    total = sum(weights)
    if total == 0.0:  # Underflow: nothing tells them apart.
        return [1.0 / len(weights)] * len(weights)
    return [weight / total for weight in weights]


def _back_up(tree: Tree, leaf: int) -> None:
    """Adds the new children's visits to all their ancestors, and closes what is used up."""
    fresh = [tree.nodes[child] for child in tree.nodes[leaf].children]
    visits, total = len(fresh), sum(node.total for node in fresh)
    for index in reversed(trace_path(tree, leaf)):
        node = tree.nodes[index]
        node.visits += visits
        node.total += total
        node.closed = all(tree.nodes[child].closed for child in node.children)
